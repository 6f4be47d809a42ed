"""The section on tokens: which ones pull the two gradients together, over all measured pairs and in a few of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gradent.record.token_rows import name_token
from gradent.report.audit.sections.records import AuditRecords, Row
from gradent.report.page.html import Section
from gradent.report.page.numbers import count, fixed, percent, plural, signed_number
from gradent.report.page.parts import Table, Word, Words, scaled_words
from gradent.text import visible

__all__ = ["token_section"]

_RANKED = 12
_PAIRS = 3  # pairs whose responses are shown token by token
_TOKENS = 400  # of a response


def token_section(records: AuditRecords) -> Section:
    """Tokens by what they add to the cosines."""
    title = "Tokens"
    serves = "Tells you whether it is the shared wording or what differs that ties the responses together."
    tokens = records.summary["tokens"]
    if tokens is None:
        text = "Tokens were not measured. `gradent audit ... --token-pairs 8` measures those of eight pairs."
        return Section(title, text, [], serves)
    cosine, whole, identical = tokens.get("cosine") or {}, tokens.get("tokens"), tokens.get("identical_tokens")
    differing = None if whole is None or identical is None else whole - identical
    rows = [
        ["From identical tokens", fixed(cosine.get("identical")), count(identical)],
        ["From differing tokens", fixed(cosine.get("differing")), count(differing)],
        ["Together", fixed(cosine.get("mean")), count(whole)],
    ]
    caption = "Where the mean cosine comes from"
    parts: list[Table | Words] = [Table(["", "Mean cosine", "Tokens"], rows, caption=caption, figures_from=1)]
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


def _ranking(tokens: Mapping[str, Any], kind: str) -> Table:
    least = tokens.get("least_count") or 1
    often = f", of those that occur {least} times or more" if least > 1 else ""
    rows = [
        [
            visible(str(row.get("token")), 40), fixed(row.get("sum")), fixed(row.get("mean")), count(row.get("count")),
            count(row.get("identical")),
        ]
        for row in tokens[kind][:_RANKED]
    ]  # fmt: skip
    header = ["Token", "Sum", "Mean", "Times", "Of them identical"]
    return Table(header, rows, caption=f"The most {kind} tokens by what they add to the cosines{often}", figures_from=1)


def _coloured(records: AuditRecords, tokens: Sequence[Row]) -> list[Words]:
    """The responses of the pairs with the largest cosine among those whose tokens were measured."""
    step = max((row["step"] for row in tokens), default=-1)
    measured = next((measured for measured in reversed(records.measured) if measured.step == step), None)
    if measured is None:
        return []
    columns = (measured.columns[name].tolist() for name in ("pair", "chosen_sq", "rejected_sq", "cosine"))
    scales = {pair: (math.sqrt(chosen * rejected), cosine) for pair, chosen, rejected, cosine in zip(*columns)}  # noqa: B905
    pairs: dict[int, list[Row]] = {}
    for row in tokens:
        if row["step"] == step and scales.get(row["pair"], (0.0, 0.0))[0] > 0:
            pairs.setdefault(row["pair"], []).append(row)
    shown = sorted(pairs, key=lambda pair: -scales[pair][1])[:_PAIRS]
    return [_words(f"Row {pair:,}, cosine {fixed(scales[pair][1])}", pairs[pair], scales[pair][0]) for pair in shown]


def _words(title: str, rows: Sequence[Row], scale: float) -> Words:
    texts = []
    for side in ("chosen", "rejected"):
        tokens = sorted((row for row in rows if row["side"] == side), key=lambda row: row["position"])
        words = [_word(row, scale) for row in tokens[:_TOKENS]]
        if len(tokens) > _TOKENS:
            words.append(Word("…", math.nan, f"{len(tokens) - _TOKENS:,} more tokens are in tokens.parquet"))
        texts.append((f"{title}: {side}", words))
    return scaled_words(texts, "disentangles", "entangles", bad_above=True)


def _word(row: Row, scale: float) -> Word:
    value, text, kind = row["entanglement"] / scale, row["token"], "identical" if row["identical"] else "differing"
    verb = "entangles" if value > 0 else "disentangles" if value < 0 else "neither"
    note = f"{name_token(row['position'], text)}: {verb} ({signed_number(value)} of the cosine), {kind}"
    return Word(text, value, note, strong=not row["identical"])
