"""The first screen of an audit's page: what happened, what moved it, how far to trust it, what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gradent.figures.charts import Chart, Line, fill_gap
from gradent.record import Summary
from gradent.report.audit.sections.records import AuditRecords, Row
from gradent.report.audit.sections.steps import STEP
from gradent.report.page.cases import share_of
from gradent.report.page.html import Section
from gradent.report.page.numbers import (
    all_pairs,
    beats_a_coin,
    change,
    fixed,
    percent,
    plural,
    share_of_pairs,
    signed_number,
    step_name,
)
from gradent.report.page.parts import BigNumber, Notice, Numbers, Part

__all__ = ["CLOSE", "answer_section", "change_chart", "describe_finding"]

CLOSE = 0.9
"""Share explained from which two checkpoints lie close enough for a first-order account."""

_SIDES = ("chosen", "rejected")
_CLEARLY = 2.0  # standard errors from which a mean is said to have moved


def answer_section(records: AuditRecords) -> Section:
    """What happened to the pairs, what moved them, how far first order is to be trusted, and what to do."""
    parts: list[Part] = []
    chart = change_chart(records)
    if chart is not None:
        parts.append(chart)
    numbers = _big_numbers(records)
    if numbers:
        parts.append(Numbers(numbers))
    moved = _describe_moved(records)
    if moved:
        parts.append(Notice("What moved it" if chart is not None else "What would move them", moved))
    trust, warns = _describe_trust(records)
    if trust:
        parts.append(Notice("How far to trust it", trust, warns=warns))
    recommendation = records.summary["recommendation"] or {}
    text = recommendation.get("text") or "There is no recommendation: nothing was measured that one could rest on."
    parts.append(Notice("What to do", str(text)))
    return Section("What happened" if chart is not None else "The answer", "", parts)


def describe_finding(summary: Summary) -> str:
    """The finding in a line: what became of both log-probs over a run, or what a step would do to a single model."""
    return f"In doubt: {_describe_finding(summary)}" if summary["doubt"] else _describe_finding(summary)


def _describe_finding(summary: Summary) -> str:
    fall, curve = (summary["dynamics"] or {}).get("fall"), _curve(summary)
    if fall:
        lost = ", ".join(f"{side} {signed_number(fall.get(side))}" for side in _SIDES)
        return f"Both fall since {step_name(fall.get('from'))}: {lost} nats"
    if len(curve) > 1:
        return _describe_change(curve)
    pairs = summary["checkpoints"][-1]["pairs"] if summary["checkpoints"] else 0
    if not pairs:
        return "Nothing was measured"
    sample = _sample_step(summary)
    cases, where = (summary["cases"], "each pair alone") if sample is None else (sample["cases"], all_pairs(pairs))
    shares = {case: share_of_pairs(share_of(cases, case), pairs) for case in ("ideal", "both_down")}
    of = "" if sample is not None else f" of {plural(pairs, 'pair')}"
    return (
        f"A small step on {where} raises chosen and lowers rejected in {shares['ideal']}{of}, and lowers both in "
        f"{shares['both_down']}"
    )


def _sample_step(summary: Summary) -> Row | None:
    """What one step on the whole sample does at the last checkpoint; None where it was not measured."""
    rows: Sequence[Row] = (summary["steps"] or {}).get("sample") or []
    return rows[-1] if rows and rows[-1].get("cases") else None


def change_chart(records: AuditRecords) -> Chart | None:
    """Change of both mean log-probs since the first point, with paired errors; None without two points."""
    curve = _curve(records.summary)
    if len(curve) < 2:
        return None
    steps = [float(point["step"]) for point in curve]
    lines = [
        Line(
            side, steps, [fill_gap(point.get(side)) for point in curve],
            [0.0, *(fill_gap(point.get(f"{side}_error")) for point in curve[1:])], colour=side,
        )
        for side in _SIDES
    ]  # fmt: skip
    fall = records.of_dynamics("fall")
    begin = fall.get("from")
    marks = [(float(begin), "both fall since")] if begin is not None else []
    return Chart(
        STEP, "change of mean log π, nats", lines, zero=True, marks=marks,
        title=f"Change of the log-probs since {step_name(curve[0].get('step'))}, the same pairs (band: one paired "
        "standard error)",
    )  # fmt: skip


def _curve(summary: Summary) -> Sequence[Row]:
    curve = (summary["dynamics"] or {}).get("curve") or []
    return [point for point in curve if point.get("step") is not None]


def _describe_change(curve: Sequence[Row]) -> str:
    """How far both means moved from the first point to the last, in words that its errors allow."""
    last, since = curve[-1], step_name(curve[0].get("step"))
    signs = {side: _sign(last, side) for side in _SIDES}
    by = ", ".join(f"{side} {signed_number(last.get(side))}" for side in _SIDES)
    if signs["chosen"] > 0 > signs["rejected"]:
        return f"As meant, chosen rose and rejected fell: {by} nats since {since}"
    if signs["chosen"] == signs["rejected"] == 1:
        return f"Both rose: {by} nats since {since}"
    if signs["chosen"] == signs["rejected"] == -1:
        lowest = all(fill_gap(last.get(side)) <= min(fill_gap(each.get(side)) for each in curve) for side in _SIDES)
        now = "" if lowest else ", but do not both fall now"
        return f"Both lie lower than at {since}{now}: {by} nats"
    if signs["chosen"] < 0 < signs["rejected"]:
        return f"Reversed: {by} nats since {since}"
    still = " and ".join(side for side in _SIDES if not signs[side])
    return f"No clear change of {still}: {by} nats since {since}"


def _sign(point: Row, side: str) -> int:
    """1 or -1 where the mean clearly moved, else 0."""
    moved, error = fill_gap(point.get(side)), point.get(f"{side}_error")
    if math.isnan(moved) or (error is not None and abs(moved) <= _CLEARLY * float(error)):
        return 0
    return (moved > 0) - (moved < 0)


def _big_numbers(records: AuditRecords) -> list[BigNumber]:
    first, last, curve = records.first, records.last, _curve(records.summary)
    if first is None or last is None:
        return []
    numbers, fall = list[BigNumber](), records.of_dynamics("fall")
    if len(curve) > 1:
        told, since = fall or curve[-1], fall.get("from", curve[0].get("step"))
        for side in _SIDES:
            note = f"{signed_number(curve[-1].get(side))} since {step_name(curve[0].get('step'))}" if fall else ""
            moved = change(0.0, told.get(side), told.get(f"{side}_error"))
            numbers.append(BigNumber(f"{side.capitalize()} since {step_name(since)}, nats", moved, note))
    realised, run = records.of_dynamics("cases_realised"), records.of_dynamics("whole")
    if fall:
        share = share_of_pairs(fall.get("both"), int(fall.get("pairs") or 0))
        numbers.append(BigNumber("Pairs in which both fell", share, f"since {step_name(fall.get('from'))}"))
    elif realised and run:
        share = share_of_pairs(share_of(realised, "both_down"), int(run.get("pairs") or 0))
        between = f"from {step_name(run.get('from'))} to {run.get('to'):,}"
        numbers.append(BigNumber("Pairs in which both fell", share, between))
    else:
        sample, pairs = _sample_step(records.summary), len(last.pairs)
        for case, name in (("ideal", "Chosen rises, rejected falls"), ("both_down", "Both fall")):
            alone = share_of_pairs(last.share(case), pairs)
            if sample is None:
                numbers.append(BigNumber(name, alone, f"a step on each alone, of {plural(pairs, 'pair')}"))
                continue
            of = f"a step on {all_pairs(pairs)}; on each alone {alone}"
            numbers.append(BigNumber(name, share_of_pairs(share_of(sample["cases"], case), pairs), of))
    before = f"{fixed(first.quantile('cosine', 0.5))} at {step_name(first.step)}" if first is not last else ""
    numbers.append(BigNumber("Median cosine of a pair's gradients", fixed(last.quantile("cosine", 0.5)), before))
    return numbers


def _describe_moved(records: AuditRecords) -> str:
    """What a step on the sample is made of, relative to a response's own part; empty where it was not measured."""
    rows = (records.summary["steps"] or {}).get("sample") or []
    if not rows:
        return ""
    row = rows[-1]
    sentences = []
    for side, other in zip(_SIDES, reversed(_SIDES), strict=True):
        own, partner, others = (fill_gap(row.get(f"{side}_{part}")) for part in ("own", "partner", "others"))
        if not (math.isfinite(own) and own):
            continue
        named = {"its own gradient": own, f"its {other} partner": partner, "other pairs": others}
        parts = ", ".join(f"{name} {signed_number(value / abs(own))}" for name, value in named.items())
        total = (own + partner + others) / abs(own)
        sentences.append(f"{side}: {parts}; together {signed_number(total)}")
    if not sentences:
        return ""
    step = f"at {step_name(row.get('step'))}" if len(records.measured) > 1 else "from these weights"
    return (
        f"One step of plain gradient descent on the mean loss of {all_pairs(int(row['pairs']))} {step}, in "
        f"units of a response's own push. Mean {'. Mean '.join(sentences)}."
    )


def _describe_trust(records: AuditRecords) -> tuple[str, bool]:
    """How much of the run first order explains, and whether steps foretold it; and whether to warn."""
    sentences, warns = list[str](), False
    rows = [row for row in (records.summary["steps"] or {}).get("intervals") or [] if row.get("explained") is not None]
    if rows:
        least = min(float(row["explained"]) for row in rows)
        warns = least < CLOSE
        share = percent(math.floor(1000 * least) / 1000) if least > 0 else "nothing"
        sentences.append(
            f"Along the run's own displacement, first order explains {share}{'' if least <= 0 else ' or more'} of the "
            f"change between checkpoints{': they lie too far apart for it' if warns else ''}."
        )
    recommendation = records.summary["recommendation"] or {}
    foretold = recommendation.get("foretold")
    if foretold:
        shown = {side: share_of_pairs(foretold[side], foretold["pairs"]) for side in _SIDES}
        coin = [side for side in _SIDES if not beats_a_coin(foretold[side], foretold["pairs"])]
        warns = warns or bool(coin)
        judged = "the sample" if recommendation.get("step") == "sample" else "each pair alone"
        sentences.append(
            f"A step on {judged} at {step_name(foretold['from'])} had the sign of what followed right for chosen in "
            f"{shown['chosen']} and for rejected in {shown['rejected']} of the pairs that it moves"
            + (f"; for {' and '.join(coin)} that is no better than a coin." if coin else ".")
        )
    return " ".join(sentences), warns
