"""The second opinion: per-sample gradients of the whole model by `torch.func`, two rows at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from gradent.errors import GradentWarning
from gradent.hooks.passes.microbatch import Outcome
from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.uses.formats import Explicit
from gradent.kernels.common.cost import DEFAULT_BUDGET
from gradent.model.calls import forward_logits
from gradent.model.facts import check_causal, ignores_padding
from gradent.model.logprobs import check_logps
from gradent.model.observed import observed

__all__ = ["parameters_kept", "per_sample_pairs"]

Row = tuple[Tensor, Tensor]
Way = Callable[[nn.Module, Mapping[str, Tensor], Sequence[Row]], tuple[dict[str, Sequence[Tensor]], Tensor]]
"""The two rows' gradients by parameter name, and their log-probs `[2]`."""


def per_sample_pairs(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    rows: Sequence[Row],
    *,
    weight: Callable[[int], Tensor] | None,
    dropout: bool,
) -> list[tuple[list[int], Outcome]]:
    """Measure every pair by `vmap(grad)`, one pair at a time; memory: two gradients of the whole model.

    Where vmap cannot run the model (data-dependent control flow, as in mixtures of experts), `torch.func.grad` runs it
    a row at a time, and where that cannot either (old-style autograd functions), plain autograd does; each step down is
    announced once.

    Args:
        model: the model, in the mode in which it is to be measured.
        parameters: its trainable parameters by name.
        rows: `(ids int64 [T], marks bool [T])` of 2B rows, on the model's device.
        weight: parameter number -> square root of the metric's diagonal, or None.
        dropout: the model is in training mode; rows then draw different random numbers.

    Returns:
        `(pair numbers, outcome)` of each pair.

    Raises:
        NotCausalError: a later token changes an earlier prediction.
        NonFiniteError: a log-prob is nan or infinite.
    """
    half = len(rows) // 2
    with observed(model):
        check_causal(model, rows[0][0])
        padded = ignores_padding(model, rows[0][0]) and not _counts_tokens(model)
    ways: list[tuple[str, Way]] = [
        ("with torch.func's grad, a row at a time", _row_by_row),
        ("with plain autograd, a row at a time", _plainly),
    ]
    if padded:
        ways.insert(0, ("with torch.func's vmap(grad)", _Mapped("different" if dropout else "error")))
    outcomes = []
    for pair in range(half):
        two = [rows[pair], rows[half + pair]]
        with parameters_kept(model):
            grads, logps = _first_that_runs(ways, model, parameters, two)
        check_logps(logps, [pair, pair], [True, False])
        ledger = Ledger(1, budget=DEFAULT_BUDGET, weight=weight)
        for number, name in enumerate(parameters):
            for row in (0, 1):
                grad = grads[name][row]
                ledger.add(number, row, (), Explicit(grad.to_dense() if grad.is_sparse else grad))
            ledger.finish(number)
        ledger.close()
        outcomes.append(([pair], Outcome(ledger.entries, logps.detach().double().cpu(), {})))
    return outcomes


def _first_that_runs(
    ways: list[tuple[str, Way]], model: nn.Module, parameters: Mapping[str, Tensor], two: Sequence[Row]
) -> tuple[dict[str, Sequence[Tensor]], Tensor]:
    """The result of the first way that can run the model; those before it are dropped, with a warning."""
    while len(ways) > 1:
        try:
            return ways[0][1](model, parameters, two)
        except (RuntimeError, NotImplementedError, ValueError, IndexError, TypeError) as error:
            failed, _ = ways.pop(0)
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"gradent's engine='func' cannot run this model {failed}, and goes on {ways[0][0]}: "
                f"{type(error).__name__}: {reason}",
                GradentWarning,
                stacklevel=4,
            )
    return ways[0][1](model, parameters, two)


class _Mapped:
    """Both rows at once, by `vmap(grad)`."""

    def __init__(self, randomness: str) -> None:
        self._map = vmap(grad_and_value(_logp, argnums=1), in_dims=(None, None, 0, 0), randomness=randomness)

    def __call__(
        self, model: nn.Module, parameters: Mapping[str, Tensor], two: Sequence[Row]
    ) -> tuple[dict[str, Sequence[Tensor]], Tensor]:
        longest = max(len(ids) for ids, _ in two)
        ids, marks = (
            torch.stack([nn.functional.pad(row[part], (0, longest - len(row[part]))) for row in two]) for part in (0, 1)
        )
        with warnings.catch_warnings():
            # vmap loops where it has no batching rule, and says so at every operator.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            grads, logps = self._map(model, _detached(parameters), ids, marks)
        return grads, logps


def _row_by_row(
    model: nn.Module, parameters: Mapping[str, Tensor], two: Sequence[Row]
) -> tuple[dict[str, Sequence[Tensor]], Tensor]:
    """A row at a time, by `torch.func.grad`."""
    found = [grad_and_value(_logp, argnums=1)(model, _detached(parameters), *row) for row in two]
    return {name: [grads[name] for grads, _ in found] for name in parameters}, torch.stack([logp for _, logp in found])


def _plainly(
    model: nn.Module, parameters: Mapping[str, Tensor], two: Sequence[Row]
) -> tuple[dict[str, Sequence[Tensor]], Tensor]:
    """A row at a time, by plain autograd."""
    tensors, grads, logps = list(parameters.values()), [], []
    for ids, marks in two:
        logp = _score(forward_logits(model, ids[None])[0], ids, marks)
        found = torch.autograd.grad(logp, tensors, allow_unused=True)
        grads.append([torch.zeros_like(p) if g is None else g for p, g in zip(tensors, found, strict=True)])
        logps.append(logp.detach())
    return dict(zip(parameters, zip(*grads, strict=True), strict=True)), torch.stack(logps)


def _logp(model: nn.Module, parameters: Mapping[str, Tensor], ids: Tensor, marks: Tensor) -> Tensor:
    """Summed completion log-prob of one row as a function of the parameters."""
    logits = functional_call(_Logits(model), {f"model.{name}": tensor for name, tensor in parameters.items()}, (ids,))
    return _score(logits, ids, marks)


def _score(logits: Tensor, ids: Tensor, marks: Tensor) -> Tensor:
    """`Σ log π(y_t)` over the marked tokens, in plain differentiable torch; logits `[T, V]`."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scores = torch.log_softmax(logits[:-1].to(wide), -1)
    return (scores.gather(1, ids[1:, None])[:, 0] * marks[1:]).sum()


def _detached(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in parameters.items()}


def _counts_tokens(model: nn.Module) -> bool:
    """Whether an embedding divides its gradient by how often a token occurs, padding included."""
    return any(getattr(module, "scale_grad_by_freq", False) for module in model.modules())


@contextmanager
def parameters_kept(model: nn.Module) -> Iterator[None]:
    """Put every parameter back where it was: `functional_call` mixes up those that several modules share.

    Args:
        model: the model.

    Yields:
        Nothing.
    """
    kept = [(module, dict(module._parameters)) for module in model.modules()]  # noqa: SLF001
    try:
        yield
    finally:
        for module, own in kept:
            module._parameters.update(own)  # noqa: SLF001


class _Logits(nn.Module):
    """The model as a function of one row of ids, so that `functional_call` can swap its parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return forward_logits(self.model, ids[None])[0]
