"""Sections on what steps do to the responses: one step on the whole sample, and the run's own between checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradent.figures.charts import Chart, Line, fill_gap
from gradent.report.audit.sections.answer import CLOSE
from gradent.report.audit.sections.layers import bare_name
from gradent.report.audit.sections.records import AuditRecords, Row
from gradent.report.audit.sections.steps import STEP
from gradent.report.page.html import Section
from gradent.report.page.numbers import all_pairs, count, number, percent, plural, signed_number, step_name
from gradent.report.page.parts import Cell, Table
from gradent.report.page.unit import StepUnit

__all__ = ["run_section", "sample_section"]

_SIDES = ("chosen", "rejected")
_PARTS = ("own", "partner", "others")
_MODULES = 20
_WIDTH = 90  # characters of a response
_DIFFERS = 0.1
"""Share of the responses from which a step on the sample is said to differ from one on each pair alone."""


def sample_section(records: AuditRecords) -> Section | None:
    """One step on the whole sample, checkpoint by checkpoint; None where it was not measured."""
    rows = _of_steps(records, "sample")
    if not rows:
        return None
    last, unit = rows[-1], records.unit
    parts: list[Chart | Table] = []
    if len(rows) > 1:
        parts += [_part_chart(rows, side, unit) for side in _SIDES]
    parts.append(_part_table(rows, unit))
    text = (
        f"One step of plain gradient descent on the mean loss of {all_pairs(int(last['pairs']))}: what it "
        f"adds to each response's log-prob, to first order, in {unit}. Own: the response's "
        "own gradient. Partner: the other response of its pair. Others: all other pairs. This is nearer to training "
        "than a step on a pair alone, which is own and partner. It has no optimizer in it: Adam's preconditioner and "
        f"momentum are known in training only (EntanglementCallback). {_describe_difference(last)}"
    )
    serves = "Tells you whether a fall of chosen comes from within the pairs, or from what pairs do to one another."
    pushed = _push_table(records)
    if pushed is not None:
        parts.append(pushed)
    return Section("One step on the sample", text, parts, serves)


def run_section(records: AuditRecords) -> Section | None:
    """The run's steps between checkpoints, by module; None where there is no interval."""
    rows = _of_steps(records, "intervals")
    if not rows:
        return None
    table = Table(
        ["Steps", "Chosen", "First order", "Rejected", "First order", "Explained", "By the first end alone", "Pairs"],
        [_interval(row) for row in rows], "", "Changes of the mean log-probs in nats, checkpoint to checkpoint", 1,
    )  # fmt: skip
    parts: list[Table] = [table]
    modules = _module_table(rows)
    if modules is not None:
        parts.append(modules)
    text = (
        "Between two checkpoints the parameters moved by a known Δθ. First order: the mean of ⟨∇ log π, Δθ⟩ at both "
        "ends, whatever the optimizer and the data of the steps between. Explained: its share of the squared realised "
        f"changes of all responses. {_describe_explained(rows)}"
    )
    serves = "Tells you which modules moved chosen and rejected, and whether the checkpoints lie close enough to tell."
    return Section("What moved the responses between checkpoints", text, parts, serves)


def _of_steps(records: AuditRecords, key: str) -> Sequence[Row]:
    return (records.summary["steps"] or {}).get(key) or []


def _describe_difference(row: Row) -> str:
    """Whether the step on the sample and those on each pair alone agree, at a checkpoint."""
    chosen, rejected = (fill_gap(row.get(f"{side}_differs")) for side in _SIDES)
    begin = f"At {step_name(row.get('step'))} "
    if max(chosen, rejected) < _DIFFERS:
        return (
            f"{begin}the two agree: the sample moves {percent(chosen)} of the chosen and {percent(rejected)} of the "
            "rejected responses the other way."
        )
    return (
        f"{begin}the two disagree: the sample moves {percent(chosen)} of the chosen and {percent(rejected)} of the "
        "rejected responses the other way than a step on their pair alone would. Believe the sample."
    )


def _describe_explained(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row.get("explained") is not None]
    if not rows:
        return "No response moved."
    explained = [float(row["explained"]) for row in rows]
    far = [row for row, share in zip(rows, explained, strict=True) if share < CLOSE]
    if not far:
        return f"It explains {percent(math.floor(1000 * min(explained)) / 1000)} or more of every interval."
    listed = ", ".join(f"{count(row.get('from'))} to {count(row.get('to'))}" for row in far[:4])
    more = f" and {len(far) - 4} more" if len(far) > 4 else ""
    return (
        f"Of {plural(len(far), 'interval')} ({listed}{more}) it explains less than {percent(CLOSE)}: these checkpoints "
        "lie too far apart for first order, and the parts of modules are no account of the change there. Save more "
        "often (save_steps) to have one."
    )


def _part_chart(rows: Sequence[Row], side: str, unit: StepUnit) -> Chart:
    steps = [float(row["step"]) for row in rows]
    lines = [Line(part, steps, [unit.scale(row.get(f"{side}_{part}")) for row in rows]) for part in _PARTS]
    totals = [unit.scale(_total(row, side)) for row in rows]
    lines.append(Line("together", steps, totals, colour=side, dashed=True))
    return Chart(STEP, str(unit), lines, zero=True, title=f"What moves {side}")


def _total(row: Row, side: str) -> float:
    return sum(fill_gap(row.get(f"{side}_{part}")) for part in _PARTS)


def _part_table(rows: Sequence[Row], unit: StepUnit) -> Table:
    header = ["Step"]
    for side in _SIDES:
        header += [f"{side.capitalize()}, own", "partner", "others", "together"]
    header += ["Case 1", "Chosen differs from its pair alone", "Rejected differs"]
    cells = []
    for row in rows:
        figures = [f"{row['step']:,}"]
        for side in _SIDES:
            figures += [unit.show(row.get(f"{side}_{part}")) for part in _PARTS]
            figures.append(unit.show(_total(row, side)))
        figures.append(percent((row.get("cases") or {}).get("ideal")))
        cells.append([*figures, *(percent(row.get(f"{side}_differs")) for side in _SIDES)])
    caption = f"Means over the pairs, in {unit}; shares of the pairs"
    return Table(header, cells, "", caption, figures_from=1)


def _push_table(records: AuditRecords) -> Table | None:
    """The responses that other pairs move most, and who moves them; None where that is not known."""
    rows = _of_steps(records, "pushed")
    if not rows:
        return None
    cells: list[list[Cell | str]] = []
    unit = records.unit
    for row in rows:
        by = [f"{other['side']} of pair {other['pair']:,}: {unit.show(other['moved'])}" for other in row["by"]]
        texts = [_text(records, other["pair"], other["side"]) for other in row["by"]]
        cells.append([
            Cell((f"{row['side']} of pair {row['pair']:,}", _text(records, row["pair"], row["side"]))),
            unit.show(row["others"]), unit.show(row["own"]), unit.show(row["partner"]),
            Cell(tuple(line for lines in zip(by, texts, strict=True) for line in lines if line)),
        ])  # fmt: skip
    header = ["Response", "By other pairs", "Own", "Partner", "Most of it by"]
    caption = f"Who moves whom: the responses that other pairs move most, in {unit}"
    return Table(header, cells, f"Who moves whom: {plural(len(rows), 'response')}", caption, figures_from=1)


def _text(records: AuditRecords, pair: int, side: str) -> str:
    """The beginning of a response, on one line; empty without the texts."""
    text = str(records.sample.get(pair, {}).get(side) or "")
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"


def _interval(row: Row) -> list[str]:
    changes = [f"{side}_{kind}" for side in _SIDES for kind in ("realised", "first_order")]
    return [
        f"{count(row.get('from'))} to {count(row.get('to'))}", *(signed_number(row.get(key)) for key in changes),
        percent(row.get("explained")), percent(row.get("explained_begin")), count(row.get("pairs")),
    ]  # fmt: skip


def _module_table(rows: Sequence[Row]) -> Table | None:
    """Modules by what they did over all intervals; None where modules were not measured."""
    sums: dict[str, np.ndarray] = {}
    for row in rows:
        for full, parts in (row.get("modules") or {}).items():
            module = bare_name(full)
            sums[module] = sums.get(module, np.zeros(2)) + np.array([*map(fill_gap, parts)])
    if not sums:
        return None
    ranked = sorted(sums.items(), key=lambda item: -float(np.nan_to_num(np.abs(item[1])).sum()))
    total = np.sum(list(sums.values()), axis=0)
    cells = [
        [module, *(f"{signed_number(float(part))}" for part in parts), number(float(parts[0] - parts[1]))]
        for module, parts in ranked[:_MODULES]
    ]
    cells.append(["all modules", *map(signed_number, map(float, total)), number(float(total[0] - total[1]))])
    caption = f"First-order changes by module over all intervals, in nats; the largest of {len(ranked):,}"
    return Table(["Module", "Chosen", "Rejected", "Margin"], cells, "", caption, figures_from=1)
