"""Checkpointed regions: telling which one an operator runs in, in the forward pass and when it is computed again.

Non-reentrant checkpointing keeps the graph of the first forward but none of its activations; the backward pass
computes them again just before they are needed. Whoever holds an activation meanwhile undoes the saving. torch has no
public name for "inside a checkpointed region"; what it does have are the hooks that pack saved tensors, whose closures
hold the region's frame. Where they look unlike what is expected here, an operator counts as outside of every region.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["current_region", "in_backward", "packs_tensors"]

_MODULE = "torch.utils.checkpoint"


def in_backward() -> bool:
    """Whether this thread runs a part of a backward pass."""
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001  (torch has no public name for it)


def packs_tensors() -> bool:
    """Whether saved tensors are packed, by checkpointing or offloading."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # noqa: SLF001  (as above)


def current_region() -> Any:
    """The frame of the checkpointed region that runs, the same in both of its forwards; None outside."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)  # noqa: SLF001  (as above)
    if hooks is None:
        return None
    pack = inspect.unwrap(hooks[0])
    if getattr(pack, "__module__", None) != _MODULE:
        return None
    variables = _closure(pack)
    if "frame" in variables:
        return variables["frame"]
    reference = variables.get("target_frame_ref")
    return reference() if callable(reference) else None


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None:
        return {}
    variables = {}
    for name, cell in zip(code.co_freevars, cells, strict=True):
        try:
            variables[name] = cell.cell_contents
        except ValueError:  # an empty cell
            continue
    return variables
