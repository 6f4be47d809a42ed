"""Token-masked DPO (the paper's Section 5.2) as a TRL trainer."""
