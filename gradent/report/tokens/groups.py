"""The page of a group's rollouts, from the `group_tokens.json` in its directory: whose tokens pull a positive down."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gradent.record import GroupTokenRecord, read_group_tokens
from gradent.record.group_rows import GroupTokenRow, list_group_tokens, rank_group_tokens
from gradent.record.token_rows import name_token
from gradent.report.page.html import Page, Section, write_page
from gradent.report.page.numbers import NOTHING, fixed, number, plural, signed_number
from gradent.report.page.parts import Quote, Table, Word, Words, scaled_words
from gradent.report.page.unit import StepUnit
from gradent.text import visible

__all__ = ["describe_correlation", "write_group_report"]

_RANKED = 10  # tokens of each positive in each of the two tables


def write_group_report(directory: str | os.PathLike[str], lr: float | None = None) -> Path:
    """Write `group_tokens.html` beside a group's record `group_tokens.json`; with `lr`, steps at that rate."""
    place = Path(directory)
    return write_page(place / "group_tokens.html", _to_page(read_group_tokens(place / "group_tokens.json"), lr))


def describe_correlation(record: GroupTokenRecord) -> str:
    """How far NTHR's score ranks the negatives' tokens as their exact pull does, in a sentence."""
    if record["correlation"] is None:
        return "There is no correlation of exact pull with NTHR's score: one of the two is constant, or not there."
    each = [f"{fixed(part['correlation'])} for completion {part['positive']}" for part in record["correlations"]]
    alone = f" ({', '.join(each)})" if len(each) > 1 else ""
    return (
        "Over the tokens of the lowered completions, exact pull and NTHR's score have a rank correlation of "
        f"{fixed(record['correlation'])}{alone}."
    )


def _to_page(record: GroupTokenRecord, lr: float | None) -> Page:
    unit = StepUnit.of(record["settings"], lr)
    rows = list_group_tokens(record)
    pulls, pushes = rank_group_tokens(record, rows, _RANKED)
    positives = [number for number, rollout in enumerate(record["rollouts"]) if rollout["weight"] > 0]
    sections = [
        Section("The prompt", "", [Quote("Tokens that all completions follow", record["prompt"]["text"])]),
        *(_influence_section(record, rows, positive, unit) for positive in positives),
    ]
    if any(row.nthr is not None for row in rows):
        sections.append(
            Section(
                "NTHR's score of the same tokens",
                "From last hidden states and the head's errors alone, summed over the raised completions. Where it is "
                "high, NTHR (Deng et al. 2025) holds a token to pull them down. " + describe_correlation(record),
                [_score_words(record, rows)],
            )
        )
    sections += [
        _ranking("The tokens that pull a raised completion down most", pulls, unit),
        _ranking("The tokens of lowered completions that push a raised one up most", pushes, unit),
        Section("All tokens", "Positions are counted from 0.", [_table(rows, unit, "All tokens, with their numbers")]),
    ]
    return Page(
        title=f"Tokens of group {record['data']['row']}: what pulls a raised completion down",
        lead=_lead(record, rows, positives, unit),
        facts=_facts(record),
        sections=sections,
        foot=f"gradent {record['gradent_version']}, schema version {record['schema_version']}. The numbers behind this "
        "page are in group_tokens.json beside it.",
    )


def _influence_section(
    record: GroupTokenRecord, rows: Sequence[GroupTokenRow], positive: int, unit: StepUnit
) -> Section:
    """The other completions' texts, coloured by what each token does to this one."""
    texts = []
    for other, rollout in enumerate(record["rollouts"]):
        own = [row for row in rows if (row.positive, row.rollout) == (positive, other)]
        if own:
            total = unit.show(sum(row.influence for row in own))
            words = [Word(row.text, row.influence, _note(row, unit), strong=rollout["weight"] < 0) for row in own]
            texts.append((f"Completion {other}, weight {signed_number(rollout['weight'])}: {total} in all", words))
    weight = signed_number(record["rollouts"][positive]["weight"])
    return Section(
        f"What moves completion {positive} (weight {weight})",
        f"First-order change of log π(completion {positive}) by each token of the others in one step, in {unit}. "
        "Tokens of lowered completions are in bold.",
        [
            Quote(f"Completion {positive}", "".join(record["rollouts"][positive]["tokens"])),
            scaled_words(texts, "pulls it down", "pushes it up"),
        ],
    )


def _note(row: GroupTokenRow, unit: StepUnit) -> str:
    verb = "pulls it down" if row.influence < 0 else "pushes it up" if row.influence > 0 else "neither"
    score = "" if row.nthr is None else f", NTHR {signed_number(row.nthr)}"
    return f"{row.name}: {verb} ({unit.show(row.influence)}){score}"


def _score_words(record: GroupTokenRecord, rows: Sequence[GroupTokenRow]) -> Words:
    """The lowered completions' texts, coloured by NTHR's score."""
    sums: dict[int, list[float]] = {}
    for row in rows:
        if row.nthr is not None:
            scores = sums.setdefault(row.rollout, [0.0] * len(record["rollouts"][row.rollout]["tokens"]))
            scores[row.position] += row.nthr
    texts = []
    for other, scores in sums.items():
        tokens = enumerate(zip(record["rollouts"][other]["tokens"], scores, strict=True))
        words = [
            Word(text, score, f"{name_token(place, text)}: {signed_number(score)}") for place, (text, score) in tokens
        ]
        texts.append((f"Completion {other}", words))
    return scaled_words(texts, "held to push up", "held to pull down", bad_above=True)


def _lead(record: GroupTokenRecord, rows: Sequence[GroupTokenRow], positives: Sequence[int], unit: StepUnit) -> str:
    parts = []
    for positive in positives:
        total = sum(
            row.influence
            for row in rows
            if row.positive == positive and record["rollouts"][row.rollout]["weight"] < 0
        )  # fmt: skip
        verb = "pull" if total < 0 else "push" if total > 0 else "leave"
        where = {"pull": " down", "push": " up", "leave": " where it is"}[verb]
        parts.append(f"{verb} completion {positive}{where} ({unit.show(total)} {unit})")
    return (
        f"To first order, in one step on this group the lowered completions {', '.join(parts)}. "
        + describe_correlation(record)
    )


def _facts(record: GroupTokenRecord) -> list[tuple[str, str]]:
    model, data, rollouts = record["model"], record["data"], record["rollouts"]
    weights = ", ".join(f"{place}: {signed_number(rollout['weight'])}" for place, rollout in enumerate(rollouts))
    lengths = ", ".join(str(len(rollout["ids"])) for rollout in rollouts)
    facts = [
        ("Model", f"{model['checkpoint']}, {model['trainable_parameters']:,} parameters measured, {model['dtype']}"),
        ("Data", str(data["source"])),
        ("Group", f"row {data['row']}, counted from 0, of {data['rows']} ({data['where']})"),
        (
            "Completions",
            f"{len(rollouts)}, of {lengths} tokens after {plural(len(record['prompt']['ids']), 'token')} of prompt",
        ),
        ("Weights", f"{weights} (from {data['weights_from']})"),
    ]
    return facts + [("Note", note) for note in record["notes"]]


def _ranking(title: str, rows: Sequence[GroupTokenRow], unit: StepUnit) -> Section:
    return Section(title, "", [_table(rows, unit)]) if rows else Section(title, "There is none in this group.", [])


def _table(rows: Sequence[GroupTokenRow], unit: StepUnit, folded: str = "") -> Table:
    cells = [
        [
            str(row.positive), str(row.rollout), str(row.position), visible(row.text), unit.show(row.influence),
            NOTHING if row.nthr is None else number(row.nthr),
        ]
        for row in rows
    ]  # fmt: skip
    return Table(["Moved", "By", "Position", "Token", "Influence", "NTHR"], cells, folded)
