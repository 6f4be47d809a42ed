"""What is kept of one measured step whose rows are no pairs, and the scalars that a window of them is logged as.

Letters: N rows of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from gradent.attribution.step import StepAttribution, join_errors
from gradent.pairs.row_batch import RowBatch
from gradent.record import GROUP_SOURCES, ROW_COLUMNS, ROW_MOVED_COLUMNS, UNSPLIT
from gradent.record.table import Table
from gradent.recorder.recording import RowRecording
from gradent.row_gram import RowGram
from gradent.trainer.records.step import LARGE, finite_means, share_explained

__all__ = ["RowStepRecord", "summarize_rows", "to_row_lines"]

SIDES = {"positive": 1, "negative": -1}
"""Names of rows that the loss raises and lowers, with the sign of their weights."""


@dataclass(frozen=True, kw_only=True)
class RowStepRecord:
    """One measured optimizer step of a trainer whose rows are no pairs: rollouts in groups (GRPO), labelled rows (KTO).

    Attributes:
        step: number of the step, counted from 1.
        rows: of the step's N rows with a gradient, all micro-batches and ranks together: products, groups, weights,
            and what moved each.
        source: "piggyback" or "measure".
        overhead_s: wall time of gradent in the step, in seconds, summed over ranks.
        inactive: rows that the loss did not move (an advantage of zero, a rollout that is masked out, all tokens
            clipped).
        groups: groups with a row that the loss moved.
        flat_groups: groups without contrast: the loss moved none of their rows.
        batch: the rows' tokens; None where no row has a gradient.
        attribution: what moved each of the rows in the step, with `pushes` of each row by each; None without
            `attribution=True`, in Adam's first step, and where a step has no such account (said once in the log).
        gram, verdict: None: they are of pairs.
    """

    step: int
    rows: RowGram
    source: Literal["piggyback", "measure"]
    overhead_s: float
    inactive: int
    groups: int
    flat_groups: int
    batch: RowBatch | None = None
    attribution: StepAttribution | None = None
    gram: None = None
    verdict: None = None

    @classmethod
    def of(cls, step: int, recording: RowRecording, *, realised: Tensor | None = None) -> RowStepRecord:
        """The record of a recording.

        Args:
            step: number of the step.
            recording: what was harvested.
            realised: how much the rows' log-probs moved with the optimizer's step, `[N]`.

        Returns:
            The record.
        """
        attribution = recording.attribution
        if attribution is not None:  # of its sketches and products nothing is left to be learnt
            attribution = replace(attribution, realised=realised, sketch=None, gram=None)
        names = ("source", "overhead_s", "inactive", "groups", "flat_groups", "batch")
        return cls(
            **{name: getattr(recording, name) for name in names}, step=step, attribution=attribution,
            rows=replace(recording.rows, realised=realised),
        )  # fmt: skip

    def side(self, sign: int) -> Tensor:
        """Which rows have weights of a sign, bool `[N]`."""
        assert self.rows.weight is not None
        return self.rows.weight * sign > 0

    def without_modules(self) -> RowStepRecord:
        """The same without each module's share."""
        return replace(self, rows=replace(self.rows, modules=None))

    def without_large_matrices(self) -> RowStepRecord:
        """The same without the `[N, N]` matrices of more than `LARGE` rows."""
        if len(self.rows) <= LARGE or not self.rows.products.numel():
            return self
        nothing = torch.zeros(0, 0, dtype=torch.float64)
        account = self.attribution
        if account is not None:
            account = replace(account, products=nothing, pushes=nothing)
        return replace(self, rows=replace(self.rows, products=nothing), attribution=account)


def summarize_rows(records: Sequence[RowStepRecord]) -> dict[str, float]:
    """The `gradent/...` scalars of a window of at least one measured step: means over its rows, or its groups."""
    active, inactive = sum(len(record.rows) for record in records), sum(record.inactive for record in records)
    groups, flat = sum(record.groups for record in records), sum(record.flat_groups for record in records)
    scalars = {
        "gradent/inactive": inactive / max(1, inactive + active),
        "gradent/group/without_contrast": flat / max(1, groups + flat),
        "gradent/coverage": min(record.rows.coverage for record in records),
        "gradent/overhead_s": sum(record.overhead_s for record in records) / len(records),
    }  # fmt: skip
    if not active:
        return scalars
    shares = [record.rows.share for record in records]
    values = {
        "cosine": torch.cat([record.rows.opposition for record in records]),
        "cancellation": torch.cat([record.rows.cancellation for record in records]),
        "top_share": torch.tensor([float(share.max()) for share in shares if share is not None], dtype=torch.float64),
    }
    for name, sign in SIDES.items():
        values[f"{name}_norm"] = torch.cat([
            record.rows.products.diagonal()[record.side(sign)].sqrt() for record in records
        ])  # fmt: skip
    return scalars | finite_means(values, "gradent/group/") | _summarize_moves(records)


def _summarize_moves(records: Sequence[RowStepRecord]) -> dict[str, float]:
    """Of the steps that have accounts: which rows move against their weights, and what moved each side."""
    accounted = [record for record in records if record.attribution is not None and len(record.rows)]
    accounts = [record.attribution for record in accounted if record.attribution is not None]
    if not accounts:
        return {}
    scalars: dict[str, float] = {}
    for (name, sign), verb in zip(SIDES.items(), ("lowered", "raised"), strict=True):
        sides = [record.side(sign) for record in accounted]
        total = torch.cat([account.total[side] for account, side in zip(accounts, sides, strict=True)])
        if not len(total):
            continue
        scalars[f"gradent/group/{name}_{verb}"] = float((total * sign < 0).double().mean())
        moved = {
            source: torch.cat([
                account.moved[source][side]
                for account, side in zip(accounts, sides, strict=True)
                if source in account.moved
            ])
            for source in (*GROUP_SOURCES, UNSPLIT)
            if any(source in account.moved for account in accounts)
        }  # fmt: skip
        scalars |= finite_means(moved, f"gradent/group/{name}_moved/")
    error, explained = join_errors(accounts), share_explained(accounts)
    scalars |= {} if error is None else {"gradent/sketch_error": error}
    return scalars if explained is None else scalars | {"gradent/explained": explained}


def to_row_lines(record: RowStepRecord) -> list[dict[str, Any]]:
    """A step's rows as lines of the record's schema (`ROW_COLUMNS`, `ROW_MOVED_COLUMNS`)."""
    rows = record.rows
    assert rows.weight is not None
    columns: dict[str, Any] = {
        "group": rows.group, "weight": rows.weight, "logp": rows.logp, "length": rows.length,
        "sq": rows.products.diagonal(),
    }  # fmt: skip
    columns |= {f"moved_{source}": values for source, values in (rows.moved or {}).items()}
    if rows.realised is not None:
        columns["realised"] = rows.realised
    lists: dict[str, list[Any]] = dict.fromkeys([*ROW_COLUMNS, *ROW_MOVED_COLUMNS], [None] * len(rows))
    lists |= Table({name: values.numpy() for name, values in columns.items()}).to_lists()
    lists |= {"step": [record.step] * len(rows), "row": list(range(len(rows)))}
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
