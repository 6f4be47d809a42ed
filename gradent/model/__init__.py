"""Talking to a model: what it is, what it can do, and its log-probs, leaving it as it was."""
