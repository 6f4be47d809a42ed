"""From an audit's journal to the tables of its records."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradent.auditing.analysis.distributions import summarize_modules
from gradent.auditing.analysis.properties import pair_properties
from gradent.auditing.measuring.batches import ENTRIES, REFERENCES, join_blocks
from gradent.auditing.measuring.tokens import choose_pairs
from gradent.auditing.state.journal import Journal
from gradent.auditing.state.targets import AuditPlan, Target
from gradent.loading.preferences import AuditPair
from gradent.losses import Loss
from gradent.pair_gram import PairGram
from gradent.record import MODULE_COLUMNS, PAIR_COLUMNS, SAMPLE_COLUMNS, TOKEN_COLUMNS
from gradent.record.table import Floats, Table, stack
from gradent.theory.conditions import Verdict, verdict

__all__ = [
    "TargetRecord", "collect", "gram_of", "judge", "module_table", "sample_table", "token_table", "with_verdict",
    "without_references",
]  # fmt: skip

JUDGED = ("d_w", "d_l", "chosen_change", "rejected_change", "case")


@dataclass(frozen=True, kw_only=True)
class TargetRecord:
    """What was measured of one target."""

    target: Target
    model: dict[str, Any]  # what the record says of the model, coverage included
    table: Table  # `record.PAIR_COLUMNS`
    sums: dict[str, Floats]  # `BatchResults.modules`
    is_whole: bool  # whether every pair was measured

    @property
    def defined(self) -> int:
        """Pairs that have a cosine."""
        return int(np.isfinite(self.table["cosine"]).sum())

    @property
    def modules(self) -> dict[str, dict[str, float]] | None:
        """What the record says of each module; None where none were measured, or no pair has a cosine."""
        return summarize_modules(self.sums, self.defined) if self.sums and self.defined else None

    def spread(self, pairs: Sequence[AuditPair], count: int) -> list[AuditPair]:
        """Some of the measured pairs, chosen by their cosines to stand for all of them."""
        by_row = {pair.row: pair for pair in pairs}
        return [by_row[int(self.table["pair"][place])] for place in choose_pairs(self.table["cosine"], count)]


def collect(plan: AuditPlan, journal: Journal, failures: Collection[str], loss: Loss) -> list[TargetRecord]:
    """What the journal holds of each target that did not fail and of which a batch was measured, by step."""
    records = []
    for target in plan.targets:
        blocks = [] if target.name in failures else _blocks(target, plan, journal, needed=loss.needs_reference)
        if blocks:
            results = join_blocks(blocks)
            model = {**(journal.find("model", target.identity) or {}), "coverage": results.coverage}
            table = _pair_table(target, results.table, loss, plan.pairs)
            is_whole = len(blocks) == len(plan.batches)
            records.append(
                TargetRecord(target=target, model=model, table=table, sums=results.modules, is_whole=is_whole)
            )
    return records


def _blocks(target: Target, plan: AuditPlan, journal: Journal, *, needed: bool) -> list[dict[str, Any]]:
    """A target's batches, all with the reference's log-probs or none; where these are `needed`, others are left out."""
    blocks, is_bare = [], plan.reference.kind == "none"
    for number in range(len(plan.batches)):
        block = journal.find("batch", target.identity, number)
        if block is None:
            continue
        if plan.reference.source is not None:
            reference = journal.find("reference", plan.reference.identity, number)
            if reference is None and needed:
                continue
            is_bare = is_bare or reference is None
            block = {**block, **(reference or {})}
        blocks.append(block)
    if is_bare:
        blocks = [{name: values for name, values in block.items() if name not in REFERENCES} for block in blocks]
    return blocks


def _pair_table(target: Target, entries: Table, loss: Loss, pairs: Sequence[AuditPair]) -> Table:
    """The rows of `pairs.parquet` for one target, from its `BatchResults.table`; nan for no cosine or reference."""
    count = entries.rows
    entries = Table({**dict.fromkeys(REFERENCES, np.full(count, np.nan)), **entries})
    judged = judge(entries, loss)
    rows = np.array([pair.row for pair in pairs])
    table = {
        **with_verdict(entries, judged), "checkpoint": np.full(count, target.name, dtype=object),
        "step": np.full(count, target.step), "pair": rows[entries["position"]],
        "cosine": judged.gram.cosine.numpy(),
    }  # fmt: skip
    return Table(table).pick([*PAIR_COLUMNS])


def gram_of(table: Table) -> PairGram:
    """The Gram entries of a table's pairs, `[P]` each."""
    entries: dict[str, Any] = {name: torch.from_numpy(table[name]) for name in ENTRIES}
    return PairGram(**entries)


def judge(table: Table, loss: Loss) -> Verdict:
    """What a loss does to each of a table's pairs; a log-prob of the reference that is nan stands for none."""
    references: list[Tensor | None] = [
        None if np.isnan(table[name]).any() else torch.from_numpy(table[name]) for name in REFERENCES
    ]
    return verdict(gram_of(table), loss, *(references if None not in references else (None, None)))


def with_verdict(table: Table, judged: Verdict) -> Table:
    """A table's pairs with what a loss does to each of them in the place of another's verdict."""
    return Table({**table, **{name: getattr(judged, name).numpy() for name in JUDGED}})


def without_references(table: Table) -> Table:
    """A table as if no reference had been measured."""
    return Table({**table, **dict.fromkeys(REFERENCES, np.full(table.rows, np.nan))})


def module_table(records: Sequence[TargetRecord]) -> Table | None:
    """The rows of `modules.parquet`, target by target; None where modules were not measured."""
    rows = [
        {
            "checkpoint": record.target.name, "step": record.target.step, "module": module, "pairs": record.defined,
            **part,
        }
        for record in records
        for module, part in (record.modules or {}).items()
    ]  # fmt: skip
    return Table.read({name: [row[name] for row in rows] for name in MODULE_COLUMNS}) if rows else None


def sample_table(pairs: Sequence[AuditPair]) -> Table:
    """The rows of `sample.parquet`."""
    rows = [
        {
            "pair": pair.row, "where": pair.where, "prompt": pair.prompt_text, "chosen": pair.chosen_text,
            "rejected": pair.rejected_text, "prompt_len": len(pair.prompt_ids), "chosen_len": len(pair.chosen_ids),
            "rejected_len": len(pair.rejected_ids), "truncated": pair.truncated,
            **pair_properties(pair.chosen_ids, pair.rejected_ids),
        }
        for pair in pairs
    ]  # fmt: skip
    return Table.read({name: [row[name] for row in rows] for name in SAMPLE_COLUMNS})


def token_table(target: Target, pairs: Sequence[AuditPair], journal: Journal) -> Table | None:
    """The rows of `tokens.parquet` for the pairs chosen for a target; None where no tokens were measured."""
    blocks = [block for pair in pairs if (block := journal.find("tokens", target.identity, pair.row)) is not None]
    tables = []
    for block in blocks:
        count = len(block["pair"])
        same: dict[str, Any] = {"checkpoint": [target.name] * count, "step": [target.step] * count}
        # A journal that was begun before there was an `own_inner` has none.
        tables.append(Table.read({**same, "own_inner": [None] * count, **block}).pick([*TOKEN_COLUMNS]))
    return stack(tables) if tables else None
