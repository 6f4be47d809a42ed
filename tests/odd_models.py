"""Causal language models as people write them by hand: parameters where no list of layer classes would look."""

from __future__ import annotations

import torch
from torch import nn

from tests import odd_layouts, odd_modules, odd_weights  # noqa: F401  (importing them registers their models)
from tests.odd_skeleton import ODD
from tests.zoo import enliven

__all__ = ["ODD", "build_odd"]


def build_odd(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The odd model of that name, seeded, in eval mode, no parameter of which is constant."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ODD[name]()
        enliven(model)
    return model.eval().to(dtype)
