"""An audit's main curves as PNG and SVG files, for papers and slides: log-probs, cases, other losses."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from gradent.figures.canvas import draw_figure, render
from gradent.figures.charts import Bars, Chart
from gradent.record.atomic import make_directory, write_whole
from gradent.report.audit.sections.losses import loss_bars
from gradent.report.audit.sections.records import AuditRecords, read_audit
from gradent.report.audit.sections.steps import case_chart, logp_chart

__all__ = ["draw_audit", "write_audit_figures"]


def write_audit_figures(directory: str | os.PathLike[str]) -> list[Path]:
    """Write the main curves into `figures/` beside an audit's records; those of an earlier audit go."""
    return draw_audit(read_audit(directory))


def draw_audit(records: AuditRecords) -> list[Path]:
    """The same, of records that are read already."""
    place = make_directory(records.directory / "figures")
    chart, cases, onset = logp_chart(records), case_chart(records), records.of_dynamics("onset").get("measured")
    figures: dict[str, Chart | Bars | None] = {
        # With the measured onset alone: a legend has no room for two kinds of marks.
        "logps": chart and replace(chart, marks=chart.marks[: onset is not None]),
        "cases": cases if isinstance(cases, Chart) else None,
        "what_if": loss_bars(records),
    }
    written = []
    for name, figure in figures.items():
        drawing = None if figure is None else draw_figure(figure)
        for form in ("png", "svg"):
            path = place / f"{name}.{form}"
            if drawing is None:
                path.unlink(missing_ok=True)
                continue
            content = render(drawing, form)
            write_whole(path, lambda handle, content=content: handle.write(content))  # type: ignore[misc]
            written.append(path)
    return written
