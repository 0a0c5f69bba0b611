"""Metrics and suites for anybody's data: what is asked, what came back, and the numbers that papers report."""
