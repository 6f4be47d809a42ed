"""The page of one pair's tokens, from the `tokens.json` in its directory.

Letters: T_w and T_l completion tokens of chosen and rejected; a a chosen token, b a rejected one.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import numpy as np

from gradent.figures.charts import HeatMap, token_cosines
from gradent.record import TokenRecord, read_token_record
from gradent.record.token_rows import TokenRow, list_tokens, rank_ends
from gradent.report.page.html import Page, Section, write_page
from gradent.report.page.numbers import fixed, number, percent, signed_number
from gradent.report.page.parts import Cell, Quote, Table, Word, Words, scaled_words
from gradent.report.page.unit import StepUnit
from gradent.report.tokens.masks import mask_words
from gradent.text import visible

__all__ = ["write_token_report"]

_SIDES = ("chosen", "rejected")
_RANKED = 10  # tokens in each of the two tables
_MODULES = 15
_NEAR_ZERO = 0.01  # a cosine below which shares of it are not told


def write_token_report(directory: str | os.PathLike[str], lr: float | None = None) -> Path:
    """Write `tokens.html` beside a pair's record.

    Args:
        directory: holds `tokens.json`.
        lr: learning rate at which steps are shown. Default: that of the record, or nats per unit of it.

    Returns:
        The page.
    """
    place = Path(directory)
    return write_page(place / "tokens.html", _to_page(read_token_record(place / "tokens.json"), lr))


def _to_page(record: TokenRecord, lr: float | None) -> Page:
    unit = StepUnit.of(record["settings"], lr)
    rows = list_tokens(record)
    entangling, disentangling = rank_ends(rows, attrgetter("entanglement"), _RANKED)
    sections = [
        Section("The prompt", "", [Quote("Tokens that both responses follow", record["prompt"]["text"])]),
        Section(
            "What a margin step does to each token",
            "First-order change of each token's log-prob where log π(chosen) − log π(rejected) is raised, in "
            f"{unit}. A chosen token that falls is dragged along by what pushes rejected down. Tokens "
            "in bold tell the responses apart; the others are in both.",
            [_words(rows, "effect", "falls", "rises", bad_above=False, unit=unit)],
        ),
        Section(
            "Which tokens entangle",
            "Each token's inner product with the gradient of the whole other response. An entangling token rises and "
            "falls with the other response; a disentangling one is held against it. Over the tokens of either "
            "response these add up to ⟨g_w, g_l⟩.",
            [_words(rows, "entanglement", "disentangles", "entangles", bad_above=True)],
        ),
        *([_mask_section(record)] if record["masks"] else []),
        Section(
            "Token by token",
            "Cosines of the gradients of chosen tokens (downwards) and rejected tokens (to the right). Outlined: the "
            "same token in both responses. A token's gradient runs through all positions before it.",
            [_heat_map(record, rows)],
        ),
        _ranking("entangling", entangling, unit),
        _ranking("disentangling", disentangling, unit),
    ]
    if record["modules"]:
        sections.append(_module_section(record["modules"]))
    everything = _table(rows, unit, "All tokens of both responses, with their numbers")
    sections.append(Section("All tokens", "Positions are counted from 0.", [everything]))
    return Page(
        title=_describe_finding(record),
        lead=_lead(record, unit),
        facts=_facts(record),
        sections=sections,
        foot=f"gradent {record['gradent_version']}, schema version {record['schema_version']}. The numbers behind this "
        "page are in tokens.json beside it.",
    )


def _mask_section(record: TokenRecord) -> Section:
    """Which tokens a masked loss keeps, and how that goes with what tells the responses apart."""
    masks = record["masks"] or {}
    states: dict[str, list[bool]] = {"differing": [], "identical": []}
    responses = []
    for place, side in enumerate(_SIDES):
        shared = {pair[place] for pair in record["alignment"]}
        tokens = list(zip(record[side]["tokens"], masks[side]["mask"], masks[side]["kept"], strict=True))  # type: ignore[literal-required]
        responses.append((f"{side.capitalize()} response", tokens))
        for position, (_, _, is_kept) in enumerate(tokens):
            states["identical" if position in shared else "differing"].append(is_kept)
    counts = [(name, sum(kept), len(kept)) for name, kept in states.items() if kept]
    shares = [f"{kept} of {tokens} {name} tokens ({percent(kept / tokens)})" for name, kept, tokens in counts]
    return Section(
        "Which tokens the masked loss keeps",
        f"By {masks['source']}: {' and '.join(shares)}. Tokens in bold are kept; the deeper the colour, the farther a "
        "mask is from 1/2.",
        [mask_words(responses)],
    )


def _describe_finding(record: TokenRecord) -> str:
    """How far the two gradients point the same way, and how much of that comes from shared tokens."""
    inner, pair = _inner(record), f"Pair {record['data']['row']}"
    cosine = _cosine(record)
    if math.isnan(cosine):
        return f"{pair}: a gradient is zero, so nothing ties the responses together"
    told = f"{pair}: its gradients have a cosine of {fixed(cosine)}"
    if abs(cosine) < _NEAR_ZERO:  # a share of what nearly cancels says nothing
        return told
    return f"{told}, {percent(record['split']['identical'] / inner)} of it from tokens that both responses share"


def _inner(record: TokenRecord) -> float:
    return float(record["split"]["identical"] + record["split"]["differing"])


def _cosine(record: TokenRecord) -> float:
    scale = math.sqrt(record["chosen"]["sq"]) * math.sqrt(record["rejected"]["sq"])
    return _inner(record) / scale if scale else math.nan


def _lead(record: TokenRecord, unit: StepUnit) -> str:
    sums = [sum(record["chosen"]["effects"]), sum(record["rejected"]["effects"])]
    moves = ["raises" if value > 0 else "lowers" if value < 0 else "leaves" for value in sums]
    case = {
        ("raises", "lowers"): "as a preference loss is meant to",
        ("lowers", "lowers"): "so both fall",
        ("raises", "raises"): "so both rise",
    }.get((moves[0], moves[1]), "")
    return (
        "To first order, a small step that raises log π(chosen) − log π(rejected) on this pair alone "
        f"{moves[0]} chosen ({unit.show(sums[0])} {unit}) and {moves[1]} rejected "
        f"({unit.show(sums[1])})" + (f", {case}." if case else ".")
    )


def _facts(record: TokenRecord) -> list[tuple[str, str]]:
    model, data, split = record["model"], record["data"], record["split"]
    chosen, rejected = record["chosen"], record["rejected"]
    inner, cosine = _inner(record), _cosine(record)
    lengths = (
        f"{len(chosen['ids'])} chosen and {len(rejected['ids'])} rejected tokens, {split['identical_tokens']} of "
        f"them the same ones, after {len(record['prompt']['ids'])} tokens of prompt"
    )
    norms = math.sqrt(chosen["sq"]), math.sqrt(rejected["sq"])
    parts = [
        f"{name} tokens {signed_number(split[name])}" + (f" ({split[name] / inner or 0.0:.0%})" if inner else "")
        for name in ("identical", "differing")
    ]
    facts = [
        ("Model", f"{model['checkpoint']}, {model['trainable_parameters']:,} parameters measured, {model['dtype']}"),
        ("Data", str(data["source"])),
        ("Pair", f"row {data['row']}, counted from 0, of {data['rows']} ({data['where']})"),
        ("Lengths", lengths),
        ("Log-probs", f"chosen {chosen['logp']:.4g}, rejected {rejected['logp']:.4g} nats"),
        ("Gradients", "g_w = ∇ log π(chosen), g_l = ∇ log π(rejected), over all measured parameters"),
        ("Cosine", "none: a gradient is zero" if math.isnan(cosine) else f"{cosine:+.4f}"),
        ("⟨g_w, g_l⟩", f"{signed_number(inner)}, with ‖g_w‖ {number(norms[0])} and ‖g_l‖ {number(norms[1])}"),
        ("Split of it", " and ".join(parts)),
    ]
    return facts + [("Note", note) for note in record["notes"]]


def _words(
    rows: Sequence[TokenRow], figure: str, below: str, above: str, *, bad_above: bool, unit: StepUnit | None = None
) -> Words:
    texts: dict[str, list[Word]] = {side: [] for side in _SIDES}
    for row in rows:
        value = float(getattr(row, figure))
        value = value if unit is None else unit.scale(value)
        verb = above if value > 0 else below if value < 0 else "neither"
        note = f"{row.name}: {verb} ({signed_number(value)}), {row.kind}"
        texts[row.side].append(Word(row.text, value, note, strong=not row.identical))
    titled = [(f"{side.capitalize()} response", words) for side, words in texts.items()]
    return scaled_words(titled, below, above, bad_above=bad_above)


def _heat_map(record: TokenRecord, rows: Sequence[TokenRow]) -> HeatMap:
    chosen, rejected = ([row for row in rows if row.side == side] for side in _SIDES)
    norms = np.outer([row.norm for row in chosen], [row.norm for row in rejected])
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = np.array(record["inner"], dtype=np.float64) / norms
    names = [row.name for row in chosen], [row.name for row in rejected]
    return token_cosines(*names, cosines.tolist(), [(a, b) for a, b in record["alignment"]])


def _ranking(kind: str, rows: Sequence[TokenRow], unit: StepUnit) -> Section:
    title = f"The most {kind} tokens"
    return Section(title, "", [_table(rows, unit)]) if rows else Section(title, f"No token is {kind} in this pair.", [])


def _table(rows: Sequence[TokenRow], unit: StepUnit, folded: str = "") -> Table:
    header = ["" if folded else "Rank", "Response", "Position", "Token", "Kind", "Entanglement", "Share", "Norm"]
    cells: list[list[Cell | str]] = [
        [
            str(rank), row.side, str(row.position), visible(row.text), row.kind, signed_number(row.entanglement),
            "-" if row.share is None else f"{row.share:+.1%}", number(row.norm), unit.show(row.effect),
        ]
        for rank, row in enumerate(rows, start=1)
    ]  # fmt: skip
    return Table([*header, "Margin step"], cells, folded)


def _module_section(modules: dict[str, list[float]]) -> Section:
    totals = [sum(column) for column in zip(*modules.values(), strict=True)]
    ranked = sorted(modules.items(), key=lambda item: -abs(item[1][2]))
    rows = []
    for name, part in ranked[:_MODULES]:
        shares = [f"{part[number] / totals[number]:+.1%}" if totals[number] else "-" for number in (2, 0, 1)]
        rows.append([name, signed_number(part[2]), *shares])
    more = len(ranked) - len(rows)
    return Section(
        "Where it comes from",
        "The modules with the largest parts of ⟨g_w, g_l⟩, and their shares of it and of the squared norms."
        + (f" {more} more are in tokens.json." if more > 0 else ""),
        [Table(("Module", "Part", "Share of ⟨g_w, g_l⟩", "Of ‖g_w‖²", "Of ‖g_l‖²"), rows)],
    )
