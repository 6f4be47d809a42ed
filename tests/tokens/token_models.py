"""Models at which the token level is compared with one float64 backward a token, with the error that each allows."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tests.adapters import build_adapted
from tests.odd_models import build_odd
from tests.zoo import build

TOKEN_MODELS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "gpt2": (lambda: build("gpt2"), 1e-9),
    "llama": (lambda: build("llama"), 1e-6),
    "llama, biases, tied": (lambda: build("llama, biases, tied"), 1e-6),
    "mixtral": (lambda: build("mixtral"), 1e-6),
    "mamba": (lambda: build("mamba"), 1e-6),
    "LoRA": (lambda: build_adapted("rsLoRA"), 1e-6),
    "DoRA": (lambda: build_adapted("DoRA"), 1e-6),
    "custom autograd function": (lambda: build_odd("custom autograd function"), 1e-9),
}
