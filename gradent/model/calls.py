"""Calling a causal language model: its logits for right-padded rows, without a cache and without a mask."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn

from gradent.errors import ModelError
from gradent.model.parameters import output_embeddings

__all__ = ["forward_logits", "forward_marked", "takes_keep", "tempered"]

_KEEP = "logits_to_keep"
_TEMPERATURES = [1.0]


@contextmanager
def tempered(temperature: float) -> Iterator[None]:
    """Inside, logits are those of the model over a temperature, as some losses take them (GRPO)."""
    _TEMPERATURES.append(temperature)
    try:
        yield
    finally:
        _TEMPERATURES.pop()


def takes_keep(model: nn.Module) -> bool:
    """Whether the model's forward (behind PEFT's) has `logits_to_keep`: logits of the last positions alone."""
    unwrap = getattr(model, "get_base_model", None)
    return _KEEP in inspect.signature((unwrap() if callable(unwrap) else model).forward).parameters


# Rows are padded on the right, where a causal model does not look, so a mask has nothing to say; the masks that some
# models make of it give nan in float64, or other shapes.
def forward_logits(model: nn.Module, input_ids: Tensor, *, keep: int = 0) -> Tensor:
    """Logits `[R, L, V]` of ids `[R, L]`; with `keep`, of the last `keep` positions if the model heeds it."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder; gradent measures causal (decoder-only) language models."
        )
    accepted = inspect.signature(model.forward).parameters
    has_kwargs = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    kwargs: dict[str, int] = (
        {"use_cache": False} if "use_cache" in accepted or (has_kwargs and config is not None) else {}
    )
    if keep:
        kwargs[_KEEP] = keep
    with _contiguous_head_input(model) if keep else nullcontext():
        if has_kwargs or "input_ids" in accepted:
            output = model(input_ids=input_ids, **kwargs)
        else:
            output = model(input_ids, **kwargs)
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, tuple) and output else output
    rows, length = input_ids.shape
    has_rows = isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[0] == rows
    if not has_rows or (logits.shape[1] < length and logits.shape[1] != keep):
        received = list(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ModelError(
            f"{type(model).__name__} returned {received} for input_ids of shape [{rows}, {length}]; a causal language "
            f"model returns logits [{rows}, {length}, vocabulary]. Load it with its language-modelling head "
            "(AutoModelForCausalLM)."
        )
    # Prompt tuning puts its virtual tokens in front.
    found: Tensor = logits[:, -length:] if logits.shape[1] > length else logits
    return found if _TEMPERATURES[-1] == 1 else found / _TEMPERATURES[-1]


# Of a slice of positions, torch multiplies a frozen head row by row: up to 1.7 times as long on a CPU (8 rows,
# vocabulary 8192, width 256).
@contextmanager
def _contiguous_head_input(model: nn.Module) -> Iterator[None]:
    """Give the head a contiguous input, so that torch multiplies it in one product."""
    head = output_embeddings(model)
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(
        lambda _, args: tuple(value.contiguous() if isinstance(value, Tensor) else value for value in args)
    )
    try:
        yield
    finally:
        handle.remove()


def forward_marked(model: nn.Module, ids: Tensor, marks: Tensor, *, trim: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[R, K, V]`, ids and marks `[R, K]` of the last K positions: all L, or with `trim` the marked end."""
    keep = ids.shape[1] + 1 - max(1, int(marks.any(0).nonzero()[0])) if trim else 0
    logits = forward_logits(model, ids, keep=keep)
    count = logits.shape[1]
    return logits, ids[:, -count:], marks[:, -count:]
