"""Running a model without leaving a trace: training flags and random state as before, also after an exception."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gradent.errors import ModelError
from gradent.model.parameters import compiled_modules, unwrap_compiled

__all__ = ["is_observed", "observed"]

_OBSERVED: list[nn.Module] = []
_PADDING_WARNING = "warn_if_padding_and_no_attention_mask"


def is_observed(model: nn.Module) -> bool:
    """Whether a forward or backward pass of gradent's own is running on the model."""
    inner = unwrap_compiled(model)
    return any(other is inner for other in _OBSERVED)


@contextmanager
def observed(model: nn.Module, *, dropout: bool = False) -> Iterator[None]:
    """Run the model in eval mode, or in training mode with `dropout`, and restore everything afterwards."""
    # Layers of bitsandbytes stay in training mode: they have no dropout, and in eval mode, on a CPU, they compute
    # something else than was trained (8 bit: rounded activations) or repack their weights for good, without a gradient
    # from then on (4 bit).
    quantized = _quantized(model)
    modes = [(module, module.training) for module in model.modules()]
    # transformers looks for padding in rows that come without a mask, to warn of it: a look at values, which vmap
    # cannot take, and a warning that would be wrong: padding on the right of a causal model needs no mask.
    warners = [
        (module, {_PADDING_WARNING: vars(module)[_PADDING_WARNING]} if _PADDING_WARNING in vars(module) else {})
        for module, _ in modes
        if _lookup(module, _PADDING_WARNING) is not None
    ]
    checkpointed = [module for module, _ in modes if _lookup(module, "gradient_checkpointing") is True]
    # CUDA that was never initialized has no random state to keep.
    tensors = model.parameters() if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    devices = sorted({p.device.index for p in tensors if p.device.type == "cuda"} - {None})
    is_cached = torch.is_autocast_cache_enabled()
    # Compiled calls would trace what watches a pass, and be other functions afterwards.
    compiled = [(module, module._compiled_call_impl) for module in compiled_modules(model)]  # noqa: SLF001
    _OBSERVED.append(model)
    try:
        for module, _ in compiled:
            module._compiled_call_impl = None  # noqa: SLF001
        with torch.random.fork_rng(devices=devices):
            if any(training != dropout for _, training in modes):
                model.train(dropout)
            for module in quantized:
                module.training = True
            if dropout:  # gradient checkpointing, which runs in training mode alone, would hide layers
                for module in checkpointed:
                    module.gradient_checkpointing = False  # type: ignore[assignment]
            for module, _ in warners:
                setattr(module, _PADDING_WARNING, lambda *args, **kwargs: None)
            # A cached cast is one tensor for several uses: the uses could not be told apart in the graph.
            torch.set_autocast_cache_enabled(False)
            yield
    finally:
        _OBSERVED.remove(model)
        for module, call in compiled:
            module._compiled_call_impl = call  # noqa: SLF001
        torch.set_autocast_cache_enabled(is_cached)
        for module, attributes in warners:
            vars(module).pop(_PADDING_WARNING, None)
            vars(module).update(attributes)
        for module, training in modes:
            if module.training != training:
                module.training = training
        if dropout:
            for module in checkpointed:
                module.gradient_checkpointing = True  # type: ignore[assignment]


def _quantized(model: nn.Module) -> list[nn.Module]:
    """Linear layers of bitsandbytes, in 4 or 8 bit; refuses those whose weights have no gradient any more."""
    if "bitsandbytes" not in sys.modules:
        return []
    found = {
        name: module for name, module in model.named_modules()
        if any(kind.__module__.startswith("bitsandbytes.") for kind in type(module).__mro__)
    }  # fmt: skip
    for name, module in found.items():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ModelError(
                f"{name}: bitsandbytes has repacked its 4-bit weights for this CPU, as a forward in eval mode makes it "
                "do, and no gradient passes them from then on, not in training either. Load the model anew, and "
                "evaluate it without an eval() of these layers (set their support_avx512bf16_for_cpu to False)."
            )
    return list(found.values())


def _lookup(module: nn.Module, name: str) -> Any:
    """An attribute that is no parameter, buffer or module, or None; ten times as fast as `getattr` if absent."""
    value = vars(module).get(name, getattr(type(module), name, None))
    return getattr(module, name, None) if isinstance(value, property) else value
