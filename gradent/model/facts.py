"""Traits of a model, found out once by trying: is it causal, does it heed padding, does it trim its logits rightly.

What is found is kept as long as the model, by the names of what is trainable in it where an adapter could change it.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from gradent.errors import GradentWarning, ModelError, NotCausalError
from gradent.model.calls import forward_logits, takes_keep

__all__ = ["announce_untrimmed", "check_causal", "ignores_padding", "longest_input", "require_causal", "trims"]


@torch.no_grad()
def check_causal(model: nn.Module, ids: Tensor) -> None:
    """Refuse a model in which a later token changes an earlier prediction.

    Args:
        model: the model, in eval mode.
        ids: int64 `[T]`, T >= 2, a row of the batch.

    Raises:
        NotCausalError: changing the last token moves the logits before it.
    """
    changed = ids.clone()
    others = ids[ids != ids[-1]]
    # Another token of the row: 0 may be the padding token, from which some models make a mask of their own.
    changed[-1] = others[-1] if len(others) else int(ids[-1] == 0)
    before, after = (forward_logits(model, row[None])[0, :-1].float() for row in (ids, changed))
    scale = float(before.std()) or 1.0
    moved = float((before - after).abs_().max()) / scale
    # A causal model moves them by rounding at most (experts see their tokens in other groups).
    wide = next(model.parameters()).dtype in (torch.float32, torch.float64)
    if moved > (1e-3 if wide else 0.05):
        raise NotCausalError(
            f"{type(model).__name__} is not causal: changing the last token of a row moved the logits before it by "
            f"{moved:.2g} standard deviations. gradent needs log π(y|x) of a decoder-only language model; an encoder "
            "(BERT and kin) has none. If this is a decoder class of an encoder model, set config.is_decoder=True."
        )


# Models that passed, with the names of what was trainable in them then: an adapter added since is looked at again.
_CAUSAL: weakref.WeakKeyDictionary[nn.Module, set[tuple[str, ...]]] = weakref.WeakKeyDictionary()


def require_causal(model: nn.Module, ids: Tensor, *, again: bool = False) -> None:
    """`check_causal`, unless the model has passed it with the same parameters trainable.

    Args:
        model: the model, in eval mode.
        ids: int64 `[T]`, T >= 2, a row of the batch.
        again: look also at a model that has passed; for one that changed since.

    Raises:
        NotCausalError: changing the last token moves the logits before it.
    """
    names = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    passed = _CAUSAL.setdefault(model, set())
    if again or names not in passed:
        check_causal(model, ids)
        passed.add(names)


def longest_input(model: nn.Module) -> int:
    """Tokens of the longest row that a model says it takes (`max_position_embeddings`); very many if it says nothing.

    Args:
        model: a causal language model; of a composite one, its text part is asked.

    Returns:
        The number of tokens. A model with learned positions fails beyond it.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else sys.maxsize


_PADDING: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@torch.no_grad()
def ignores_padding(model: nn.Module, ids: Tensor) -> bool:
    """Whether padding on the right leaves the logits before it alone; found out once a model.

    Args:
        model: the model, in eval mode.
        ids: int64 `[T]`, a row of the batch.

    Returns:
        False for the few models whose logits depend on the padded length.
    """
    if model not in _PADDING:
        ids = ids[: max(2, longest_input(model) - 3)]
        padded = nn.functional.pad(ids, (0, 3))
        short, long = (forward_logits(model, row[None])[0, : len(ids)].float() for row in (ids, padded))
        limit = 1e-4 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.05
        _PADDING[model] = bool((short - long).abs_().max() <= limit * short.std().clamp_min(1e-6))
    return _PADDING[model]


# By the names of what is trainable in the model, as for causality.
_TRIMS: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, ...], bool]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def trims(model: nn.Module, ids: Tensor) -> bool:
    """Whether logits of the last positions alone are what they are among all; found out once a model.

    A model that `takes_keep` and gives something else with it is announced. What is said of logits here is not said of
    gradients: who differentiates what a model trims has to compare once.

    Args:
        model: the model, in eval mode.
        ids: int64 `[T]`, T >= 2, a row of the batch.

    Returns:
        Whether `forward_logits` may be given `keep`.
    """
    known = _TRIMS.setdefault(model, {})
    names = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    if names not in known and takes_keep(model):
        row = ids[None].clone()
        row[:, 1:][:, -3:] = 0  # as in a padded row: the last positions are those of the row, not of its text
        keep = min(8, len(ids) // 2)  # fewer than all, or nothing is tried
        whole = forward_logits(model, row)[:, -keep:].clone()
        try:
            reason = _contradiction(model, whole, forward_logits(model, row, keep=keep))
        except (ModelError, TypeError, ValueError, IndexError, RuntimeError) as raised:
            reason = f"{type(raised).__name__}: {raised}"
        if reason is None:
            return False
        if reason:
            announce_untrimmed(model, reason)
        known[names] = not reason
    return known.get(names, False)


def announce_untrimmed(model: nn.Module, reason: str) -> None:
    """Say that a model forms prompts' logits too, though it `takes_keep`.

    Args:
        model: the model.
        reason: what it does when it is asked for the last positions alone.
    """
    warnings.warn(
        f"gradent has {type(model).__name__} form the logits of prompts too (as exact, but slower): with "
        f"logits_to_keep, {reason}.",
        GradentWarning,
        stacklevel=5,
    )


def _contradiction(model: nn.Module, whole: Tensor, kept: Tensor) -> str | None:
    """What is wrong with the logits that were kept; empty where nothing is, None where nan leaves it open."""
    if kept.shape != whole.shape:
        return f"it gives those of {kept.shape[1]} positions where {whole.shape[1]} were asked for"
    dtypes = {parameter.dtype for parameter in model.parameters()} | {whole.dtype}
    narrow = bool(dtypes - {torch.float32, torch.float64}) or torch.is_autocast_enabled(whole.device.type)
    apart = torch.where(kept == whole, 0, (kept - whole).abs()).max()
    if apart.isnan():
        return None
    scale = whole[whole.isfinite()].float().std().clamp_min(1e-6)
    return "" if float(apart) <= (0.2 if narrow else 1e-4) * float(scale) else "it gives other logits"
