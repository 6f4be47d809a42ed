"""The direction v along which tokens' effects are taken: a row's gradient, the optimizer's next step, the user's."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradent import notices
from gradent.errors import InputError, NonFiniteError
from gradent.kernels.common.numerics import accumulator, spans
from gradent.kernels.common.precision import exactly
from gradent.model.autograd import row_gradients
from gradent.model.calls import forward_marked
from gradent.model.logprobs import check_rows, sequence_logprobs

__all__ = ["OWN", "check_toward", "dot", "given_vector", "planned_step", "row_gradient"]

OWN = ("rejected", "chosen", "margin")
"""The directions that each pair has of its own: `g_l`, `g_w` and `g_w - g_l`."""

_ACCEPTED = (
    "accepted are 'rejected', 'chosen', 'margin' (gradients of each token's own pair), 'step' with optimizer=, a "
    "mapping {parameter name: tensor of its shape}, or one flat tensor over the trainable parameters"
)

_WINDOW = {"cpu": 2**14, "cuda": 2**26}
"""Elements whose products are summed at once: so few that float32 loses nothing that matters; in float64 on a GPU."""


def row_gradient(
    model: nn.Module, parameters: Mapping[str, Tensor], row: tuple[Tensor, Tensor], name: str, *, trim: bool
) -> tuple[dict[str, Tensor], float]:
    """`∇_θ log π(y|x)` of a named row by parameter, without those that it does not depend on, and its norm."""
    ids, marks = row
    logp = sequence_logprobs(*forward_marked(model, ids[None], marks[None], trim=trim))
    check_rows(logp, [name])
    gradients = row_gradients(logp.sum(), list(parameters.values()))
    grads = {name: grad for name, grad in zip(parameters, gradients, strict=True) if grad is not None}
    squares = dot(grads, grads)
    for parameter, square in squares.items():
        if not math.isfinite(square):
            raise NonFiniteError(
                f"non-finite gradient: {name} has a nan or inf in the gradient of {parameter!r}. Try a wider dtype "
                "(bfloat16 or float32 instead of float16), or check the checkpoint for nan."
            )
    return grads, math.sqrt(sum(squares.values()))


def check_toward(toward: object, optimizer: object) -> None:
    """Refuse an unknown `toward`, "step" without an optimizer, and an optimizer without "step"."""
    if not isinstance(toward, (str, Mapping, Tensor)):
        raise InputError(f"token_effects: toward is a {type(toward).__name__}; {_ACCEPTED}.")
    if isinstance(toward, str) and toward not in (*OWN, "step"):
        raise InputError(f"token_effects: toward={toward!r} is unknown; {_ACCEPTED}.")
    is_step = isinstance(toward, str) and toward == "step"
    if is_step and optimizer is None:
        raise InputError(
            "token_effects: toward='step' needs the optimizer whose step is meant. Pass optimizer=, after "
            "loss.backward() and before optimizer.step()."
        )
    if optimizer is not None and not is_step:
        received = repr(toward) if isinstance(toward, str) else f"a {type(toward).__name__}"
        raise InputError(
            f"token_effects: optimizer= goes with toward='step' alone; received toward={received}. Pass "
            "toward='step', or leave optimizer= out."
        )


def given_vector(toward: Mapping[str, Tensor] | Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The user's vector by parameter, from `{name: tensor}` or one flat tensor over all trainable elements."""
    if isinstance(toward, Tensor):
        total = sum(parameter.numel() for parameter in parameters.values())
        if toward.shape != (total,):
            raise InputError(
                f"token_effects: toward has shape {list(toward.shape)}; a flat vector has shape [{total}]: every "
                "trainable element, in the order of model.named_parameters(). To give some parameters only, pass "
                "{name: tensor}."
            )
        parts = torch.split(toward, [parameter.numel() for parameter in parameters.values()])
        vector = {name: part.view(p.shape) for (name, p), part in zip(parameters.items(), parts, strict=True)}
    else:
        vector = dict(toward)
    unknown = [name for name in vector if name not in parameters]
    if unknown:
        raise InputError(
            f"token_effects: toward names {_listed(unknown)}: no trainable parameter of the model. Accepted are the "
            f"names of its trainable parameters, a tied one under its first name: {_listed(list(parameters))}."
        )
    for name, part in vector.items():
        if not isinstance(part, Tensor) or part.shape != parameters[name].shape or not part.is_floating_point():
            is_tensor = isinstance(part, Tensor)
            received = f"{part.dtype} {list(part.shape)}" if is_tensor else type(part).__name__
            raise InputError(
                f"token_effects: toward[{name!r}] is {received}; accepted is a floating-point tensor of the "
                f"parameter's shape {list(parameters[name].shape)}."
            )
    return {name: part.detach() for name, part in vector.items()}


@torch.no_grad()
def planned_step(optimizer: object, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`θ_after - θ_before` by parameter, from stepping a copy of the optimizer on the parameters' `.grad`s."""
    if type(optimizer).__name__ == "AcceleratedOptimizer":  # any other wrapper may have a step of its own
        optimizer = getattr(optimizer, "optimizer", None)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            f"token_effects: optimizer is a {type(optimizer).__name__}; accepted is a torch.optim.Optimizer over the "
            "model's trainable parameters."
        )
    held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    names = {id(tensor): name for name, tensor in parameters.items()}
    trained = [tensor for tensor in held if id(tensor) in names]
    if not trained:
        raise InputError(
            f"token_effects: none of the optimizer's {len(held)} parameters is a trainable parameter of this model, "
            f"which has {len(parameters)}. Pass the optimizer that was made over this very model (after adapters were "
            "added, if any)."
        )
    if all(tensor.grad is None for tensor in trained):
        raise InputError(
            f"token_effects: none of the {len(trained)} parameters that the optimizer holds has a .grad, so it has no "
            "step to take. Call loss.backward() first, and measure before optimizer.zero_grad()."
        )
    hooks = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)  # noqa: SLF001
    if hooks:
        notices.warn(
            f"gradent.token_effects steps a copy of the optimizer, without its {hooks} step hooks: they belong to the "
            "original, and may act on more than it. What they would change of the step is missing.",
            stacklevel=6,
        )
    stepped = _stepped(optimizer)
    return {
        names[id(before)]: after - before for before, after in zip(held, stepped, strict=True) if id(before) in names
    }


def _stepped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The optimizer's parameters after its step, in the order of its groups, computed on a copy."""
    kind = type(optimizer).__name__
    try:
        memo: dict[int, object] = {}
        twin = copy.deepcopy(optimizer, memo)
        # torch copies groups and state alone. Schedulers put a `step` on the instance that steps the original: it,
        # like every hook, stays behind.
        for name, value in vars(optimizer).items():
            if name not in vars(twin) and not callable(value):
                setattr(twin, name, copy.deepcopy(value, memo))
        for group, twins in zip(optimizer.param_groups, twin.param_groups, strict=True):
            for tensor, other in zip(group["params"], twins["params"], strict=True):
                other.grad = None if tensor.grad is None else tensor.grad.detach().clone()
        with torch.enable_grad():  # as in training
            twin.step()
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, AssertionError) as error:
        raise InputError(
            f"token_effects: a copy of the optimizer ({kind}) cannot be stepped: {type(error).__name__}: {error}. "
            "Accepted is an optimizer whose step() needs nothing but the .grads. For another, compute its update "
            "yourself and pass it as toward={name: tensor}."
        ) from error
    return [tensor for group in twin.param_groups for tensor in group["params"]]


def dot(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, float]:
    """`⟨left, right⟩` of every parameter that both have, in windows whose sums are added in float64."""
    products = {}
    for name in filter(right.__contains__, left):
        flat = left[name].flatten()
        products[name] = _dot(flat, flat if right[name] is left[name] else right[name].flatten())
    return products


@exactly
def _dot(left: Tensor, right: Tensor) -> float:
    right = right.to(left.device)
    total = torch.zeros((), dtype=torch.float64, device=left.device)
    wide = accumulator(torch.promote_types(left.dtype, right.dtype)) if left.device.type == "cpu" else torch.float64
    for span in spans(len(left), _WINDOW.get(left.device.type, _WINDOW["cuda"])):
        part = left[span].to(wide)
        total += part @ (part if left is right else right[span].to(wide))
    return float(total)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(map(repr, names[:4])) + more
