"""The section on tokens: which ones pull the two gradients together, over all measured pairs and in a few of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gradent.report.audit.records import AuditRecords
from gradent.report.page.html import Section, Table
from gradent.report.page.numbers import count, fixed, percent, plural, signed_number
from gradent.report.page.parts import Word, Words
from gradent.text import visible

__all__ = ["token_section"]

_RANKED = 12
_PAIRS = 3  # pairs whose responses are shown token by token
_TOKENS = 400  # of a response


def token_section(records: AuditRecords) -> Section:
    """Tokens by what they add to the cosines."""
    title = "Tokens"
    serves = "Decides: whether it is the shared wording or what differs that ties the responses together."
    tokens = records.summary["tokens"]
    if tokens is None:
        text = "Tokens were not measured. `gradent audit ... --token-pairs 8` measures those of eight pairs."
        return Section(title, text, [], serves)
    parts: list[Table | Words] = [_split(tokens)]
    parts += [_ranking(tokens, kind) for kind in ("entangling", "disentangling") if tokens.get(kind)]
    if records.tokens is not None:
        parts += _coloured(records, records.tokens)
    aligned, facing = tokens.get("aligned") or {}, tokens.get("facing") or {}
    return Section(
        title,
        f"Over {plural(tokens.get('pairs') or 0, 'pair')} spread over all cosines. Of {count(aligned.get('count'))} "
        f"identical tokens and their matches, {percent(aligned.get('share'))} have a positive inner product; of "
        f"{count(facing.get('count'))} differing tokens that face each other, {percent(facing.get('share'))} a "
        "negative one.",
        parts,
        serves,
    )


def _split(tokens: Mapping[str, Any]) -> Table:
    cosine, whole, identical = tokens.get("cosine") or {}, tokens.get("tokens"), tokens.get("identical_tokens")
    differing = None if whole is None or identical is None else whole - identical
    rows = [
        ["From identical tokens", fixed(cosine.get("identical")), count(identical)],
        ["From differing tokens", fixed(cosine.get("differing")), count(differing)],
        ["Together", fixed(cosine.get("mean")), count(whole)],
    ]
    return Table(["", "Mean cosine", "Tokens"], rows, caption="Where the mean cosine comes from", figures_from=1)


def _ranking(tokens: Mapping[str, Any], kind: str) -> Table:
    least = tokens.get("least_count") or 1
    often = f", of those that occur {least} times or more" if least > 1 else ""
    rows = [
        [
            visible(str(row.get("token")), 40),
            fixed(row.get("sum")),
            fixed(row.get("mean")),
            count(row.get("count")),
            count(row.get("identical")),
        ]
        for row in tokens[kind][:_RANKED]
    ]
    header = ["Token", "Sum", "Mean", "Times", "Of them identical"]
    return Table(header, rows, caption=f"The most {kind} tokens by what they add to the cosines{often}", figures_from=1)


def _coloured(records: AuditRecords, tokens: Mapping[str, Sequence[Any]]) -> list[Words]:
    """The responses of the pairs with the largest cosine among those whose tokens were measured."""
    step = int(max(tokens["step"], default=-1))
    measured = next((each for each in reversed(records.measured) if each.step == step), None)
    if measured is None:
        return []
    columns = measured.columns
    scales = {
        pair: (math.sqrt(chosen * rejected), cosine)
        for pair, chosen, rejected, cosine in zip(
            measured.pairs, columns["chosen_sq"], columns["rejected_sq"], columns["cosine"], strict=True
        )
    }
    there = [pair for pair in dict.fromkeys(tokens["pair"]) if scales.get(pair, (0.0, 0.0))[0] > 0]
    shown = sorted(there, key=lambda pair: -scales[pair][1])[:_PAIRS]
    return [_words(tokens, pair, *scales[pair], step) for pair in shown]


def _words(tokens: Mapping[str, Sequence[Any]], pair: int, scale: float, cosine: float, step: int) -> Words:
    texts, largest = [], 0.0
    for side in ("chosen", "rejected"):
        rows = [
            row
            for row, (each, which, at) in enumerate(zip(tokens["pair"], tokens["side"], tokens["step"], strict=True))
            if (each, which, at) == (pair, side, step)
        ]
        rows.sort(key=lambda row: tokens["position"][row])
        pieces = [_word(tokens, row, scale) for row in rows[:_TOKENS]]
        if len(rows) > _TOKENS:
            pieces.append(Word("…", math.nan, f"{len(rows) - _TOKENS:,} more tokens are in tokens.parquet"))
        largest = max([largest, *(abs(piece.value) for piece in pieces if math.isfinite(piece.value))])
        texts.append((f"Row {pair:,}, cosine {fixed(cosine)}: {side}", pieces))
    below, above = f"disentangles, down to {signed_number(-largest)}", f"entangles, up to {signed_number(largest)}"
    return Words(texts, below, above, bad_above=True)


def _word(tokens: Mapping[str, Sequence[Any]], row: int, scale: float) -> Word:
    value, identical = tokens["entanglement"][row] / scale, tokens["identical"][row]
    verb = "entangles" if value > 0 else "disentangles" if value < 0 else "neither"
    text, kind = str(tokens["token"][row]), "identical" if identical else "differing"
    note = f"{tokens['position'][row]} · {visible(text, 18)}: {verb} ({signed_number(value)} of the cosine), {kind}"
    return Word((text or visible("")).replace("\n", "⏎\n"), value, note, strong=not identical)
