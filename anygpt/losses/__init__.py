"""The loss terms and their formulas."""
