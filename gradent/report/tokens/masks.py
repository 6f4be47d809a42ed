"""The page of exported token masks, from `masks.parquet` alone: which tokens a masked loss contrasts."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradent.errors import DataFileError, InputError
from gradent.record.masks import read_masks
from gradent.record.token_rows import name_token
from gradent.report.page.html import Page, Section, write_page
from gradent.report.page.numbers import count, number, percent, plural
from gradent.report.page.parts import BigNumber, Notice, Numbers, Table, Word, Words
from gradent.text import visible
from gradent.version import __version__

__all__ = ["mask_words", "write_mask_report"]

_SIDES = ("chosen", "rejected")
_LISTED = 15  # tokens in each of the two tables
_LABEL = 18  # characters of a token in a table

_LEGEND = ("left out, mask below 1/2", "kept, mask above 1/2")

_LEAD = "A loss with token masks sums the log-ratios of kept tokens alone."

_Row = dict[str, Any]


def write_mask_report(
    masks: str | os.PathLike[str], page: str | os.PathLike[str] | None = None, *, pairs: int = 50
) -> Path:
    """Write a page of a file of masks: both responses of every pair, coloured by mask, kept tokens in bold."""
    if pairs < 1:
        raise InputError(f"write_mask_report: pairs={pairs!r}; accepted is a number of pairs >= 1.")
    source = Path(masks)
    rows: list[_Row] = read_masks(source).to_pylist()
    if not rows:
        raise DataFileError(f"{masks}: holds no token. Export the masks of data with at least one pair.")
    target = source.with_suffix(".html") if page is None else Path(page)
    return write_page(target, _to_page(rows, source.name, pairs))


def _to_page(rows: Sequence[_Row], source: str, limit: int) -> Page:
    numbers = sorted({row["pair"] for row in rows})
    shown = set(numbers[:limit])
    figures = []
    for side in _SIDES:
        part = _of(rows, side)
        note = f"{count(sum(row['kept'] for row in part))} of {plural(len(part), 'token')}"
        figures.append(BigNumber(f"Kept of {side}", _share_kept(rows, side), note))
        figures.append(BigNumber(f"Mean mask of {side}", number(_mean([row["mask"] for row in part]))))
    notices = []
    if len(numbers) > limit:
        text = f"The first {limit:,} of {len(numbers):,} pairs are shown; shares and tables are over all of them."
        notices.append(Notice("Not all pairs are on this page", text))
    shares = {side: _share_kept(rows, side) for side in _SIDES}
    title, lead = f"Kept: {shares['chosen']} of the chosen and {shares['rejected']} of the rejected tokens", _LEAD
    contrasted = [
        Section(
            "The responses",
            "Tokens in bold are kept. The deeper the colour, the farther a mask is from 1/2.",
            [_words([row for row in rows if row["pair"] in shown])],
        ),
        _ranking(rows, kept=True),
        _ranking(rows, kept=False),
    ]
    if all(row["kept"] for row in rows):
        title, lead, contrasted, notices = _describe_all_kept(rows), "", [], []
    return Page(
        title=title,
        lead=lead,
        facts=[
            ("Masks", source),
            ("Data", f"{plural(len(numbers), 'pair')}, {plural(len(rows), 'response token')}"),
            ("Mask", "m = σ(k(u − r)), from a token's learned score u; it is kept where u ≥ r, so where m ≥ 1/2"),
        ],
        sections=[
            Section("How much is kept", "", [Numbers(figures)]),
            *contrasted,
        ],
        foot=f"gradent {__version__}. The numbers behind this page are in {source}.",
        notices=notices,
    )


def _describe_all_kept(rows: Sequence[_Row]) -> str:
    """What a loss is whose masks leave no token out."""
    masks = [float(row["mask"]) for row in rows]
    if min(masks) == max(masks) == 1.0:
        return "All tokens are kept, with masks of 1: this run was DPO"
    return f"All tokens are kept: masks lie between {number(min(masks))} and {number(max(masks))}"


def _of(rows: Sequence[_Row], side: str) -> list[_Row]:
    return [row for row in rows if row["side"] == side]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _share_kept(rows: Sequence[_Row], side: str) -> str:
    return percent(_mean([float(row["kept"]) for row in _of(rows, side)]))


def mask_words(responses: Sequence[tuple[str, Sequence[tuple[str, float, bool]]]]) -> Words:
    """Responses, coloured by mask, kept tokens in bold."""
    texts = [(title, [_word(place, *token) for place, token in enumerate(tokens)]) for title, tokens in responses]
    return Words(texts, *_LEGEND)


def _word(place: int, text: str, mask: float, kept: bool, note: str = "") -> Word:
    state = "kept" if kept else "left out"
    return Word(text, mask - 0.5, f"{name_token(place, text)}: {state}, mask {number(mask)}{note}", strong=kept)


def _words(rows: Sequence[_Row]) -> Words:
    texts: dict[tuple[int, str], list[Word]] = {}
    order = {side: place for place, side in enumerate(_SIDES)}
    for row in sorted(rows, key=lambda row: (row["pair"], order.get(row["side"], len(order)), row["position"])):
        note = f", score {number(row['score'])}"
        word = _word(row["position"], row["token"], row["mask"], row["kept"], note)
        texts.setdefault((row["pair"], row["side"]), []).append(word)
    titled = [(f"Pair {pair}, {side}", words) for (pair, side), words in texts.items()]
    return Words(titled, *_LEGEND)


def _ranking(rows: Sequence[_Row], *, kept: bool) -> Section:
    """The tokens that were kept, or left out, the greatest number of times."""
    groups: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        groups[row["token"]].append(row)
    times = {text: sum(row["kept"] is kept for row in group) for text, group in groups.items()}
    ranked = sorted((text for text in groups if times[text]), key=lambda text: (-times[text], text))[:_LISTED]
    state = "kept" if kept else "left out"
    title = f"The tokens most often {state}"
    if not ranked:
        return Section(title, f"No token is {state}.", [])
    cells = []
    for text in ranked:
        some, every = times[text], len(groups[text])
        mask = number(_mean([row["mask"] for row in groups[text]]))
        cells.append([visible(text, _LABEL), count(some), count(every), percent(some / every), mask])
    header = ("Token", f"Times {state}", "Times in all", "Share", "Mean mask")
    return Section(title, "", [Table(header, cells, caption=title, figures_from=1)])
