"""A model's parameters: which are trainable, where the embeddings are, and which token ids they take."""

from __future__ import annotations

from torch import Tensor, device, nn

from gradent.errors import InputError, ModelError, NothingTrainableError
from gradent.model.sharding import sharding

__all__ = [
    "NO_DOUBLE", "check_ids", "compiled_modules", "device_without_double", "input_device", "output_embeddings",
    "trainable", "unwrap_compiled",
]  # fmt: skip


WITHOUT_DOUBLE = {"mps"}
"""Kinds of devices that refuse float64."""


def unwrap_compiled(model: nn.Module) -> nn.Module:
    """The module behind `torch.compile`'s wrapper; any other model as it is."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def compiled_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that `module.compile()` was called on: theirs is a compiled call, not a wrapper."""
    return [module for module in model.modules() if getattr(module, "_compiled_call_impl", None) is not None]


def trainable(model: nn.Module, *, sharded: bool = False) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, each once, under its first name; sharded ones are refused unless accepted."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise NothingTrainableError(
            f"{type(model).__name__} has no trainable parameter: every parameter has requires_grad=False. gradent "
            "measures gradients over the trainable ones. For full fine-tuning call model.requires_grad_(True); for a "
            "PEFT adapter load it with PeftModel.from_pretrained(..., is_trainable=True)."
        )
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise ModelError(
                f"parameter {name!r} is on the meta device; a measurement needs the whole parameter where the model "
                "computes. Load the model without offloading."
            )
    kind = None if sharded else sharding(model)
    if kind is not None:
        raise ModelError(
            f"the parameters are sharded ({kind}); a measurement needs each whole where the model computes. Measure a "
            "checkpoint of the run instead (gradent audit, gradent.measure), loaded without it; inside the run, "
            "EntanglementCallback and attach read FSDP2 and ZeRO-3 off the run's own backward."
        )
    return parameters


def input_device(model: nn.Module) -> device:
    """Where the model takes its token ids: the device of its input embedding, or of its first parameter."""
    weight = _embedding_weight(model)
    return (next(model.parameters()) if weight is None else weight).device


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The model's head, if the model says which module that is."""
    head = _call_getter(model, "get_output_embeddings")
    return head if isinstance(head, nn.Module) else None


def check_ids(model: nn.Module, input_ids: Tensor) -> None:
    """Refuse token ids, int64 of any shape, that the embedding has no row for."""
    weight = _embedding_weight(model)
    if weight is None or weight.dim() != 2 or input_ids.numel() == 0:
        return
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= weight.shape[0]:
        raise InputError(
            f"token id {high if low >= 0 else low} is outside the model's vocabulary: its embedding has "
            f"{weight.shape[0]} rows (ids 0 to {weight.shape[0] - 1}). The tokenizer and the model do not belong "
            "together, or the embedding was not resized after tokens were added."
        )


def _embedding_weight(model: nn.Module) -> Tensor | None:
    weight = getattr(_call_getter(model, "get_input_embeddings"), "weight", None)
    return weight if isinstance(weight, Tensor) else None


def _call_getter(model: nn.Module, getter: str) -> object:
    """The result of one of transformers' getters; None if the model has no such part."""
    get = getattr(model, getter, None)
    if get is None:
        return None
    try:
        return get()
    except (NotImplementedError, AttributeError):  # transformers raises these for models without a plain embedding
        return None


NO_DOUBLE = (
    "gradent sums in float64, which this device ({device}) does not have, and measures nothing on it. Train as before, "
    "and run gradent audit on the checkpoints on a CPU."
)
"""What is said of devices without float64."""


def device_without_double(model: nn.Module) -> str | None:
    """The kind of a trainable parameter's device that has no float64 (Apple's MPS); None where all have."""
    kinds = {parameter.device.type for parameter in model.parameters() if parameter.requires_grad}
    return next((kind for kind in sorted(kinds) if kind in WITHOUT_DOUBLE), None)
