"""What wraps a model or takes its parameters apart: FSDP, ZeRO-3, tensor parallelism, nn.DataParallel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["find_owners", "is_released", "is_sharded", "sharding", "unwatchable", "whole_shape"]


def sharding(model: nn.Module) -> str | None:
    """What spreads the model's parameters over ranks, by name; None where each is whole wherever it is looked at."""
    parameters = list(model.parameters())
    if any(hasattr(parameter, "device_mesh") for parameter in parameters):
        return "FSDP2" if any(_is_a(module, "FSDPModule") for module in model.modules()) else "tensor parallelism"
    if any(_is_zero3(parameter) for parameter in parameters):
        return "DeepSpeed ZeRO-3"
    return "FSDP 1" if _has_flat_parameters(model) else None


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's parameters are spread over ranks, each whole only while its module runs."""
    return sharding(model) is not None


def unwatchable(model: nn.Module) -> str | None:
    """Why neither forwards nor backwards of the model can be watched, and what would work; None where they can."""
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        return REPLICAS
    if _has_flat_parameters(model):
        return (
            "FSDP 1 computes with views of flat parameters, of which no operator shows which are whose. FSDP 2 "
            "(fsdp_version: 2 in accelerate's configuration; fully_shard) is read off, and so is DDP"
        )
    return None


REPLICAS = (
    "nn.DataParallel runs copies of the model in threads, whose rows gradent cannot put together. Start one process a "
    "GPU (accelerate launch, torchrun), or show the run one GPU (CUDA_VISIBLE_DEVICES=0)"
)
"""Why a replica's forward is not watched."""


def is_released(parameter: Tensor) -> bool:
    """Whether a parameter is an empty placeholder just now, as ZeRO-3 leaves it until its module runs."""
    return parameter.numel() == 0 and whole_shape(parameter).numel() > 0


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape that a parameter has while it is computed with."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def find_owners(model: nn.Module, parameters: Sequence[Tensor]) -> dict[nn.Module, dict[str, int]]:
    """The modules that hold FSDP2's shards: `{module: {attribute: number}}`, empty where there are none."""
    numbers = {
        id(parameter): number for number, parameter in enumerate(parameters) if hasattr(parameter, "device_mesh")
    }
    owners: dict[nn.Module, dict[str, int]] = {}
    for module in model.modules() if numbers else ():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in numbers:
                owners.setdefault(module, {})[name] = numbers[id(parameter)]
    return owners


def _has_flat_parameters(model: nn.Module) -> bool:
    """Whether FSDP 1 has the model, or a part of it: as a wrapper outside, inside, or at a module of its own."""
    modules = list(model.modules())
    if any(_is_a(module, "FullyShardedDataParallel") for module in modules):
        return True
    # FSDP 2 marks modules for the compiler too; its own class is mixed into those that it was called on.
    is_marked = any(getattr(module, "_is_fsdp_managed_module", False) for module in modules)
    return is_marked and not any(_is_a(module, "FSDPModule") for module in modules)


def _is_zero3(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id") and hasattr(parameter, "ds_status")


def _is_a(module: nn.Module, name: str) -> bool:
    """Whether a module's class is, or inherits, one of torch's of this name, which need not be imported for it."""
    return any(kind.__name__ == name and kind.__module__.startswith("torch.") for kind in type(module).__mro__)
