"""Talking to a model: what to call it with, what it returns, and leaving it as it was found."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gradent.errors import InputError, ModelError, NothingTrainableError

__all__ = [
    "check_ids",
    "forward_logits",
    "forward_marked",
    "input_device",
    "is_observed",
    "is_sharded",
    "observed",
    "output_embeddings",
    "plain",
    "takes_keep",
    "trainable",
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
    weight = getattr(_part(model, "get_input_embeddings"), "weight", None)
    return weight if isinstance(weight, Tensor) else None


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The model's head, where it says which module that is."""
    head = _part(model, "get_output_embeddings")
    return head if isinstance(head, nn.Module) else None


def _part(model: nn.Module, getter: str) -> object:
    """What a transformers model gives of itself by that name; None where there is no such part."""
    get = getattr(model, getter, None)
    if get is None:
        return None
    try:
        return get()
    except (NotImplementedError, AttributeError):  # transformers raises these for models without a plain embedding
        return None


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
    with _folding(model) if keep else nullcontext():
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


@contextmanager
def _folding(model: nn.Module) -> Iterator[None]:
    """Give the head a contiguous input: of a slice of positions, torch multiplies a frozen head row by row.

    Those smaller products took up to 1.7 times as long on a CPU (8 rows, vocabulary 8192, width 256).
    """
    head = output_embeddings(model)
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _, args: _contiguous(args))
    try:
        yield
    finally:
        handle.remove()


def _contiguous(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(one.contiguous() if isinstance(one, Tensor) else one for one in args)


def forward_marked(model: nn.Module, ids: Tensor, marks: Tensor, *, trim: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`forward_logits` from where the first marked token is predicted, with the tokens and marks of those positions.

    Args:
        model: a causal language model.
        ids: int64 `[R, L]`, padded on the right if at all.
        marks: bool `[R, L]`; some token is marked.
        trim: leave out the logits before the first mark of any row. Only for a model that `traits.trims`.

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


_OBSERVED: list[nn.Module] = []


def is_observed(model: nn.Module) -> bool:
    """Whether a pass of gradent's own is running on the model."""
    inner = plain(model)
    return any(one is inner for one in _OBSERVED)


def _lookup(module: nn.Module, name: str) -> Any:
    """An attribute that is no parameter, buffer or module, or None: `getattr` takes ten times as long to find none."""
    found = vars(module).get(name, getattr(type(module), name, None))
    return getattr(module, name, None) if isinstance(found, property) else found


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
        if _lookup(module, _PADDING_WARNING) is not None
    ]
    checkpointed = [module for module, _ in flags if _lookup(module, "gradient_checkpointing") is True]
    # Nothing is on a GPU that was never woken.
    tensors = model.parameters() if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    devices = sorted({p.device.index for p in tensors if p.device.type == "cuda"} - {None})
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
