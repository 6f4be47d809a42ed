"""`audit_tokens`: one pair of a data file, token by token, as a record, a picture and a page.

What needs torch is imported by the call, so that importing this module (and with it the command line) is quick.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradent.auditing.pair_masks import read_pair_masks
from gradent.auditing.tell import teller, warnings_told
from gradent.record import TokenRecord, write_token_record
from gradent.record.atomic import make_directory
from gradent.record.token_rows import TokenRow, list_tokens, rank_ends
from gradent.report.page.numbers import signed_number
from gradent.report.terminal.tables import new_table
from gradent.report.tokens.page import write_token_report
from gradent.text import printable, token_texts, visible

if TYPE_CHECKING:
    from torch import Tensor

    from gradent.loading.preferences import AuditPair
    from gradent.loading.prepare import Prepared
    from gradent.pair_gram import PairGram
    from gradent.tokens.gram import TokenGram

__all__ = ["TokenAudit", "audit_tokens"]

_FILES = ("tokens.json", "tokens.png", "tokens.html")
_SHOWN = 5  # tokens at either end in the printed table


@dataclass(frozen=True, kw_only=True)
class TokenAudit:
    """What was found of one pair's tokens and where it is.

    Attributes:
        record: the contents of `tokens.json`, from which `gradent.report.write_token_report` makes the page.
        record_path: `tokens.json`; `gradent.record.read_token_record` reads it.
        picture_path: `tokens.png`, the heat map of `TokenGram.plot`.
        page_path: `tokens.html`, one file that loads nothing.
    """

    record: TokenRecord
    record_path: Path
    picture_path: Path
    page_path: Path


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """Whole responses, token matrix, and both responses' effects of a margin step."""

    whole: PairGram
    gram: TokenGram
    effects: tuple[Tensor, Tensor]


def audit_tokens(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    pair: int,
    out: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    split: str = "train",
    max_length: int | None = None,
    memory_budget: int | str | None = None,
    by_module: bool = False,
    masks: str | os.PathLike[str] | None = None,
    dtype: str = "float32",
    device: str | None = None,
    add_eos: bool = True,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> TokenAudit:
    """Measure the tokens of one preference pair and write `tokens.json`, `tokens.png` and `tokens.html`.

    Args:
        model: as in `audit`, and so are the others but these:
        data: as in `audit`.
        pair: row of the data, counted from 0.
        out: directory for the three files, made where needed; those of an earlier call there are replaced.
        adapter: as in `audit`.
        split: as in `audit`.
        max_length: as in `audit`.
        memory_budget: as in `audit`.
        by_module: also sum up which modules the inner product comes from.
        masks: a file that `TokenMaskedDPOTrainer.export_masks` wrote for the same data: the page then also shows which
            of the pair's tokens the masked loss keeps.
        dtype: as in `audit`.
        device: as in `audit`.
        add_eos: as in `audit`.
        trust_remote_code: as in `audit`.
        quiet: print nothing.

    Returns:
        The record and the paths of the files.
    """
    from gradent.kernels.plan import parse_budget  # noqa: PLC0415
    from gradent.loading.prepare import prepare  # noqa: PLC0415

    started = time.monotonic()
    parse_budget(memory_budget)
    directory = make_directory(out, _FILES)
    notes: list[str] = []
    tell = teller(notes, quiet)
    ready = prepare(
        os.fspath(model), data, tell=tell, only=pair, adapter=None if adapter is None else os.fspath(adapter),
        split=split, max_length=max_length, max_pairs=None, dtype=dtype, device=device, skip_bad_rows=False,
        add_eos=add_eos, trust_remote_code=trust_remote_code, seed=0,
    )  # fmt: skip
    (row,) = ready.material.pairs.pairs
    kept = None if masks is None else read_pair_masks(masks, row.row, (row.chosen_ids, row.rejected_ids))
    with warnings_told(tell):
        measured = _measure(ready.model, row, memory_budget, by_module, quiet)
    settings = {
        "max_length": ready.material.max_length, "add_eos": ready.material.add_eos, "memory_budget": memory_budget,
        "by_module": by_module, "dtype": dtype, "device": device,
    }  # fmt: skip
    content = {
        **_describe(ready, row, os.fspath(data), split),
        **_figures(ready, row, measured),
        "masks": kept,
        "settings": settings,
        "notes": notes,
        "seconds": round(time.monotonic() - started, 3),
    }
    result = _write(directory, content, measured.gram)
    if not quiet:
        _print(result.record, Console(highlight=False))
    return result


def _measure(model: Any, pair: AuditPair, memory_budget: int | str | None, by_module: bool, quiet: bool) -> _Measured:
    from gradent.auditing.measuring.tokens import named_errors, refuse_non_finite  # noqa: PLC0415
    from gradent.measurement import measure  # noqa: PLC0415
    from gradent.pairs.batch import PairBatch  # noqa: PLC0415
    from gradent.tokens.effects import token_effects  # noqa: PLC0415
    from gradent.tokens.matrix import measure_tokens  # noqa: PLC0415

    batch = PairBatch.from_tokens([(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)])
    with named_errors(pair, "tokens", ", or --dtype bfloat16"):
        whole = measure(model, batch, by_module=by_module, memory_budget=memory_budget)
        (gram,) = measure_tokens(model, batch, memory_budget=memory_budget, progress=not quiet)
        (effects,) = batch.split_tokens(token_effects(model, batch, toward="margin"))
    refuse_non_finite(pair, (gram.inner.flatten(), gram.chosen_sq, gram.rejected_sq, *effects), "another --pair")
    return _Measured(whole=whole, gram=gram, effects=effects)


def _describe(ready: Prepared, pair: AuditPair, data: str, split: str) -> dict[str, Any]:
    return {
        "model": ready.describe_model(),
        "data": {
            "source": data,
            "split": split,
            "row": pair.row,
            "rows": ready.material.rows,
            "where": pair.where,
            "truncated": pair.truncated,
        },
    }


def _figures(ready: Prepared, pair: AuditPair, measured: _Measured) -> dict[str, Any]:
    gram, whole, split = measured.gram, measured.whole, measured.gram.split()
    sides = {
        "chosen": (pair.chosen_ids, gram.chosen_sq, measured.effects[0], whole.chosen_logp, whole.chosen_sq),
        "rejected": (pair.rejected_ids, gram.rejected_sq, measured.effects[1], whole.rejected_logp, whole.rejected_sq),
    }
    responses = {
        side: {
            "ids": ids,
            "tokens": token_texts(ready.material.tokenizer, ids),
            "squares": squares.tolist(),
            "effects": effects.tolist(),
            "logp": float(logp),
            "sq": float(square),
        }
        for side, (ids, squares, effects, logp, square) in sides.items()
    }
    parts = None if whole.modules is None else whole.modules.items()
    return {
        "prompt": {"ids": pair.prompt_ids, "text": str(ready.material.tokenizer.decode(pair.prompt_ids))},
        **responses,
        "inner": gram.inner.tolist(),
        "alignment": [list(each) for each in gram.alignment],
        "split": {**asdict(split), "identical": split.identical, "differing": split.differing},
        "modules": None if parts is None else {name: [float(each) for each in part] for name, part in parts},
    }


def _write(directory: Path, content: dict[str, Any], gram: TokenGram) -> TokenAudit:
    record_path, picture_path, page_path = (directory / name for name in _FILES)
    for earlier in (record_path, picture_path, page_path):  # another pair's files must not stand beside these
        earlier.unlink(missing_ok=True)
    record = write_token_record(record_path, content)
    gram.plot(
        record["chosen"]["tokens"],
        record["rejected"]["tokens"],
        path=picture_path,
        title=f"Row {record['data']['row']} of {record['data']['source']} on {record['model']['checkpoint']}",
    )
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
            console.print(_token_table(rows))
        else:
            console.print(Text(f"\nNo token is {kind}."))


def _token_table(rows: Sequence[TokenRow]) -> Table:
    cells = [
        [
            row.side, str(row.position), visible(row.text, 24), row.kind, signed_number(row.entanglement),
            "-" if row.share is None else f"{row.share:+.1%}", signed_number(row.effect),
        ]
        for row in rows
    ]  # fmt: skip
    names = ("response", "position", "token", "", "entanglement", "share", "margin step")
    return new_table(*names, text={0, 2, 3}, rows=cells)
