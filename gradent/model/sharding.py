"""Sharded models (FSDP2): a parameter is whole only while its module runs, and is another tensor then."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["find_owners"]


def find_owners(model: nn.Module, parameters: Sequence[Tensor]) -> dict[nn.Module, dict[str, int]]:
    """The modules that hold sharded parameters: `{module: {attribute: number}}`, empty where nothing is sharded."""
    numbers = {
        id(parameter): number for number, parameter in enumerate(parameters) if hasattr(parameter, "device_mesh")
    }
    owners: dict[nn.Module, dict[str, int]] = {}
    for module in model.modules() if numbers else ():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in numbers:
                owners.setdefault(module, {})[name] = numbers[id(parameter)]
    return owners
