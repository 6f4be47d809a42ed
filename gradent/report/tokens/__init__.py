"""The page of one pair's tokens."""
