"""`audit_tokens`: one pair of a data file, token by token, as a record, a picture and a page.

A row that holds a group of rollouts goes to `gradent.auditing.group_tokens`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from gradent.auditing.console import make_tell, warnings_as_notes
from gradent.auditing.group_tokens import GroupTokenAudit, audit_group
from gradent.auditing.measuring.tokens import named_errors, refuse_non_finite
from gradent.auditing.state.config import TokenConfig
from gradent.kernels.common.budget import parse_budget
from gradent.loading.preferences import AuditPair, batch_of
from gradent.loading.prepare import Prepared, describe_model, prepare
from gradent.loading.runs.last import last_of_run
from gradent.measurement import measure
from gradent.record import TokenRecord, write_token_record
from gradent.record.atomic import make_directory
from gradent.record.masks import read_pair_masks
from gradent.record.token_rows import TokenRow, list_tokens, rank_ends
from gradent.report.page.numbers import signed_number
from gradent.report.page.unit import check_lr
from gradent.report.terminal.tables import new_table
from gradent.report.tokens.page import write_token_report
from gradent.text import printable, token_texts, visible
from gradent.tokens.effects import token_effects
from gradent.tokens.gram import TokenGram
from gradent.tokens.matrix import measure_tokens

__all__ = ["TokenAudit", "audit_tokens"]

_FILES = ("tokens.json", "tokens.png", "tokens.html")
_SHOWN = 5  # tokens at either end in the printed table
_COLUMNS = ("response", "position", "token", "", "entanglement", "share", "margin step")  # of that table


@dataclass(frozen=True, kw_only=True)
class TokenAudit:
    """What was found of one pair's tokens and where it is."""

    record: TokenRecord  # the contents of `tokens.json`, from which `gradent.report.write_token_report` makes the page
    record_path: Path  # `tokens.json`; `gradent.record.read_token_record` reads it
    picture_path: Path  # `tokens.png`, the heat map of `TokenGram.plot`
    page_path: Path  # `tokens.html`, one file that loads nothing

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files that were written, the page first."""
        return self.page_path, self.picture_path, self.record_path


def audit_tokens(config: TokenConfig) -> TokenAudit | GroupTokenAudit:
    """Measure the tokens of one row and write `tokens.json`, `tokens.png` and `tokens.html`, or those of a group."""
    started = time.monotonic()
    parse_budget(config.memory_budget)
    check_lr(config.lr)
    directory = make_directory(config.out, _FILES)
    notes: list[str] = []
    tell = make_tell(notes, config.quiet)
    config = replace(config, model=last_of_run(config.model, config.adapter, tell))
    ready = prepare(config, tell, only=config.pair)
    if ready.material.group is not None:
        return audit_group(ready, ready.material.group, config, notes=notes, tell=tell, started=started)
    (pair,) = ready.material.pairs.pairs
    responses = pair.chosen_ids, pair.rejected_ids
    masks = None if config.masks is None else read_pair_masks(config.masks, pair.row, responses)
    with warnings_as_notes(tell):
        gram, figures = _measure(ready, pair, config)
    content = {
        "model": describe_model(ready.model, ready.source, ready.step, ready.device),
        "data": {
            "source": config.data, "split": config.split, "row": pair.row, "rows": ready.material.rows,
            "where": pair.where, "truncated": pair.truncated,
        },
        **figures, "masks": masks,
        "settings": {
            "max_length": ready.material.max_length, "add_eos": ready.material.add_eos,
            "memory_budget": config.memory_budget, "by_module": config.by_module, "dtype": config.dtype,
            "device": config.device, **({} if config.lr is None else {"lr": config.lr}),
        },
        "notes": notes, "seconds": round(time.monotonic() - started, 3),
    }  # fmt: skip
    result = _write(directory, content, gram)
    if not config.quiet:
        _print(result.record, Console(highlight=False))
    return result


def _measure(ready: Prepared, pair: AuditPair, config: TokenConfig) -> tuple[TokenGram, dict[str, Any]]:
    """The token matrix, and what the record says of whole responses, of the matrix and of a margin step's effects."""
    model, budget, batch = ready.model, config.memory_budget, batch_of([pair])
    with named_errors(pair, "tokens", ", or --dtype bfloat16"):
        total = measure(model, batch, by_module=config.by_module, memory_budget=budget)
        (gram,) = measure_tokens(model, batch, memory_budget=budget, progress=not config.quiet)
        (effects,) = batch.split_tokens(token_effects(model, batch, toward="margin"))
    refuse_non_finite(pair, (gram.inner.flatten(), gram.chosen_sq, gram.rejected_sq, *effects), "another --pair")
    split = gram.split()
    sides = {
        "chosen": (pair.chosen_ids, gram.chosen_sq, effects[0], total.chosen_logp, total.chosen_sq),
        "rejected": (pair.rejected_ids, gram.rejected_sq, effects[1], total.rejected_logp, total.rejected_sq),
    }
    responses = {
        side: {
            "ids": ids, "tokens": token_texts(ready.material.tokenizer, ids), "squares": squares.tolist(),
            "effects": moves.tolist(), "logp": float(logp), "sq": float(square),
        }
        for side, (ids, squares, moves, logp, square) in sides.items()
    }  # fmt: skip
    prompt = list(pair.prompt_ids)
    return gram, {
        "prompt": {"ids": prompt, "text": str(ready.material.tokenizer.decode(prompt))}, **responses,
        "inner": gram.inner.tolist(), "alignment": [list(match) for match in gram.alignment],
        "split": {**asdict(split), "identical": split.identical, "differing": split.differing},
        "modules": total.modules and {name: [*map(float, parts)] for name, parts in total.modules.items()},
    }  # fmt: skip


def _write(directory: Path, content: dict[str, Any], gram: TokenGram) -> TokenAudit:
    record_path, picture_path, page_path = (directory / name for name in _FILES)
    for earlier in (record_path, picture_path, page_path):  # another pair's files must not stand beside these
        earlier.unlink(missing_ok=True)
    record = write_token_record(record_path, content)
    title = f"Row {record['data']['row']} of {record['data']['source']} on {record['model']['checkpoint']}"
    gram.plot(record["chosen"]["tokens"], record["rejected"]["tokens"], path=picture_path, title=title)
    page = write_token_report(directory)
    return TokenAudit(record=record, record_path=record_path, picture_path=picture_path, page_path=page)


def _print(record: TokenRecord, console: Console) -> None:
    """The split, and the tokens at either end."""
    data, split = record["data"], record["split"]
    inner = split["identical"] + split["differing"]
    scale = (record["chosen"]["sq"] * record["rejected"]["sq"]) ** 0.5
    console.print(Text(f"\nRow {data['row']} of {printable(data['source'])} ({printable(data['where'])})", "bold"))
    cosine = f"cosine {inner / scale:+.3f}" if scale else "no cosine"
    console.print(Text(f"⟨g_w, g_l⟩ {signed_number(inner)}, {cosine}"))
    for kind in ("identical", "differing"):
        share = f" ({split[kind] / inner:.1%})" if inner else ""
        console.print(Text(f"  {kind} tokens, {split[f'{kind}_tokens']}: {signed_number(split[kind])}{share}"))
    ends = rank_ends(list_tokens(record), attrgetter("entanglement"), _SHOWN)
    for kind, rows in zip(("entangling", "disentangling"), ends, strict=True):
        if rows:
            console.print(Text(f"\nThe most {kind} tokens (positions counted from 0)"))
            console.print(new_table(*_COLUMNS, text={0, 2, 3}, rows=[_cells(row) for row in rows]))
        else:
            console.print(Text(f"\nNo token is {kind}."))


def _cells(row: TokenRow) -> list[str]:
    share = "-" if row.share is None else f"{row.share:+.1%}"
    entanglement, effect = signed_number(row.entanglement), signed_number(row.effect)
    return [row.side, str(row.position), visible(row.text, 24), row.kind, entanglement, share, effect]
