"""Pairwise normalized DPO (the paper's Section 5.1) as a TRL trainer."""
