"""Facts about a model, found out once by trying: is it causal, does padding change it, can its logits be trimmed."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradent import notices
from gradent.errors import ModelError, NotCausalError
from gradent.model.calls import forward_logits, takes_keep

__all__ = [
    "Batching",
    "ModelFacts",
    "announce_untrimmed",
    "check_causal",
    "computing_dtypes",
    "facts",
    "ignores_padding",
    "inner_dtypes",
    "longest_input",
    "require_causal",
    "tolerance",
    "trims",
]

_TOLERANCES = {  # in float64, in float32, in anything narrower
    "a later token": (1e-3, 1e-3, 0.05),  # experts see their tokens in other groups
    "padding": (1e-4, 1e-4, 0.05),
    "trimmed logits": (1e-4, 1e-4, 0.2),
    "batched rows": (1e-6, 1e-4, 0.2),
    "forward mode": (1e-5, 1e-4, 0.2),
    "tokens behind the head": (1e-10, 1e-5, 1e-2),
}
"""Scaled difference that rounding alone may make between two ways to compute one thing. Rounding stays far below;
what is really different is wrong in the first digit."""


def tolerance(comparison: str, dtypes: Iterable[torch.dtype]) -> float:
    """The tolerance of one of the comparisons above, by the narrowest of some dtypes."""
    column = {torch.float64: 0, torch.float32: 1}
    return _TOLERANCES[comparison][max(column.get(dtype, 2) for dtype in dtypes)]


def computing_dtypes(model: nn.Module, device: torch.device) -> set[torch.dtype]:
    """The dtypes in which a model computes: those of its parameters, and autocast's."""
    cast = {torch.get_autocast_dtype(device.type)} if torch.is_autocast_enabled(device.type) else set()
    return {parameter.dtype for parameter in model.parameters()} | cast


@torch.no_grad()
def inner_dtypes(model: nn.Module, ids: Tensor) -> set[torch.dtype]:
    """The dtypes of autocast inside the model's forward on ids `[T]`, where accelerate's mixed precision stands."""
    found: set[torch.dtype] = set()

    def look(*args: Any) -> None:
        if torch.is_autocast_enabled(ids.device.type):
            found.add(torch.get_autocast_dtype(ids.device.type))

    handles = [module.register_forward_pre_hook(look) for module in model.modules() if module is not model]
    try:
        forward_logits(model, ids[None])
    finally:
        for handle in handles:
            handle.remove()
    return found


@dataclass(frozen=True)
class Batching:
    """How a model's rows are measured: in shared forwards or not, and with the logits of responses alone or of all."""

    is_shared: bool
    trim: bool = False


@dataclass
class ModelFacts:
    """What is known of a model with one set of trainable parameters; None where it was not tried yet."""

    is_causal: bool = False
    ignores_padding: bool | None = None
    trims: bool | None = None
    batching: Batching | None = None
    token_by_token: str | None = None  # why its tokens cannot share a backward pass; "" where they can
    shares_tangents: bool | None = None  # whether rows of one padded forward have the tangents of single rows


_FACTS: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, ...], ModelFacts]] = weakref.WeakKeyDictionary()


def facts(model: nn.Module) -> ModelFacts:
    """The model's facts, by the names of what is trainable now: an adapter added since is looked at again."""
    names = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return _FACTS.setdefault(model, {}).setdefault(names, ModelFacts())


@torch.no_grad()
def check_causal(model: nn.Module, ids: Tensor) -> None:
    """Refuse a model, in eval mode, in which the last token of ids `[T]`, T >= 2, changes an earlier prediction."""
    changed = ids.clone()
    others = ids[ids != ids[-1]]
    # Another token of the row: 0 may be the padding token, from which some models make a mask of their own.
    changed[-1] = others[-1] if len(others) else int(ids[-1] == 0)
    before, after = (forward_logits(model, row[None])[0, :-1].float() for row in (ids, changed))
    scale = float(before.std()) or 1.0
    moved = float((before - after).abs_().max()) / scale
    if moved > tolerance("a later token", [next(model.parameters()).dtype]):
        raise NotCausalError(
            f"{type(model).__name__} is not causal: changing the last token of a row moved the logits before it by "
            f"{moved:.2g} standard deviations. gradent needs log π(y|x) of a decoder-only language model; an encoder "
            "(BERT and kin) has none. If this is a decoder class of an encoder model, set config.is_decoder=True."
        )


def require_causal(model: nn.Module, ids: Tensor, *, again: bool = False) -> None:
    """`check_causal`, unless the model has passed it; `again` for a model that changed since."""
    known = facts(model)
    if again or not known.is_causal:
        check_causal(model, ids)
        known.is_causal = True


def longest_input(model: nn.Module) -> int:
    """Tokens of the longest row that the model's config allows; very many if it says nothing."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else sys.maxsize


@torch.no_grad()
def ignores_padding(model: nn.Module, ids: Tensor) -> bool:
    """Whether padding on the right of ids `[T]` leaves the logits before it alone; tried once a model."""
    known = facts(model)
    if known.ignores_padding is None:
        ids = ids[: max(2, longest_input(model) - 3)]
        padded = nn.functional.pad(ids, (0, 3))
        short, long = (forward_logits(model, row[None])[0, : len(ids)].float() for row in (ids, padded))
        limit = tolerance("padding", [next(model.parameters()).dtype]) * short.std().clamp_min(1e-6)
        known.ignores_padding = bool((short - long).abs_().max() <= limit)
    return known.ignores_padding


@torch.no_grad()
def trims(model: nn.Module, ids: Tensor) -> bool:
    """Whether `forward_logits` with `keep` gives the same logits on ids `[T]`, T >= 2; tried once a model."""
    # This says nothing of gradients: whoever differentiates trimmed logits has to compare once.
    known = facts(model)
    if known.trims is None and takes_keep(model):
        row = ids[None].clone()
        row[:, 1:][:, -3:] = 0  # as in a padded row: the last positions are those of the row, not of its text
        keep = min(8, len(ids) // 2)  # fewer than all, or nothing is tried
        full = forward_logits(model, row)[:, -keep:].clone()
        try:
            reason = _find_difference(model, full, forward_logits(model, row, keep=keep))
        except (ModelError, TypeError, ValueError, IndexError, RuntimeError) as raised:
            reason = f"{type(raised).__name__}: {raised}"
        if reason is None:
            return False
        if reason:
            announce_untrimmed(model, reason)
        known.trims = not reason
    return bool(known.trims)


def announce_untrimmed(model: nn.Module, reason: str) -> None:
    """Warn that a model forms prompts' logits too, though it `takes_keep`."""
    notices.warn(
        f"gradent has {type(model).__name__} form the logits of prompts too (as exact, but slower): with "
        f"logits_to_keep, {reason}.",
        stacklevel=6,
    )


def _find_difference(model: nn.Module, full: Tensor, trimmed: Tensor) -> str | None:
    """What is wrong with trimmed logits; empty where nothing is, None where nan leaves it open."""
    if trimmed.shape != full.shape:
        return f"it gives those of {trimmed.shape[1]} positions where {full.shape[1]} were asked for"
    apart = torch.where(trimmed == full, 0, (trimmed - full).abs()).max()
    if apart.isnan():
        return None
    limit = tolerance("trimmed logits", computing_dtypes(model, full.device) | {full.dtype})
    scale = full[full.isfinite()].float().std().clamp_min(1e-6)
    return "" if float(apart) <= limit * float(scale) else "it gives other logits"
