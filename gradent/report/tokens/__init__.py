"""The page of one pair's tokens, and of one group's."""
