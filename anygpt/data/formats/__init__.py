"""Data files of several formats, read into `Sample`s without a conversion step.

A format is one entry of `reading.FORMATS`: a reader of rows, and a function that converts one row to the project's own
JSON form, which `anygpt.data.schema.parse_sample` checks.
"""
