"""`select`: from a scan and the data that it scanned to the data that is left.

Letters: P exactly measured pairs of the scan.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from gradent.errors import DataFileError, InputError
from gradent.loading.preference_files import Row, read_rows
from gradent.record.atomic import write_whole
from gradent.record.scans import ScanRecord, read_scan, read_scan_record
from gradent.record.table import Floats, Table
from gradent.scanning.digests import data_digest
from gradent.selecting.choose import Choice, choose, read_share, score_of
from gradent.selecting.rewrite import check_kind, write_rows
from gradent.text import printable

__all__ = ["SelectResult", "select"]

_LISTED = 5


@dataclass(frozen=True, kw_only=True)
class SelectResult:
    """What a selection left, and what went.

    Attributes:
        out: the data that is left.
        reasons_path: a JSON line a row that went: `row`, `where`, `by`, `score` and `reason`.
        kept: rows of the data that are left.
        dropped: rows that went.
        unscored: rows without a score, which are kept: they could not be scanned, or have no gradient.
        effect: of a step of plain gradient descent, of unit learning rate, on the mean loss of the exactly measured
            pairs, and of those of them that are left: the mean change of their chosen and rejected log-probs, nats, to
            first order. Keys `chosen_before`, `chosen_after`, `rejected_before`, `rejected_after` (means over all of
            them), `chosen_kept_before`, `chosen_kept_after` (over those that are left), `pairs` and `pairs_kept`; None
            where fewer than two of the exactly measured pairs are left, or none were.
        strata: of each value of `by_column`, rows before and after; empty without one.
    """

    out: Path
    reasons_path: Path
    kept: int
    dropped: int
    unscored: int
    effect: dict[str, float] | None
    strata: dict[str, tuple[int, int]]


def select(
    directory: str | os.PathLike[str],
    *,
    by: str,
    out: str | os.PathLike[str],
    drop: str | float | None = None,
    keep: str | float | None = None,
    threshold: float | None = None,
    weight: bool = False,
    by_column: str | None = None,
    data: str | os.PathLike[str] | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> SelectResult:
    """Write a scanned data set without the pairs that a score says harm, or with a weight for each.

    What is left stands in its order and, where `out` is a file of the data's kind, in its format: lines byte for byte,
    tables with their types. `OUT.dropped.jsonl` says of each row that went why. The same call writes the same files.

    Args:
        directory: what `gradent.scan` wrote.
        by: a score by its name: edit_distance, shared_ends, chosen_len, chosen_logp, margin, reward_margin, ches,
            ches_normalized, head, head_change; exact, predicted_change or sample_change where every pair was measured
            exactly; or random, for comparison.
        out: the file to write: .jsonl, .jsonl.gz, .json or .parquet.
        drop: the share to leave out, "10%" or 0.1: the worst by that score.
        keep: the share to keep, "64%" or 0.64.
        threshold: leave out what is worse than this value of the score: above it where more is worse, below it where
            less is.
        weight: leave out nothing, and give each row a `weight` by rank, from 0 (the worst) to 2 (the best), 1 on
            average.
        by_column: a column of the data; the share is left out of each of its values, each of which keeps one row at
            least (with a threshold, all of a value's rows may go; it is said).
        data: where the scanned data is now, if it has moved.
        seed: of "random".
        quiet: print nothing.

    Returns:
        Where the files are, what went, and what a step on what is left does.

    Raises:
        InputError: an argument is none that is accepted, or the score is not known of every pair.
        DataFileError: the scan or the data cannot be read, or the data is not what was scanned.

    Example:
        >>> gradent.select("my-scan", by="ches_normalized", drop="10%", out="kept.jsonl").kept  # doctest: +SKIP
    """
    share = _read_how(drop, keep, threshold, weight)
    target, place = Path(out), Path(directory)
    check_kind(target)
    record = read_scan_record(place / "scan.json")
    table = _read_table(place)
    source = str(record["data"]["source"] if data is None else os.fspath(data))
    rows = read_rows(source, record["data"]["split"])
    if data_digest(rows) != record["data"]["digest"]:
        raise DataFileError(
            f"{source}: is not the data that {place} scanned ({record['data']['rows']} rows then, {len(rows)} now). "
            "Give that data with --data, or scan this one."
        )
    if target.resolve() == Path(source).resolve():
        raise InputError(f"{target}: is the scanned data itself. Choose another --out.")
    score, sign, label = score_of(table, by, seed)
    harm = sign * score
    numbers = [int(row) for row in table["pair"]]
    strata = None if by_column is None else [_stratum(rows[number], by_column) for number in numbers]
    worst = None if threshold is None else sign * threshold
    chosen = choose(harm, score, label, strata, drop=share, worst=worst, weigh=weight)
    gone = {number for number, kept in zip(numbers, chosen.keep, strict=True) if not kept}
    left = [row.index for row in rows if row.index not in gone]
    if len(gone) == len(numbers):
        raise InputError(
            f"threshold is {threshold}: no pair would be left. Scores go from {_range(score)} (--threshold)."
        )
    weights = None if not weight else {row.index: 1.0 for row in rows} | dict(zip(numbers, chosen.weights, strict=True))
    write_rows(target, rows, left, Path(source), weights)
    reasons_path = target.with_name(f"{target.name}.dropped.jsonl")
    _write_reasons(reasons_path, table, chosen, by, score)
    result = SelectResult(
        out=target, reasons_path=reasons_path, kept=len(left), dropped=len(gone),
        unscored=len(rows) - int(np.isfinite(harm).sum()), effect=_effect(place, table, chosen.weights),
        strata=_count_strata(strata, chosen),
    )  # fmt: skip
    if not quiet:
        _print(result, record, by, by_column)
    return result


def _read_how(
    drop: str | float | None, keep: str | float | None, threshold: float | None, weight: bool
) -> float | None:
    """The share that goes, None for a threshold or weights; refuses none of the four ways, or more than one."""
    given = {"drop": drop, "keep": keep, "threshold": threshold, "weight": weight or None}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise InputError(
            f"{' and '.join(named) or 'none of drop, keep, threshold and weight'} given; accepted is exactly one of "
            "drop (10%), keep (64%), threshold and weight."
        )
    if drop is not None:
        return read_share(str(drop), "drop")
    return None if keep is None else 1 - read_share(str(keep), "keep")


def _read_table(place: Path) -> Table:
    table = read_scan(place / "scan.parquet")
    return Table.read({
        name: table[name].to_pylist() if str(table.schema.field(name).type) in {"string", "bool"}
        else table[name].to_numpy(zero_copy_only=False)
        for name in table.column_names
    })  # fmt: skip


def _stratum(row: Row, column: str) -> str:
    if column not in row.values:
        raise InputError(
            f"{row.where}: has no {column!r}; the row has {sorted(map(str, row.values))} (command line: --by-column)."
        )
    return f"{column} {json.dumps(row.values[column], ensure_ascii=False, sort_keys=True, default=str)}"


def _effect(place: Path, table: Table, weights: Floats) -> dict[str, float] | None:
    """What a step on the exactly measured pairs does, with all of them and with what the weights leave."""
    path = place / "effects.npy"
    if not path.is_file():
        return None
    try:
        effects = np.load(path)  # [2, P, P]: what pair j does to the responses of pair i in a step on the mean of all
    except (OSError, ValueError) as error:
        raise DataFileError(f"{path}: cannot be read ({error}). Run the same scan again.") from error
    given = weights[table["is_exact"]]
    left = given > 0
    if effects.shape != (2, len(given), len(given)):
        raise DataFileError(f"{path}: does not fit scan.parquet beside it. Run the same scan again.")
    if left.sum() < 2:
        return None
    before, after = effects.sum(2), effects @ given * (len(given) / given.sum())
    found = {
        f"{side}_{name}": float(values[number].mean())
        for number, side in enumerate(("chosen", "rejected"))
        for name, values in (("before", before), ("after", after))
    }
    kept = {
        f"chosen_kept_{name}": float(values[0][left].mean()) for name, values in (("before", before), ("after", after))
    }
    return {**found, **kept, "pairs": float(len(given)), "pairs_kept": float(left.sum())}


def _write_reasons(path: Path, table: Table, chosen: Choice, by: str, score: Floats) -> None:
    lines = [
        json.dumps(
            {
                "row": int(table["pair"][place]), "where": table["where"][place], "by": by,
                "score": float(score[place]), "reason": reason,
            },
            ensure_ascii=False,
        )
        for place, reason in enumerate(chosen.reasons) if reason
    ]  # fmt: skip
    content = "".join(line + "\n" for line in lines).encode("utf-8", errors="replace")
    write_whole(path, lambda handle: handle.write(content))


def _count_strata(strata: Sequence[str] | None, chosen: Choice) -> dict[str, tuple[int, int]]:
    counts: dict[str, tuple[int, int]] = {}
    for stratum, kept in zip(strata or (), chosen.keep, strict=strata is not None):
        before, after = counts.get(stratum, (0, 0))
        counts[stratum] = before + 1, after + int(kept)
    return dict(sorted(counts.items()))


def _range(score: Floats) -> str:
    known = score[np.isfinite(score)]
    return f"{known.min():.6g} to {known.max():.6g}"


def _print(result: SelectResult, record: ScanRecord, by: str, by_column: str | None) -> None:
    console = Console(highlight=False)
    lines = [f"{result.kept} rows kept, {result.dropped} left out by {by}."]
    if result.unscored:
        lines.append(f"{result.unscored} rows have no score and are kept.")
    if result.effect is not None:
        effect = result.effect
        lines.append(
            f"A step on the {effect['pairs']:.0f} exactly measured pairs, to first order, in nats a unit of learning "
            f"rate: mean change of chosen {effect['chosen_before']:+.4g} → {effect['chosen_after']:+.4g} with those "
            f"that are left, of rejected {effect['rejected_before']:+.4g} → {effect['rejected_after']:+.4g}."
        )
        error = (record["exact"] or {}).get("error") or 0.0
        if error > 0.05:
            lines.append(f"These rest on sketches of the gradients, whose sums are off by {error:.0%}.")
    if by_column is not None:
        hit = [name for name, (before, after) in result.strata.items() if after == 0 or 2 * after < before]
        if hit:
            more = f" and {len(hit) - _LISTED} more" if len(hit) > _LISTED else ""
            lines.append(f"More than half of these went: {', '.join(hit[:_LISTED])}{more}.")
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)
