"""Every page and figure that the records in a directory allow, made anew."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from gradent.errors import DataFileError
from gradent.report.audit.figures import draw_audit
from gradent.report.audit.page import write_audit_page
from gradent.report.audit.sections.records import read_audit
from gradent.report.demo import write_demo_report
from gradent.report.run.page import write_run_report
from gradent.report.scan import write_scan_report
from gradent.report.tokens.groups import write_group_report
from gradent.report.tokens.page import write_token_report

__all__ = ["write_audit", "write_report"]


def write_audit(directory: str | os.PathLike[str]) -> list[Path]:
    """The page and the pictures of an audit, from the records in its directory."""
    records = read_audit(directory)
    return [write_audit_page(records), *draw_audit(records)]


_WRITERS: dict[str, tuple[str, Callable[[Path], list[Path]]]] = {
    "summary.json": ("gradent audit", write_audit),
    "demo.json": ("gradent demo", lambda directory: [write_demo_report(directory)]),
    "scan.json": ("gradent scan", lambda directory: [write_scan_report(directory)]),
    "tokens.json": ("gradent tokens", lambda directory: [write_token_report(directory)]),
    "group_tokens.json": ("gradent tokens", lambda directory: [write_group_report(directory)]),
    "pairs.jsonl": ("EntanglementCallback(out=...)", write_run_report),
    "rows.jsonl": ("EntanglementCallback(out=...)", write_run_report),
}


_PAGES = ("summary.json", "demo.json", "pairs.jsonl", "rows.jsonl")
"""Records whose page is report.html."""


def write_report(directory: str | os.PathLike[str]) -> list[Path]:
    """Find which records lie in a directory, and write their pages and figures.

    Args:
        directory: of `gradent audit` (summary.json), `gradent demo` (demo.json), `gradent scan` (scan.json), `gradent
            tokens` (tokens.json, or group_tokens.json of a group) or `EntanglementCallback(out=...)` (pairs.jsonl, or
            rows.jsonl of groups).

    Returns:
        The files that were written.

    Raises:
        DataFileError: the directory is not there, holds none of these records, those of an audit that is not done, or
            of an audit and a demo, or either and a run, which share the names of their files.
    """
    place = Path(directory)
    if not place.is_dir():
        raise DataFileError(
            f"{directory}: there is no such directory. Name one that a gradent command wrote with --out, or that "
            "EntanglementCallback(out=...) wrote."
        )
    names = [name for name in _WRITERS if (place / name).is_file()]
    if not names:
        if any((place / "journal").glob("*.jsonl")):
            raise DataFileError(
                f"{directory}: its audit is not done: it is under way, or was stopped. What it has measured is in "
                f"{place / 'journal'}; the page comes at its end. If it was stopped, the same `gradent audit` command "
                "goes on from there."
            )
        looked = ", ".join(f"{name} (`{command}`)" for name, (command, _) in _WRITERS.items())
        raise DataFileError(f"{directory}: no records in it. Looked for: {looked}.")
    pages = [name for name in names if name in _PAGES]
    if len({_WRITERS[name][0] for name in pages}) > 1:
        listed = " and ".join(f"{name} (`{_WRITERS[name][0]}`)" for name in pages)
        raise DataFileError(
            f"{directory}: holds {listed}, whose pages and tables have the same names. Move one of them into a "
            "directory of its own, or run it again with another --out."
        )
    writers = {_WRITERS[name][1]: None for name in names}  # a run's pairs and rows have one
    return [path for write in writers for path in write(place)]
