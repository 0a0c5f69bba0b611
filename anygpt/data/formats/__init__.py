"""Data files of several formats, read into `Sample`s without a conversion step.

A format is one entry of `FORMATS` and one file here: how the rows are found, and a function that turns one row
into the project's own JSON form (`anygpt.data.schema.parse_sample`), where all checks are made.
"""

from anygpt.data.formats.reading import FORMATS, iterate_samples, missing_error, read_samples, with_unique_ids

__all__ = ["FORMATS", "iterate_samples", "missing_error", "read_samples", "with_unique_ids"]
