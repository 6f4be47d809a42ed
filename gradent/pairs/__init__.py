"""Preference pairs as tensors: `PairBatch`."""
