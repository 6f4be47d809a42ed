"""The second opinion: per-sample gradients of the whole model by `torch.func`, two rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from gradent.hooks.passes.driver import RowsOutcome
from gradent.hooks.passes.microbatch import Outcome, Row
from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.uses.formats import Materialized
from gradent.kernels.common.numerics import accumulator, spans
from gradent.kernels.common.wanted import Wanted
from gradent.model.autograd import quiet_vmap, row_gradients, with_parameters
from gradent.model.calls import forward_logits
from gradent.model.facts import check_causal, ignores_padding
from gradent.model.logprobs import check_rows
from gradent.model.observed import observed
from gradent.notices import warn

__all__ = ["per_sample_rows"]

Way = Callable[[nn.Module, Mapping[str, Tensor], Sequence[Row]], tuple[dict[str, Sequence[Tensor]], Tensor]]
"""The rows' gradients by parameter name, and their log-probs `[R]`."""


def per_sample_rows(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    rows: Sequence[Row],
    groups: Sequence[Sequence[int]],
    names: Sequence[str],
    make_ledger: Callable[[Wanted], Ledger],
    *,
    dropout: bool,
) -> list[RowsOutcome]:
    """`(row numbers, outcome)` of each group, by `vmap(grad)` of two rows at a time.

    A gradient of the whole model is held for each row of a group. Where vmap cannot run the model (data-dependent
    control flow, as in mixtures of experts), `torch.func.grad` runs it a row at a time, and where that cannot either
    (old-style autograd functions), plain autograd does; each step down is announced once. With `dropout`, rows draw
    different random numbers. Raises NotCausalError and NonFiniteError.
    """
    with observed(model):
        check_causal(model, rows[0][0])
        is_padded = ignores_padding(model, rows[0][0]) and not _counts_tokens(model)
    mapped: Way = partial(_mapped, randomness="different" if dropout else "error")
    ways: list[tuple[str, Way]] = [
        ("with torch.func's vmap(grad)", mapped),
        ("with torch.func's grad, a row at a time", _row_by_row),
        ("with plain autograd, a row at a time", _plainly),
    ][0 if is_padded else 1 :]
    outcomes = []
    for group in groups:
        ledger, logps = make_ledger(Wanted.all(len(group))), torch.zeros(len(group), dtype=torch.float64)
        for span in spans(len(group), 2):
            numbers = list(group)[span]
            grads, found = _first_that_runs(ways, model, parameters, [rows[row] for row in numbers])
            check_rows(found, [names[row] for row in numbers])
            logps[span] = found.detach().double().cpu()
            for number, name in enumerate(parameters):
                for row, grad in zip(range(span.start, span.stop), grads[name], strict=True):
                    ledger.add(number, row, (), Materialized(grad.to_dense() if grad.is_sparse else grad))
        for number in range(len(parameters)):
            ledger.finish(number)
        ledger.close()
        outcomes.append((list(group), Outcome(ledger.entries, logps, ledger.wanted)))
    return outcomes


def _first_that_runs(
    ways: list[tuple[str, Way]], model: nn.Module, parameters: Mapping[str, Tensor], rows: Sequence[Row]
) -> tuple[dict[str, Sequence[Tensor]], Tensor]:
    """The result of the first way that can run the model; those before it are dropped, with a warning."""
    while len(ways) > 1:
        try:
            return ways[0][1](model, parameters, rows)
        except (RuntimeError, NotImplementedError, ValueError, IndexError, TypeError) as error:
            failed, _ = ways.pop(0)
            reason = str(error).strip().partition("\n")[0]
            warn(
                f"gradent's engine='func' cannot run this model {failed}, and goes on {ways[0][0]}: "
                f"{type(error).__name__}: {reason}",
                stacklevel=5,
            )
    return ways[0][1](model, parameters, rows)


def _mapped(
    model: nn.Module, parameters: Mapping[str, Tensor], rows: Sequence[Row], *, randomness: str
) -> tuple[dict[str, Sequence[Tensor]], Tensor]:
    """Two rows at once, by `vmap(grad)`."""
    ids, marks = (nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*rows, strict=True))
    differentiate = vmap(grad_and_value(_logp, argnums=1), in_dims=(None, None, 0, 0), randomness=randomness)
    with quiet_vmap():  # vmap loops where it has no batching rule, and says so at every operator
        grads, logps = differentiate(model, _detached(parameters), ids, marks)
    return grads, logps


def _row_by_row(
    model: nn.Module, parameters: Mapping[str, Tensor], rows: Sequence[Row]
) -> tuple[dict[str, Sequence[Tensor]], Tensor]:
    """A row at a time, by `torch.func.grad`."""
    found = [grad_and_value(_logp, argnums=1)(model, _detached(parameters), *row) for row in rows]
    return {name: [grads[name] for grads, _ in found] for name in parameters}, torch.stack([logp for _, logp in found])


def _plainly(
    model: nn.Module, parameters: Mapping[str, Tensor], rows: Sequence[Row]
) -> tuple[dict[str, Sequence[Tensor]], Tensor]:
    """A row at a time, by plain autograd."""
    tensors, grads, logps = list(parameters.values()), [], []
    for ids, marks in rows:
        logp = _score(forward_logits(model, ids[None])[0], ids, marks)
        row_grads = row_gradients(logp, tensors)
        grads.append([torch.zeros_like(p) if g is None else g for p, g in zip(tensors, row_grads, strict=True)])
        logps.append(logp.detach())
    return dict(zip(parameters, zip(*grads, strict=True), strict=True)), torch.stack(logps)


def _logp(model: nn.Module, parameters: Mapping[str, Tensor], ids: Tensor, marks: Tensor) -> Tensor:
    """Summed completion log-prob of one row as a function of the parameters."""
    logits = with_parameters(model, parameters, lambda swapped: forward_logits(swapped, ids[None])[0])
    return _score(logits, ids, marks)


def _score(logits: Tensor, ids: Tensor, marks: Tensor) -> Tensor:
    """`Σ log π(y_t)` over the marked tokens, in plain differentiable torch; logits `[T, V]`."""
    scores = torch.log_softmax(logits[:-1].to(accumulator(logits.dtype)), -1)
    return (scores.gather(1, ids[1:, None])[:, 0] * marks[1:]).sum()


def _detached(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in parameters.items()}


def _counts_tokens(model: nn.Module) -> bool:
    """Whether an embedding divides its gradient by how often a token occurs, padding included."""
    return any(getattr(module, "scale_grad_by_freq", False) for module in model.modules())
