"""Data files of several formats, read into `Sample`s without a conversion step."""
