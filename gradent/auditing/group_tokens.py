"""One group of rollouts of a data file, token by token, as a record and a page: whose tokens pull a positive down."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from gradent.auditing.console import warnings_as_notes
from gradent.auditing.measuring.tokens import named_errors
from gradent.auditing.state.config import TokenConfig
from gradent.errors import InputError
from gradent.loading.prepare import Prepared, describe_model
from gradent.loading.rollouts import RolloutGroup
from gradent.record import GroupTokenRecord, write_group_tokens
from gradent.record.atomic import make_directory
from gradent.record.group_rows import GroupTokenRow, list_group_tokens, rank_group_tokens
from gradent.report.page.numbers import NOTHING, number, signed_number
from gradent.report.terminal.tables import new_table
from gradent.report.tokens.groups import describe_correlation, write_group_report
from gradent.text import printable, token_texts, visible
from gradent.tokens.influence import TokenInfluence, token_influence

__all__ = ["GroupTokenAudit", "audit_group"]

_FILES = ("group_tokens.json", "group_tokens.html")
_SHOWN = 3  # tokens for each positive in each of the printed tables
_COLUMNS = ("moved", "by", "position", "token", "influence", "NTHR")


@dataclass(frozen=True, kw_only=True)
class GroupTokenAudit:
    """What was found of a group's tokens and where it is."""

    record: GroupTokenRecord  # the contents of `group_tokens.json`
    record_path: Path  # `gradent.record.read_group_tokens` reads it
    page_path: Path  # `group_tokens.html`, one file that loads nothing

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files that were written, the page first."""
        return self.page_path, self.record_path


def audit_group(
    ready: Prepared,
    group: RolloutGroup,
    config: TokenConfig,
    *,
    notes: list[str],
    tell: Callable[[str], None],
    started: float,
) -> GroupTokenAudit:
    """Measure what the tokens of one group's rollouts do to its positive ones; write the record and the page."""
    for name, asked in (("--masks", config.masks is not None), ("--by-module", config.by_module)):
        if asked:
            raise InputError(f"{group.where}: the row is a group of rollouts, and {name} is for pairs. Leave it out.")
    directory = make_directory(config.out, _FILES)
    weight = torch.tensor(group.weights, dtype=torch.float64)
    with warnings_as_notes(tell), named_errors(group, "tokens", ", or --dtype bfloat16"):
        (found,) = token_influence(ready.model, group.batch, weight, memory_budget=config.memory_budget)
    content = {
        "model": describe_model(ready.model, ready.source, ready.step, ready.device),
        "data": {
            "source": config.data, "split": config.split, "row": group.row, "rows": ready.material.rows,
            "where": group.where, "truncated": group.truncated, "weights_from": group.weights_from,
        },
        "settings": {
            "max_length": ready.material.max_length, "truncation_mode": ready.material.how.truncation_mode,
            "add_eos": ready.material.add_eos,
            "memory_budget": config.memory_budget, "dtype": config.dtype, "device": config.device,
            **({} if config.lr is None else {"lr": config.lr}),
        },
        **_figures(found, group, ready.material.tokenizer),
        "notes": notes, "seconds": round(time.monotonic() - started, 3),
    }  # fmt: skip
    record_path, page_path = (directory / name for name in _FILES)
    for earlier in (record_path, page_path):  # another group's files must not stand beside these
        earlier.unlink(missing_ok=True)
    record = write_group_tokens(record_path, content)
    result = GroupTokenAudit(record=record, record_path=record_path, page_path=write_group_report(directory))
    if not config.quiet:
        _print(record, Console(highlight=False))
    return result


def _figures(found: TokenInfluence, group: RolloutGroup, tokenizer: Any) -> dict[str, Any]:
    """What the record says of the completions and of what moves them."""
    rollouts = [
        {"ids": ids, "tokens": token_texts(tokenizer, ids), "weight": weight}
        for ids, weight in zip(group.completion_ids, group.weights, strict=True)
    ]
    scores = found.nthr or {}
    influence = [
        {
            "positive": place[0], "rollout": place[1], "values": values.tolist(),
            "nthr": scores[place].tolist() if place in scores else None,
        }
        for place, values in found.influence.items()
    ]  # fmt: skip
    correlations = [{"positive": i, "correlation": _or_null(value)} for i, value in found.correlations.items()]
    return {
        "prompt": {"ids": group.prompt_ids, "text": str(tokenizer.decode(group.prompt_ids))}, "rollouts": rollouts,
        "influence": influence, "correlation": _or_null(found.correlation), "correlations": correlations,
    }  # fmt: skip


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _print(record: GroupTokenRecord, console: Console) -> None:
    """The tokens of negatives at either end, for each positive, and the correlation."""
    data, rollouts = record["data"], record["rollouts"]
    console.print(Text(f"\nRow {data['row']} of {printable(data['source'])} ({printable(data['where'])})", "bold"))
    weights = ", ".join(f"{place}: {signed_number(each['weight'])}" for place, each in enumerate(rollouts))
    console.print(Text(f"Weights of its {len(rollouts)} completions, from {data['weights_from']}: {weights}"))
    console.print(Text(describe_correlation(record)))
    ends = rank_group_tokens(record, list_group_tokens(record), _SHOWN)
    for what, rows in zip(("pull a raised completion down", "push a raised completion up"), ends, strict=True):
        if rows:
            console.print(Text(f"\nThe tokens of lowered completions that {what} most"))
            console.print(new_table(*_COLUMNS, text={3}, rows=[_cells(row) for row in rows]))
        else:
            console.print(Text(f"\nNo token of a lowered completion would {what}."))


def _cells(row: GroupTokenRow) -> list[str]:
    score = NOTHING if row.nthr is None else number(row.nthr)
    where = str(row.positive), str(row.rollout), str(row.position)
    return [*where, visible(row.text, 24), signed_number(row.influence), score]
