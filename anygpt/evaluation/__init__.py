"""Evaluation with suites of standard metrics on any data."""
