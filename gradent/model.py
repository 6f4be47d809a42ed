"""Talking to a model: what to call it with, what it returns, and leaving it as it was found."""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradent.errors import GradentWarning, InputError, ModelError, NotCausalError, NothingTrainableError

__all__ = [
    "check_causal",
    "check_ids",
    "forward_logits",
    "forward_marked",
    "ignores_padding",
    "input_device",
    "is_observed",
    "is_sharded",
    "longest_input",
    "observed",
    "plain",
    "require_causal",
    "takes_keep",
    "trainable",
    "trims",
]

_KEEP = "logits_to_keep"
_PADDING_WARNING = "warn_if_padding_and_no_attention_mask"


def _no_warning(*args: object, **kwargs: object) -> None:
    """Stands in for transformers' look at padding while a model is observed."""


def plain(model: nn.Module) -> nn.Module:
    """The module behind `torch.compile`'s wrapper; any other model as it is."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters of the model are spread over ranks (FSDP2): each is whole only while its module runs."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def trainable(model: nn.Module, *, sharded: bool = False) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, each once, under the first of its names.

    Args:
        model: any module.
        sharded: accept parameters that are spread over ranks.

    Returns:
        `{name: parameter}` in `named_parameters` order.

    Raises:
        NothingTrainableError: no parameter has `requires_grad`.
        ModelError: a trainable parameter is on the meta device or sharded.
    """
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise NothingTrainableError(
            f"{type(model).__name__} has no trainable parameter: every parameter has requires_grad=False. gradent "
            "measures gradients over the trainable ones. For full fine-tuning call model.requires_grad_(True); for a "
            "PEFT adapter load it with PeftModel.from_pretrained(..., is_trainable=True)."
        )
    for name, parameter in found.items():
        if parameter.is_meta or (hasattr(parameter, "device_mesh") and not sharded):
            kind = "on the meta device" if parameter.is_meta else "sharded (DTensor)"
            raise ModelError(
                f"parameter {name!r} is {kind}; a measurement needs the whole parameter where the model computes. Load "
                "the model without offloading, or gather it first (FSDP: summon the full parameters)."
            )
    return found


def input_device(model: nn.Module) -> torch.device:
    """The device on which the model takes its token ids: that of its input embedding, or of its first parameter."""
    embedding = _embedding(model)
    parameter = next(model.parameters()) if embedding is None else embedding
    return parameter.device


def _embedding(model: nn.Module) -> Tensor | None:
    get = getattr(model, "get_input_embeddings", None)
    if get is None:
        return None
    try:
        module = get()
    except (NotImplementedError, AttributeError):  # transformers raises these for models without a plain embedding
        return None
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def takes_keep(model: nn.Module) -> bool:
    """Whether the model says that it can form the logits of the last positions alone (`logits_to_keep`).

    Args:
        model: a causal language model; of a PEFT model, the one inside is asked.

    Returns:
        Whether its forward names that argument.
    """
    unwrap = getattr(model, "get_base_model", None)
    return _KEEP in inspect.signature((unwrap() if callable(unwrap) else model).forward).parameters


def forward_logits(model: nn.Module, input_ids: Tensor, *, keep: int = 0) -> Tensor:
    """Logits of one forward, without a key-value cache and without an attention mask.

    Rows are right-padded, where a causal model does not look, so a mask has nothing to say; the masks that some models
    make of it give nan in float64, or other shapes.

    Args:
        model: a causal language model: a transformers or PEFT model, or any module whose forward takes `input_ids`
            and returns logits `[R, L, V]`, bare, first in a tuple, or as `.logits`.
        input_ids: int64 `[R, L]`, padded on the right if at all.
        keep: positions, counted from the last, whose logits are wanted; 0 for all. Only for a model that `takes_keep`.

    Returns:
        `[R, L, V]`, in the model's dtype; with `keep`, `[R, keep, V]`, or all from a model that does not heed it.

    Raises:
        ModelError: the model returned no logits, or of another shape; or it is an encoder-decoder.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder; gradent measures causal (decoder-only) language models."
        )
    accepted = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    kwargs: dict[str, int] = (
        {"use_cache": False} if "use_cache" in accepted or (anything and config is not None) else {}
    )
    if keep:
        kwargs[_KEEP] = keep
    if anything or "input_ids" in accepted:
        output = model(input_ids=input_ids, **kwargs)
    else:
        output = model(input_ids, **kwargs)
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, tuple) and output else output
    rows, length = input_ids.shape
    if keep and isinstance(logits, Tensor) and logits.shape[:2] == (rows, keep):
        return logits
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[0] != rows or logits.shape[1] < length:
        received = list(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ModelError(
            f"{type(model).__name__} returned {received} for input_ids of shape [{rows}, {length}]; a causal language "
            f"model returns logits [{rows}, {length}, vocabulary]. Load it with its language-modelling head "
            "(AutoModelForCausalLM)."
        )
    # Prompt tuning puts its virtual tokens in front.
    return logits if logits.shape[1] == length else logits[:, -length:]


def forward_marked(model: nn.Module, ids: Tensor, marks: Tensor, *, trim: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`forward_logits` from where the first marked token is predicted, with the tokens and marks of those positions.

    Args:
        model: a causal language model.
        ids: int64 `[R, L]`, padded on the right if at all.
        marks: bool `[R, L]`; some token is marked.
        trim: leave out the logits before the first mark of any row. Only for a model that `trims`.

    Returns:
        `(logits [R, K, V], ids [R, K], marks [R, K])`: the last K positions, all L of them without `trim`.
    """
    keep = ids.shape[1] + 1 - max(1, int(marks.any(0).nonzero()[0])) if trim else 0
    logits = forward_logits(model, ids, keep=keep)
    kept = logits.shape[1]
    return logits, ids[:, -kept:], marks[:, -kept:]


def check_ids(model: nn.Module, input_ids: Tensor) -> None:
    """Refuse token ids that the embedding has no row for.

    Args:
        model: the model.
        input_ids: int64, any shape, real tokens only.

    Raises:
        InputError: an id is negative or beyond the embedding.
    """
    weight = _embedding(model)
    if weight is None or weight.dim() != 2 or input_ids.numel() == 0:
        return
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= weight.shape[0]:
        raise InputError(
            f"token id {high if low >= 0 else low} is outside the model's vocabulary: its embedding has "
            f"{weight.shape[0]} rows (ids 0 to {weight.shape[0] - 1}). The tokenizer and the model do not belong "
            "together, or the embedding was not resized after tokens were added."
        )


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


_OBSERVED: list[nn.Module] = []


def is_observed(model: nn.Module) -> bool:
    """Whether a pass of gradent's own is running on the model."""
    inner = plain(model)
    return any(one is inner for one in _OBSERVED)


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
            warnings.warn(
                f"gradent has {type(model).__name__} form the logits of prompts too (as exact, but slower): with "
                f"logits_to_keep, {reason}.",
                GradentWarning,
                stacklevel=4,
            )
        known[names] = not reason
    return known.get(names, False)


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


@contextmanager
def observed(model: nn.Module, *, dropout: bool = False) -> Iterator[None]:
    """Run the model without leaving a trace: training flags and random state are as before, also after an exception.

    Args:
        model: the model; it is in eval mode inside, or in training mode with `dropout=True` (gradient checkpointing
            is then off, since it would hide layers from the measurement).
        dropout: keep dropout on.

    Yields:
        Nothing.
    """
    flags = [(module, module.training) for module in model.modules()]
    # transformers looks for padding in rows that come without a mask, to warn of it: a look at values, which vmap
    # cannot take, and a warning that would be wrong: padding on the right of a causal model needs no mask.
    warners = [
        (module, {_PADDING_WARNING: vars(module)[_PADDING_WARNING]} if _PADDING_WARNING in vars(module) else {})
        for module, _ in flags
        if hasattr(module, _PADDING_WARNING)
    ]
    checkpointed = [module for module, _ in flags if getattr(module, "gradient_checkpointing", False) is True]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"} - {None})
    cached = torch.is_autocast_cache_enabled()
    _OBSERVED.append(model)
    try:
        with torch.random.fork_rng(devices=devices):
            if any(training != dropout for _, training in flags):
                model.train(dropout)
            if dropout:
                for module in checkpointed:
                    module.gradient_checkpointing = False  # type: ignore[assignment]
            for module, _ in warners:
                setattr(module, _PADDING_WARNING, _no_warning)
            # A cached cast is one tensor for several uses: the uses could not be told apart in the graph.
            torch.set_autocast_cache_enabled(False)
            yield
    finally:
        _OBSERVED.remove(model)
        torch.set_autocast_cache_enabled(cached)
        for module, own in warners:
            vars(module).pop(_PADDING_WARNING, None)
            vars(module).update(own)
        for module, training in flags:
            if module.training != training:
                module.training = training
        if dropout:
            for module in checkpointed:
                module.gradient_checkpointing = True  # type: ignore[assignment]
