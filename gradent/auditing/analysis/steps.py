"""What steps do to the responses, from an audit's journal: one on the whole sample, the run's own between checkpoints.

A step of plain gradient descent, of unit learning rate, on the sample's mean loss moves response i by
`−Σ_j c_j ⟨g_i, g_j⟩` with `c_j = ∂L/∂log π(y_j)`. Between two checkpoints the displacement Δθ is known, and the mean
of `⟨g_i, Δθ⟩` at both ends (the trapezoid) is the change of `log π(y_i)` to second order in Δθ, module by module.

Letters: P pairs, K numbers of a row's vector, L losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradent.auditing.analysis.columns import TargetRecord, judge
from gradent.auditing.analysis.distributions import count_cases, find_cases, mean
from gradent.auditing.measuring.steps import ARRIVING, LEAVING, SAMPLE, StepTask
from gradent.auditing.state.journal import Journal
from gradent.auditing.state.targets import Target
from gradent.kernels.common.numerics import spans
from gradent.losses import Loss
from gradent.record import STEP_COLUMNS
from gradent.record.table import Floats, Table, stack
from gradent.theory.conditions import Verdict

__all__ = [
    "SampleStep",
    "StepRecord",
    "collect_steps",
    "describe_steps",
    "plan_steps",
    "read_sample_step",
    "step_table",
]

_SIDES = ("chosen", "rejected")

PUSHED, PUSHERS = 12, 3
"""Responses of which it is said who moves them, and how many rows of each."""

AT_ONCE = 2**22
"""Numbers of the rows' vectors that are multiplied at once, in float64."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What was found of one target's steps; its rows are those of `record.table`."""

    record: TargetRecord
    before: TargetRecord | None
    along: dict[str, Floats]  # direction -> `⟨g_i, d⟩` of chosen and rejected, `[2, P]`
    modules: dict[str, dict[str, Floats]]  # direction -> module -> the same, summed over the pairs, `[2]`


@dataclass(frozen=True, kw_only=True)
class SampleStep:
    """Vectors of all rows' gradients on the last target: what a step on the sample does under any loss."""

    vectors: Floats  # `[2, P, K]`
    squares: Floats  # of the gradients' norms, `[2, P]`, exact
    inner: Floats  # of every pair, `[P]`, exact
    is_exact: bool  # whether the vectors are the gradients

    def moved(self, weights: Floats) -> Floats:
        """What steps of unit learning rate along `−Σ_j w_j g_j` do to chosen and rejected, nats, `[L, P, 2]`."""
        # `weights` `[L, 2, P]`. All losses at once, a few of the numbers K each time: each alone would read all twice.
        pairs = len(self.inner)
        rows, flat = self.vectors.reshape(2 * pairs, -1), weights.reshape(len(weights), -1)
        moved = np.zeros(flat.shape)
        squares, inner = np.zeros((2, pairs)), np.zeros(pairs)
        for span in spans(rows.shape[1], max(1, AT_ONCE // max(flat.shape))):
            part = rows[:, span].astype(np.float64)
            moved += (flat @ part) @ part.T
            if not self.is_exact:
                sides = part.reshape(2, pairs, -1)
                squares += np.einsum("spk,spk->sp", sides, sides)
                inner += np.einsum("pk,pk->p", *sides)
        found = moved.reshape(weights.shape)
        if not self.is_exact:  # a row's own part, and its partner's, are known
            found += weights * (self.squares - squares) + weights[:, ::-1] * (self.inner - inner)
        return np.ascontiguousarray(found.transpose(0, 2, 1))

    def pushes(self, judged: Verdict, side: int, place: int) -> Floats:
        """What each row does to one response in such a step, nats, `[2, P]`."""
        products = self.vectors @ self.vectors[side, place]
        products[side, place], products[1 - side, place] = self.squares[side, place], self.inner[place]
        found: Floats = _pull_by(judged) * products
        return found

    def cases(self, judged: Sequence[Verdict]) -> list[NDArray[Any]]:
        """Of each loss the number of each pair's case after a step on its mean over the sample, `[P]`."""
        if not judged:
            return []
        return [find_cases(change) for change in self.moved(np.stack([_pull_by(each) for each in judged]))]

    def needed_nll(self, judged: Verdict, lengths: Floats) -> float | None:
        """The smallest weight of an NLL term with which a step on the sample lowers no unseen chosen, on average."""
        # An unseen pair is looked at by each pair without its own part; the term is a mean over chosen's tokens. Of
        # both, the others' part has the same factor P / (P - 1).
        if len(lengths) < 2:
            return None
        term = np.stack([np.full(len(lengths), 1 / lengths.sum()), np.zeros(len(lengths))])
        pulls = np.stack([_pull_by(judged), term])
        own = pulls[:, 0] * self.squares[0] + pulls[:, 1] * self.inner
        change, gain = (self.moved(pulls)[:, :, 0] - own).mean(1).tolist()
        if change >= 0:
            return 0.0
        return -change / gain if gain > 0 else None

    @property
    def error(self) -> float:
        """Root mean square error of the pairs' inner products, in units of `‖g_w‖‖g_l‖`; 0 where vectors are exact."""
        if self.is_exact:
            return 0.0
        inner = np.einsum("pk,pk->p", *self.vectors)
        scale = np.sqrt(self.squares.prod(0))
        return float(np.sqrt(np.mean(np.square((inner - self.inner)[scale > 0] / scale[scale > 0]))))


def plan_steps(records: Sequence[TargetRecord]) -> list[StepTask]:
    """What is to be found of the targets that were measured whole, by step."""
    whole = [record for record in records if record.is_whole]
    beside = zip([None, *whole], whole, [*whole[1:], None], strict=False)
    return [
        StepTask(
            target=record.target, weights=-_pull_of(record.table).T, before=None if before is None else before.target,
            after=None if after is None else after.target,
        )
        for before, record, after in beside
    ]  # fmt: skip


def collect_steps(
    records: Sequence[TargetRecord], tasks: Sequence[StepTask], journal: Journal, batches: int
) -> list[StepRecord]:
    """What the journal holds of the targets all of whose batches were done."""
    by_name = {record.target.name: record for record in records}
    found = []
    for task in tasks:
        along, modules = dict[str, Floats](), dict[str, dict[str, Floats]]()
        for name, identity in task.identities.items():
            blocks = [journal.find(name, identity, number) for number in range(batches)]
            if all(block is not None for block in blocks):
                along[name], modules[name] = _join([block for block in blocks if block is not None])
        if SAMPLE in along:
            before = None if task.before is None else by_name[task.before.name]
            record = by_name[task.target.name]
            found.append(StepRecord(record=record, before=before, along=along, modules=modules))
    return found


def read_sample_step(target: Target, table: Table, journal: Journal, batches: int) -> SampleStep | None:
    """The vectors of a target's rows, in the order of its table; None where a batch is missing."""
    found = [journal.find("vectors", target.identity, number) for number in range(batches)]
    blocks = [block for block in found if block is not None]
    if len(blocks) < batches or not blocks:
        return None
    vectors: Floats | None = None
    for block in blocks:  # each into its place, so that no second copy of all is made
        part = journal.load(block["file"])
        if vectors is None:
            vectors = np.empty((2, table.rows, part.shape[2]), dtype=part.dtype)
        vectors[:, block["positions"]] = part
    assert vectors is not None
    return SampleStep(
        vectors=vectors, squares=np.stack([table[f"{side}_sq"] for side in _SIDES]), inner=table["inner"],
        is_exact=all(block["is_exact"] for block in blocks),
    )  # fmt: skip


def step_table(steps: Sequence[StepRecord]) -> Table | None:
    """The rows of `steps.parquet`, target by target; None without any."""
    return stack([_rows_of(before, step) for before, step in pairwise([None, *steps]) if step]) if steps else None


def describe_steps(
    steps: Sequence[StepRecord], sample: SampleStep | None, last: TargetRecord, loss: Loss
) -> dict[str, Any] | None:
    """The summary's `steps`, `sample` being of the last target; None where nothing was measured of any step."""
    if not steps:
        return None
    intervals = [_describe_interval(first, last) for first, last in pairwise(steps)]
    return {
        "sample": [_describe_sample(step) for step in steps],
        "intervals": [interval for interval in intervals if interval is not None],
        "what_if": None if sample is None else {"is_exact": sample.is_exact, "error": sample.error},
        "pushed": [] if sample is None or steps[-1].record is not last else _describe_pushed(steps[-1], sample, loss),
    }


def _pull(d_w: Floats, d_l: Floats) -> Floats:
    """What a step on the sample's mean loss has of every chosen's and rejected's gradient, `−∂L/∂log π`, `[2, P]`."""
    return np.stack([d_w, -d_l]) / len(d_w)


def _pull_by(judged: Verdict) -> Floats:
    """The same, of a loss that has judged the pairs."""
    return _pull(judged.d_w.numpy(), judged.d_l.numpy())


def _pull_of(table: Table) -> Floats:
    """The same, of the run's loss."""
    return _pull(table["d_w"], table["d_l"])


def _join(blocks: Sequence[Mapping[str, Any]]) -> tuple[Floats, dict[str, Floats]]:
    """All batches' `⟨g_i, d⟩` `[2, P]`, by position, and its sums by module."""
    order = np.argsort(np.concatenate([block["positions"] for block in blocks]))
    along = np.concatenate([block["along"] for block in blocks], axis=1)[:, order]
    return along, {name: np.sum([block["modules"][name] for block in blocks], axis=0) for name in blocks[0]["modules"]}


def _parts(step: StepRecord) -> dict[str, Floats]:
    """Column -> nats of a unit of learning rate, `[P]`: what moves each side in a step on the sample."""
    table = step.record.table
    pull, total = _pull_of(table), -step.along[SAMPLE]
    own, partner = pull * np.stack([table["chosen_sq"], table["rejected_sq"]]), pull[::-1] * table["inner"]
    others = total - own - partner if table.rows > 1 else np.zeros_like(total)
    return {
        f"{side}_{name}": values[place]
        for place, side in enumerate(_SIDES)
        for name, values in (("own", own), ("partner", partner), ("others", others))
    }


def _trapezoid(first: StepRecord | None, last: StepRecord) -> tuple[Floats, dict[str, Floats]] | None:
    """The first-order change of chosen and rejected from one target to the next, `[2, P]`, and its sums by module."""
    if first is None or last.before is not first.record or LEAVING not in first.along or ARRIVING not in last.along:
        return None
    begin, end = first.modules[LEAVING], last.modules[ARRIVING]
    change: Floats = (first.along[LEAVING] + last.along[ARRIVING]) / 2
    return change, {module: (begin[module] + end[module]) / 2 for module in begin}


def _realised(step: StepRecord) -> Floats:
    """How far chosen and rejected moved since the target before, `[2, P]`."""
    assert step.before is not None
    return np.stack([step.record.table[f"{side}_logp"] - step.before.table[f"{side}_logp"] for side in _SIDES])


def _rows_of(before: StepRecord | None, step: StepRecord) -> Table:
    record, found = step.record, _trapezoid(before, step)
    nothing = np.full((2, record.table.rows), np.nan)
    change, realised = (nothing, nothing) if found is None else (found[0], _realised(step))
    columns = {
        **record.table, **_parts(step),
        **{f"{side}_arrived": change[place] for place, side in enumerate(_SIDES)},
        **{f"{side}_realised": realised[place] for place, side in enumerate(_SIDES)},
    }  # fmt: skip
    return Table(columns).pick([*STEP_COLUMNS])


def _describe_sample(step: StepRecord) -> dict[str, Any]:
    """A step on the sample at one target: means over the pairs, and where it differs from a step on each pair alone."""
    record, parts, moved = step.record, _parts(step), _sample_moves(step).T
    alone = np.stack([record.table[f"{side}_change"] for side in _SIDES], axis=1)
    differs = np.sign(moved) * np.sign(alone) < 0
    return {
        "checkpoint": record.target.name, "step": record.target.step, "pairs": record.table.rows,
        **{name: mean(values) for name, values in parts.items()},
        "cases": count_cases(find_cases(moved)),
        # Shares of pairs of which a step on the sample moves the response the other way than a step on the pair alone.
        "chosen_differs": float(differs[:, 0].mean()), "rejected_differs": float(differs[:, 1].mean()),
    }  # fmt: skip


def _sample_moves(step: StepRecord) -> Floats:
    """What a step on the sample does to chosen and rejected, `[2, P]`."""
    parts = _parts(step)
    return np.stack([sum(parts[f"{side}_{part}"] for part in ("own", "partner", "others")) for side in _SIDES])


def _describe_pushed(step: StepRecord, sample: SampleStep, loss: Loss) -> list[dict[str, Any]]:
    """The responses that other pairs move most in a step on the sample, and by whom."""
    table, judged = step.record.table, judge(step.record.table, loss)
    parts = _parts(step)
    others = np.stack([parts[f"{side}_others"] for side in _SIDES])
    described = []
    for flat in np.argsort(-np.abs(others), axis=None, kind="stable")[:PUSHED]:
        side, place = (int(number) for number in np.unravel_index(flat, others.shape))
        pushes = sample.pushes(judged, side, place)
        pushes[:, place] = 0  # the response itself, and its partner
        by = [np.unravel_index(other, pushes.shape) for other in np.argsort(-np.abs(pushes), axis=None)[:PUSHERS]]
        if not pushes.any():  # there is no other pair, or the loss moves none
            continue
        described.append({
            "pair": int(table["pair"][place]), "side": _SIDES[side],
            **{part: float(parts[f"{_SIDES[side]}_{part}"][place]) for part in ("own", "partner", "others")},
            "by": [
                {"pair": int(table["pair"][pair]), "side": _SIDES[half], "moved": float(pushes[half, pair])}
                for half, pair in by if pushes[half, pair]
            ],
        })  # fmt: skip
    return described


def _describe_interval(first: StepRecord, last: StepRecord) -> dict[str, Any] | None:
    found = _trapezoid(first, last)
    if found is None:
        return None
    change, modules = found
    realised, count = _realised(last), last.record.table.rows
    size = float(np.square(realised).sum())
    ends = {"begin": first.along[LEAVING], "end": last.along[ARRIVING]}
    foretold = _sample_moves(first)
    agree = np.sign(realised) == np.sign(foretold)
    return {
        "from": first.record.target.step, "to": last.record.target.step, "pairs": count,
        **{f"{side}_realised": mean(realised[place]) for place, side in enumerate(_SIDES)},
        **{f"{side}_first_order": mean(change[place]) for place, side in enumerate(_SIDES)},
        # Shares of responses that moved the way which a step on the sample at the interval's begin foretells.
        **{f"{side}_sample_sign": mean(agree[place][foretold[place] != 0].astype(np.float64))
           for place, side in enumerate(_SIDES)},
        **{f"{side}_sample_signed": int((foretold[place] != 0).sum()) or None for place, side in enumerate(_SIDES)},
        "explained": _explained(realised, change, size),
        **{f"explained_{name}": _explained(realised, values, size) for name, values in ends.items()},
        "modules": {module: [float(part) / count for part in parts] for module, parts in modules.items()},
    }  # fmt: skip


def _explained(realised: Floats, change: Floats, size: float) -> float | None:
    return 1 - float(np.square(realised - change).sum()) / size if size > 0 else None
