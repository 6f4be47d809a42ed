"""From an audit's journal to the columns of its tables and the figures of its summary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradent.auditing.analysis.distributions import most_entangled, summarize_columns, summarize_modules
from gradent.auditing.analysis.loss_grid import read_hyperparameters
from gradent.auditing.analysis.properties import pair_properties
from gradent.auditing.measuring.batches import Scan, join_blocks
from gradent.auditing.measuring.tokens import choose_pairs
from gradent.auditing.state.journal import Journal
from gradent.auditing.state.targets import ReferenceChoice, Target
from gradent.loading.preferences import AuditPair
from gradent.losses import Loss
from gradent.record import CASE_NAMES, MODULE_COLUMNS, PAIR_COLUMNS, SAMPLE_COLUMNS, TOKEN_COLUMNS
from gradent.report.terminal.audit import preview
from gradent.theory.conditions import Verdict, verdict

__all__ = [
    "Measured",
    "collect",
    "describe_checkpoints",
    "describe_last",
    "describe_loss",
    "module_columns",
    "pair_columns",
    "sample_columns",
    "token_columns",
]

Columns = dict[str, list[Any]]

_SHOWN = 5  # most entangled pairs in the summary


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one target gave.

    Attributes:
        target: the model.
        scan: the pairs that were measured.
        model: what the record says of the model, coverage included.
        columns: those of `record.PAIR_COLUMNS`.
        whole: whether every pair was measured.
    """

    target: Target
    scan: Scan
    model: dict[str, Any]
    columns: Columns
    whole: bool

    def spread(self, pairs: Sequence[AuditPair], count: int) -> list[AuditPair]:
        """Pairs that stand for those measured here, by their cosines.

        Args:
            pairs: all pairs.
            count: how many; all where there are no more.

        Returns:
            Those pairs, as `choose_pairs` picks them.
        """
        return [pairs[self.scan.positions[place]] for place in choose_pairs(self.columns["cosine"], count)]


def collect(
    targets: Sequence[Target],
    reference: ReferenceChoice,
    batches: Sequence[Sequence[int]],
    pairs: Sequence[AuditPair],
    journal: Journal,
    loss: Loss,
) -> list[Measured]:
    """What the journal holds of each target.

    Args:
        targets: in order of their steps; those that failed are not among them.
        reference: where the reference's log-probs come from.
        batches: positions of pairs, batch by batch.
        pairs: all pairs.
        journal: of the audit.
        loss: judges the pairs.

    Returns:
        One each for those of which a batch was measured.
    """
    found = []
    for target in targets:
        blocks = _blocks(target, reference, len(batches), journal, needed=loss.needs_reference)
        if blocks:
            scan = join_blocks(blocks)
            model = {**(journal.find("model", target.identity) or {}), "coverage": scan.gram.coverage}
            judged = verdict(scan.gram, loss, scan.ref_chosen_logp, scan.ref_rejected_logp)
            columns = _columns(target, scan, judged, pairs)
            found.append(
                Measured(target=target, scan=scan, model=model, columns=columns, whole=len(blocks) == len(batches))
            )
    return found


def _blocks(
    target: Target, reference: ReferenceChoice, count: int, journal: Journal, *, needed: bool
) -> list[dict[str, Any]]:
    """What a target's batches gave, with the reference's log-probs of each, or of none."""
    blocks, bare = [], reference.kind == "none"
    for number in range(count):
        block = journal.find("batch", target.identity, number)
        if block is None:
            continue
        if reference.source is not None:
            apart = journal.find("reference", reference.identity, number)
            if apart is None and needed:
                continue
            bare = bare or apart is None
            block = {**block, **(apart or {})}
        blocks.append(block)
    if bare:
        blocks = [{name: values for name, values in each.items() if not name.startswith("ref_")} for each in blocks]
    return blocks


def _columns(target: Target, scan: Scan, judged: Verdict, pairs: Sequence[AuditPair]) -> Columns:
    """The columns of `pairs.parquet`; None where there is no cosine or no reference."""
    gram, count = scan.gram, len(scan.positions)
    entries = ("chosen_sq", "rejected_sq", "inner", "chosen_logp", "rejected_logp", "chosen_len", "rejected_len")
    references = {"ref_chosen_logp": scan.ref_chosen_logp, "ref_rejected_logp": scan.ref_rejected_logp}
    return {
        "checkpoint": [target.name] * count,
        "step": [target.step] * count,
        "pair": [pairs[position].row for position in scan.positions],
        **{name: getattr(gram, name).tolist() for name in entries},
        "cosine": [None if value != value else value for value in gram.cosine.tolist()],
        **{name: [None] * count if values is None else values.tolist() for name, values in references.items()},
        **{name: getattr(judged, name).tolist() for name in ("d_w", "d_l", "chosen_change", "rejected_change", "case")},
    }


def pair_columns(measured: Sequence[Measured]) -> Columns:
    """The columns of `pairs.parquet`.

    Args:
        measured: all targets.

    Returns:
        Those of `record.PAIR_COLUMNS`, target by target.
    """
    return {name: [value for each in measured for value in each.columns[name]] for name in PAIR_COLUMNS}


def module_columns(measured: Sequence[Measured]) -> Columns:
    """The columns of `modules.parquet`.

    Args:
        measured: all targets.

    Returns:
        Those of `record.MODULE_COLUMNS`, target by target; no row where modules were not asked for.
    """
    columns: Columns = {name: [] for name in MODULE_COLUMNS}
    for each in measured:
        for module, parts in (_modules(each) or {}).items():
            row = {"checkpoint": each.target.name, "step": each.target.step, "module": module, **parts}
            for name, value in {**row, "pairs": _defined(each)}.items():
                columns[name].append(value)
    return columns


def sample_columns(pairs: Sequence[AuditPair]) -> Columns:
    """The columns of `sample.parquet`.

    Args:
        pairs: all pairs.

    Returns:
        Those of `record.SAMPLE_COLUMNS`.
    """
    rows = [
        {
            "pair": pair.row,
            "where": pair.where,
            "prompt": pair.prompt_text,
            "chosen": pair.chosen_text,
            "rejected": pair.rejected_text,
            "prompt_len": len(pair.prompt_ids),
            "chosen_len": len(pair.chosen_ids),
            "rejected_len": len(pair.rejected_ids),
            "truncated": pair.truncated,
            **pair_properties(pair.chosen_ids, pair.rejected_ids),
        }
        for pair in pairs
    ]
    return {name: [row[name] for row in rows] for name in SAMPLE_COLUMNS}


def token_columns(target: Target, pairs: Sequence[AuditPair], journal: Journal) -> Columns:
    """The columns of `tokens.parquet`.

    Args:
        target: the model whose tokens were measured.
        pairs: those that were chosen for it.
        journal: of the audit.

    Returns:
        Those of `record.TOKEN_COLUMNS`, pair by pair; no row where none was measured.
    """
    blocks = [journal.find("tokens", target.identity, pair.row) for pair in pairs]
    columns: Columns = {name: [] for name in TOKEN_COLUMNS}
    for block in blocks:
        if block is not None:
            whole = {
                "checkpoint": [target.name] * len(block["pair"]),
                "step": [target.step] * len(block["pair"]),
                "own_inner": [None] * len(block["pair"]),  # of a journal that was begun before there was one
                **block,
            }
            for name in TOKEN_COLUMNS:
                columns[name] += whole[name]
    return columns


def describe_checkpoints(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """What the summary says of each target.

    Args:
        measured: all targets.

    Returns:
        The rows of `record.Summary`'s `checkpoints`.
    """
    return [
        {
            "name": each.target.name,
            "step": each.target.step,
            "pairs": len(each.scan.positions),
            **summarize_columns(each.columns),
        }
        for each in measured
    ]


def describe_last(last: Measured, pairs: Sequence[AuditPair]) -> dict[str, Any]:
    """What the summary says of the last target.

    Args:
        last: that target.
        pairs: all pairs.

    Returns:
        The keys of `record.Summary` from `cosine` to `modules`, and `model`.
    """
    columns = last.columns
    there = [pairs[position] for position in last.scan.positions]
    return {
        "model": last.model,
        **summarize_columns(columns),
        "most_entangled": [
            {
                "pair": there[position].row,
                "where": there[position].where,
                "cosine": columns["cosine"][position],
                "case": CASE_NAMES[columns["case"][position]],
                "chosen": preview(there[position].chosen_text, there[position].rejected_text),
                "rejected": preview(there[position].rejected_text, there[position].chosen_text),
            }
            for position in most_entangled(columns["cosine"], _SHOWN)
        ],
        "modules": _modules(last),
    }


def describe_loss(loss: Loss) -> dict[str, Any]:
    """What the summary says of the loss.

    Args:
        loss: the loss.

    Returns:
        Its name and its hyperparameters.
    """
    return {"name": loss.name, **read_hyperparameters(loss)}


def _defined(measured: Measured) -> int:
    return sum(value is not None for value in measured.columns["cosine"])


def _modules(measured: Measured) -> dict[str, dict[str, float]] | None:
    sums: Mapping[str, Sequence[float]] = {name: each.tolist() for name, each in measured.scan.modules.items()}
    defined = _defined(measured)
    return summarize_modules(sums, defined) if sums and defined else None
