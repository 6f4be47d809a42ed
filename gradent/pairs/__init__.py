"""Preference pairs as tensors: `PairBatch`."""

from gradent.pairs.batch import PairBatch
from gradent.pairs.tokenize import tokenize_pair

__all__ = ["PairBatch", "tokenize_pair"]
