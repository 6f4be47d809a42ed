"""Records against plain autograd in float64, on the weights and the rows of the same step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scripts.clients.tiny import PAIRS
from scripts.clients.watch import Step

__all__ = ["Truth", "compare_pairs", "compare_rewards", "compare_rows", "told_pair"]

Row = tuple[Tensor, Tensor]


class Truth:
    """Gradients of log-probs under a step's weights, one row at a time, unpadded."""

    def __init__(self, model: nn.Module, step: Step) -> None:
        table = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in step.weights.items():
                table[name].copy_(weight)
        for name, part in table.items():
            part.requires_grad_(name in step.weights)
        self._model, self._parts = model, [table[name] for name in step.weights]
        self.gradient = torch.cat([step.grads[name].double().flatten() for name in step.weights])

    def row(self, row: Row) -> tuple[float, Tensor]:
        """Log-prob of a row's marked tokens, and its gradient `[P]`."""
        ids, marks = row
        logits = self._model(input_ids=ids[None])
        logits = (logits[0] if isinstance(logits, tuple) else logits.logits)[0].double()
        logps = logits[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        return self._differentiate((logps * marks[1:]).sum())

    def reward(self, ids: Tensor) -> tuple[float, Tensor]:
        """Reward of a row, and its gradient `[P]`: of a score a row, or of a value a token, the last one's."""
        found = self._model(input_ids=ids[None])
        values = found[2] if isinstance(found, tuple) else found.logits
        return self._differentiate(values.flatten()[-1].double())

    def _differentiate(self, logp: Tensor) -> tuple[float, Tensor]:
        parts = torch.autograd.grad(logp, self._parts, allow_unused=True)
        flat = [torch.zeros_like(part) if each is None else each for each, part in zip(parts, self._parts, strict=True)]
        return float(logp), torch.cat([part.flatten() for part in flat])

    def off_step(self, combined: Tensor) -> float:
        """How far a gradient is from the one that the optimizer got, relative to the latter."""
        return float((combined - self.gradient).norm() / self.gradient.norm())


def told_pair(tokenizer: Any, row: Row, *, is_whole: bool = False) -> tuple[int, str] | None:
    """Which pair of the data a row's response is of, and which side; None where it is none's.

    Args:
        tokenizer: of the model.
        row: token ids, and marks of the response.
        is_whole: the marks are of the prompt as well.

    Returns:
        Number and side.
    """
    text = tokenizer.decode(row[0][row[1].bool()], skip_special_tokens=True).strip()
    for number, pair in enumerate(PAIRS):
        for side in ("chosen", "rejected"):
            if text.endswith(pair[side]) and (is_whole or len(text) < len(pair[side]) + 24):
                return number, side
    return None


def compare_pairs(truth: Truth, record: Any, tokenizer: Any, micro_batches: int, per_batch: int) -> dict[str, Any]:
    """What a `StepRecord` says, beside what is so: scaled errors, and whether the pairs are those of the data.

    Args:
        truth: of the record's step.
        record: the record.
        tokenizer: of the model.
        micro_batches: backwards of the step.
        per_batch: pairs of each backward.

    Returns:
        Figures by name.
    """
    count = len(record.gram)
    rows = [record.batch.row(number) for number in range(2 * count)]
    pairs = [(told_pair(tokenizer, rows[each]), told_pair(tokenizer, rows[count + each])) for each in range(count)]
    return _compare(truth, record, [truth.row(row) for row in rows], pairs, micro_batches * per_batch)


def compare_rewards(truth: Truth, record: Any, forwards: Sequence[Tensor], tokenizer: Any) -> dict[str, Any]:
    """What a `StepRecord` of a reward model says, beside what is so.

    Args:
        truth: of the record's step.
        record: the record, which has no tokens.
        forwards: `input_ids` of the step's forwards, each of chosen rows, then rejected rows.
        tokenizer: of the model.

    Returns:
        Figures by name.
    """
    rows = [[ids[ids != tokenizer.pad_token_id] for ids in part] for part in forwards]
    chosen, rejected = ([row for part in rows for row in _half(part, side)] for side in (0, 1))
    whole = [(ids, torch.ones_like(ids)) for ids in (*chosen, *rejected)]
    told = [told_pair(tokenizer, row, is_whole=True) for row in whole]
    pairs = list(zip(told[: len(chosen)], told[len(chosen) :], strict=True))
    return _compare(truth, record, [truth.reward(ids) for ids, _ in whole], pairs, len(chosen))


def _half(rows: Sequence[Tensor], side: int) -> Sequence[Tensor]:
    middle = len(rows) // 2
    return rows[middle:] if side else rows[:middle]


def _compare(
    truth: Truth, record: Any, found: Sequence[tuple[float, Tensor]], pairs: Sequence[Any], divisor: int
) -> dict[str, Any]:
    """Entries, log-probs (or rewards) and weights of a record beside the rows' true ones, chosen first."""
    gram, (g_w, g_l) = record.gram, torch.stack([gradient for _, gradient in found]).view(2, len(record.gram), -1)
    logps = torch.tensor([logp for logp, _ in found], dtype=torch.float64)
    norms = g_w.norm(dim=1), g_l.norm(dim=1)
    entries = [
        (gram.chosen_sq - norms[0] ** 2).abs() / norms[0] ** 2,
        (gram.rejected_sq - norms[1] ** 2).abs() / norms[1] ** 2,
        (gram.inner - (g_w * g_l).sum(1)).abs() / (norms[0] * norms[1]),
    ]
    off = (torch.cat([gram.chosen_logp, gram.rejected_logp]) - logps).abs() / logps.abs().clamp_min(1)
    d_w, d_l = record.verdict.d_w, record.verdict.d_l
    combined = (d_l[:, None] * g_l - d_w[:, None] * g_w).sum(0) / divisor
    is_right = [w and l_ and w == (l_[0], "chosen") and l_[1] == "rejected" for w, l_ in pairs]
    return {
        "step": record.step, "source": record.source, "pairs": len(gram), "inactive": record.inactive,
        "right_pairs": all(map(bool, is_right)), "entries_error": max(float(each.max()) for each in entries),
        "logps_error": float(off.max()), "step_gradient_error": truth.off_step(combined),
        "cosine": _short(gram.cosine), "d_w": _short(d_w), "d_l": _short(d_l), "cases": record.verdict.case.tolist(),
    }  # fmt: skip


def compare_rows(truth: Truth, record: Any, tokenizer: Any) -> dict[str, Any]:
    """What a `RowStepRecord` says, beside what is so.

    Args:
        truth: of the record's step.
        record: the record.
        tokenizer: of the model.

    Returns:
        Figures by name.
    """
    count, weight = len(record.rows), record.rows.weight
    rows = [record.batch.row(number) for number in range(count)]
    found = [truth.row(row) for row in rows]
    gradients = torch.stack([gradient for _, gradient in found])
    norms, known = gradients.norm(dim=1), ~record.rows.products.isnan()
    errors = (record.rows.products - gradients @ gradients.T).abs() / norms.outer(norms)
    logps = torch.tensor([logp for logp, _ in found], dtype=torch.float64)
    sides = [told_pair(tokenizer, row) for row in rows]
    return {
        "step": record.step, "source": record.source, "rows": count, "inactive": record.inactive,
        "right_sides": all(told is not None and (told[1] == "chosen") == bool(weight[number] > 0)
                           for number, told in enumerate(sides)),
        "entries_known": float(known.double().mean()), "entries_error": float(errors[known].max()),
        "logps_error": float(((record.rows.logp - logps).abs() / logps.abs().clamp_min(1)).max()),
        "step_gradient_error": truth.off_step(-(weight[:, None] * gradients).sum(0)), "weight": _short(weight),
    }  # fmt: skip


def _short(values: Tensor | Sequence[float]) -> list[float]:
    return [float(f"{float(value):.4g}") for value in values]
