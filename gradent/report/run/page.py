"""The page of a run's records: a finding, one chart of what steps do, what moved it, how far to trust it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradent.figures.charts import Bars, Chart, Line, Series
from gradent.record import CASE_NAMES
from gradent.report.live.bins import Bins
from gradent.report.page.cases import CASES, CASES_EXPLAINED
from gradent.report.page.html import Page, Section, write_page
from gradent.report.page.numbers import NOTHING, fixed, plural, share_of_pairs
from gradent.report.page.parts import BigNumber, Notice, Numbers, Part
from gradent.report.run.finding import describe_finding, describe_moved, describe_trust, find_fall, movement
from gradent.report.run.records import FILES, Floats, RunRecords, Side, find_files, read_run
from gradent.version import __version__

__all__ = ["run_page", "waiting_page", "write_run_report"]

STEP = "training step"


def write_run_report(directory: Path) -> list[Path]:
    """`report.html` beside a run's records; where there are pairs and rows, `rows_report.html` too."""
    paths = find_files(directory)
    names = {FILES[0]: "report.html", FILES[1]: "report.html" if len(paths) == 1 else "rows_report.html"}
    return [write_page(directory / names[path.name], run_page(read_run(path))) for path in paths]


def run_page(records: RunRecords) -> Page:
    """The page of records."""
    sections = [_source_section(records), _case_section(records), _cosine_section(records), _logp_section(records)]
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(records.path.stat().st_mtime))
    last = f", the last at step {records.steps[-1]:,}" if records.steps else ""
    return Page(
        title=describe_finding(records),
        lead=f"{plural(len(records.steps), 'measured step')} of a run{last}; {records.path}, written {written}.",
        sections=[
            _answer_section(records), *(replace(section, folded=True) for section in sections if section is not None),
        ],
        foot=f"gradent {__version__}. The numbers behind this page are in {records.path}.",
    )  # fmt: skip


def waiting_page(directory: Path, problem: str = "") -> Page:
    """What is shown of a directory without records, or with damaged ones."""
    text = problem or (
        f"{' or '.join(FILES)} will be in {directory} with the first measured step of a run with "
        f"EntanglementCallback(out={str(directory)!r})."
    )
    title = "The records cannot be read" if problem else "Waiting for the first measured step"
    return Page(title=title, lead="", notices=[Notice("", text, warns=bool(problem))], foot=f"gradent {__version__}.")


def _answer_section(records: RunRecords) -> Section:
    parts: list[Part] = []
    chart = _change_chart(records)
    if chart is not None:
        parts.append(chart)
    moved = describe_moved(records)
    if moved:
        parts.append(Notice("What moved it", moved))
    trust, warns = describe_trust(records)
    parts += [Notice("How far to trust it", trust, warns=warns), Numbers(_big_numbers(records))]
    return Section("What steps do", "", parts)


def _bins(steps: Sequence[int], of: NDArray[Any]) -> Bins:
    """Columns over steps, with how many rows each step has."""
    return Bins(list(steps), [int((of == step).sum()) for step in steps])


def _parts(bins: Bins, steps: Sequence[int], of: NDArray[Any], values: Floats) -> list[Floats]:
    """Values of each column of bins."""
    found = []
    for part in bins.slices:
        inside = steps[part]
        found.append(values[(of >= inside[0]) & (of <= inside[-1])])
    return found


def _change_chart(records: RunRecords) -> Chart | None:
    lines = []
    for side in records.sides:
        steps = sorted(set(side.steps[np.isfinite(side.change)].tolist()))
        if not steps:
            continue
        bins = _bins(steps, side.steps)
        means = [movement(part) for part in _parts(bins, steps, side.steps, side.change)]
        band = [0.0 if each.error != each.error else each.error for each in means]
        lines.append(Line(side.name, bins.places, [each.mean for each in means], band, colour=side.name))
    if not lines or not any(len(line.x) > 1 for line in lines):
        return None
    fall = find_fall(records)
    kind = "measured" if records.sides[0].is_realised else "to first order"
    marks = [] if fall is None else [(float(fall), "both fall since")]
    return Chart(
        STEP, f"nats a step, {kind}", lines, zero=True, marks=marks,
        title=f"What a step does to the log-probs of its own {'pairs' if records.has_pairs else 'rows'} (band: one "
        "standard error)",
    )  # fmt: skip


def _big_numbers(records: RunRecords) -> list[BigNumber]:
    fall = find_fall(records)
    since = f"since step {fall:,}" if fall is not None else "over all measured steps"
    sides = [side if fall is None else side.since(fall) for side in records.sides]
    numbers = [
        BigNumber(f"{side.name.capitalize()}, nats a step", str(movement(side.change)), since)
        for side in sides
        if movement(side.change).rows
    ]
    first = sides[0].change[np.isfinite(sides[0].change)]
    if records.has_pairs:
        both = (sides[0].change < 0) & (sides[1].change < 0)
        if len(first):
            share = share_of_pairs(float(both[np.isfinite(sides[0].change)].mean()), len(first))
            numbers.append(BigNumber("Pairs of which a step lowers both", share, f"of {len(first):,}, {since}"))
        cosines = records.column("cosine")
        cosines = cosines[np.isfinite(cosines)]
        median = fixed(float(np.median(cosines))) if len(cosines) else NOTHING
        numbers.append(BigNumber("Median cosine of a pair's gradients", median))
    elif len(first):
        share = share_of_pairs(float((first < 0).mean()), len(first))
        numbers.append(BigNumber("Positives that a step lowers", share, f"of {len(first):,}, {since}"))
    return numbers


def _source_section(records: RunRecords) -> Section | None:
    charts = [chart for side in records.sides if (chart := _source_bars(side)) is not None]
    if not charts:
        return None
    text = (
        "Each bar is a measured step (of long runs, some neighbours), its pieces what moves the side: what raises "
        "stands above 0, what lowers below. They add up to the whole change, to first order."
    )
    return Section("What moved it, step by step", text, charts, "Tells you whether pairs, the batch or momentum do it.")


def _source_bars(side: Side) -> Bars | None:
    steps = sorted(set(side.steps[np.isfinite(side.total)].tolist()))
    if not steps:
        return None
    bins = _bins(steps, side.steps)
    series = [
        Series(source.replace("_", " "), [_mean(part) for part in _parts(bins, steps, side.steps, values)], source)
        for source, values in side.moved.items()
    ]
    return Bars(
        STEP, "nats a step, first order", bins.names, series, title=f"What moved {side.name}", upright=True,
        places=bins.places,
    )  # fmt: skip


def _case_section(records: RunRecords) -> Section | None:
    if not records.has_pairs or not records.rows:
        return None
    cases, of, steps = records.column("case"), records.column("step"), records.steps
    bins = _bins(steps, of)
    parts = _parts(bins, steps, of, cases)
    numbers = {name: number for number, name in CASE_NAMES.items()}
    found = [(name, label) for name, label in CASES.items() if (cases == numbers[name]).any()]
    series = [Series(label, [_mean(part == numbers[name]) for part in parts], name) for name, label in found]
    names = [f"{name}, {plural(size, 'pair')}" for name, size in zip(bins.names, bins.sizes, strict=True)]
    shares = [f"{label} {share_of_pairs(float((cases == numbers[name]).mean()), len(cases))}" for name, label in found]
    text = f"Of {plural(len(cases), 'pair')}, with 95% intervals: {', '.join(shares)}. {CASES_EXPLAINED}"
    bars = Bars(STEP, "share of pairs", names, series, percent=True, upright=True, places=bins.places)
    serves = "Tells you what the loss asks for: a step of plain gradient descent on each pair alone."
    return Section("Each pair alone", text, [bars], serves)


def _cosine_section(records: RunRecords) -> Section | None:
    if not records.has_pairs or len(records.steps) < 2:
        return None
    of, steps = records.column("step"), records.steps
    bins = _bins(steps, of)
    quantiles = [_quartiles(part) for part in _parts(bins, steps, of, records.column("cosine"))]
    low, middle, high = (list(column) for column in zip(*quantiles, strict=True))
    line = Line("median", bins.places, middle, low=low, high=high)
    text = "Cosine of the gradients of chosen and rejected: near 1, what moves one moves the other. Band: quartiles."
    serves = "Tells you how entangled the pairs are."
    return Section("Cosine", text, [Chart(STEP, "cosine", [line], zero=True)], serves)


def _logp_section(records: RunRecords) -> Section | None:
    if len(records.steps) < 2:
        return None
    of, steps = records.column("step"), records.steps
    columns = {"chosen": "chosen_logp", "rejected": "rejected_logp"} if records.has_pairs else {"rows": "logp"}
    bins = _bins(steps, of)
    lines = [
        Line(name, bins.places, [_mean(part) for part in _parts(bins, steps, of, records.column(column))],
             colour=name if records.has_pairs else "")
        for name, column in columns.items()
    ]  # fmt: skip
    noun = "pairs" if records.has_pairs else "rows"
    text = (
        f"Means over the {noun} of each step, which differ from step to step: the chart above compares like with like."
    )
    serves = f"Tells you how likely the {noun} are."
    return Section("Log-probs", text, [Chart(STEP, "mean log π, nats", lines)], serves)


def _mean(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _quartiles(values: Floats) -> tuple[float, float, float]:
    known = values[np.isfinite(values)]
    if not len(known):
        return float("nan"), float("nan"), float("nan")
    low, middle, high = np.quantile(known, [0.25, 0.5, 0.75]).tolist()
    return low, middle, high
