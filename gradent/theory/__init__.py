"""Conditions 1 and 2, and the closed forms of the paper's Section 4."""
