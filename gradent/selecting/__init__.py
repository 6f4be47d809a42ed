"""Choosing data by a scan: which pairs go, why, what is left, and what a step on it would do."""
