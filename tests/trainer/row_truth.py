"""The truth of a step whose rows are no pairs: float64 autograd, one row at a time, formulas written out once more."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gradent.record import GROUP_SOURCES
from gradent.trainer.records.row_step import RowStepRecord
from tests.truth import call


def row_gradients(model: nn.Module, record: RowStepRecord, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs `[N]` and their gradients `[N, P]` of a record's rows, of logits over a temperature; float64."""
    model = copy.deepcopy(model).double().eval()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    logps, rows = [], []
    assert record.batch is not None
    for row in range(len(record.rows)):
        ids, marks = record.batch.row(row)
        values = (call(model, ids[None])[0, :-1] / temperature).log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        logp = (values * marks[1:]).sum()
        grads = torch.autograd.grad(logp, parameters, allow_unused=True)
        parts = zip(parameters, grads, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in parts]))
        logps.append(logp.detach())
    return torch.stack(logps), torch.stack(rows)


def in_groups(weight: Tensor, group: Tensor, pushes: Tensor) -> dict[str, Tensor]:
    """Pushes `[N, N]` by source, row by row."""
    moved = {source: torch.zeros(len(weight), dtype=torch.float64) for source in GROUP_SOURCES}
    for row in range(len(weight)):
        for by in range(len(weight)):
            if row == by:
                source = "own"
            elif group[row] != group[by]:
                source = "other_groups"
            else:
                source = "positives" if weight[by] > 0 else "negatives"
            moved[source][row] += pushes[row, by]
    return moved


def assert_rows(
    record: RowStepRecord,
    before: nn.Module,
    grads: dict[str, Tensor],
    *,
    lr: float,
    temperature: float = 1.0,
    tolerance: float = 1e-5,
) -> None:
    """Fails unless products, log-probs, weights and what moved each row are those of a plain SGD step.

    Args:
        record: a step in which a row's tokens share one weight.
        before: the model before it.
        grads: the gradient that the optimizer got.
        lr: the learning rate; no momentum, no weight decay, no clipping.
        temperature: what the loss divides logits by.
        tolerance: largest error, in units of the rows' norms.
    """
    rows, weight = record.rows, record.rows.weight
    logps, gradients = row_gradients(before, record, temperature)
    norms = gradients.norm(dim=1)
    assert float(((rows.products - gradients @ gradients.T).abs() / torch.outer(norms, norms)).max()) <= tolerance
    torch.testing.assert_close(rows.logp, logps, rtol=tolerance, atol=tolerance)
    assert weight is not None and weight.shape == logps.shape and bool((weight != 0).all())
    trained = [name for name, parameter in before.named_parameters() if parameter.requires_grad]
    given = dict(before.named_parameters())
    theirs = torch.cat([grads.get(name, torch.zeros_like(given[name])).double().flatten() for name in trained])
    assert float((weight @ gradients + theirs).norm() / theirs.norm()) <= tolerance, "weights are not the loss's"
    assert record.attribution is not None and record.attribution.is_whole and rows.moved is not None
    assert list(rows.moved) == list(GROUP_SOURCES)
    want = in_groups(weight, rows.group, lr * (gradients @ gradients.T) * weight)
    limit = tolerance * lr * norms * (weight.abs() * norms).sum()
    for source, values in want.items():
        off = (rows.moved[source] - values).abs()
        assert bool((off <= limit).all()), f"{source}: {float((off / limit).max()):.1f} times the tolerance"


def texts(record: RowStepRecord, tokenizer: object) -> list[tuple[str, str]]:
    """Prompt and response of each row, without special tokens."""
    found: list[tuple[str, str]] = []
    assert record.batch is not None
    for row in range(len(record.rows)):
        ids, marks = record.batch.row(row)
        parts = ids[~marks.bool()], ids[marks.bool()]
        prompt, response = (tokenizer.decode(part, skip_special_tokens=True) for part in parts)  # type: ignore[attr-defined]
        found.append((prompt, response))
    return found


def names_of(logs: Sequence[dict[str, float]]) -> set[str]:
    """The `gradent/` names in a trainer's log history."""
    return {key for entry in logs for key in entry if "gradent" in key}
