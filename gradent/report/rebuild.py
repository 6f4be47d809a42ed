"""Every page and figure that the records in a directory allow, made anew."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from gradent.errors import DataFileError, InputError
from gradent.report.audit.figures import draw_audit
from gradent.report.audit.page import write_audit_page
from gradent.report.audit.sections.records import read_audit
from gradent.report.demo import write_demo_report
from gradent.report.page.unit import check_lr
from gradent.report.run.page import write_run_report
from gradent.report.scan import write_scan_report
from gradent.report.tokens.groups import write_group_report
from gradent.report.tokens.page import write_token_report

__all__ = ["write_audit", "write_report"]


def write_audit(directory: str | os.PathLike[str], lr: float | None = None) -> list[Path]:
    """The page and the pictures of an audit, from the records in its directory."""
    records = read_audit(directory, lr)
    return [write_audit_page(records), *draw_audit(records)]


def _write_run(directory: Path, _: float | None) -> list[Path]:
    return write_run_report(directory)


_WRITERS: dict[str, tuple[str, Callable[[Path, float | None], list[Path]]]] = {
    "summary.json": ("gradent audit", write_audit),
    "demo.json": ("gradent demo", lambda directory, _: [write_demo_report(directory)]),
    "scan.json": ("gradent scan", lambda directory, _: [write_scan_report(directory)]),
    "tokens.json": ("gradent tokens", lambda directory, lr: [write_token_report(directory, lr)]),
    "group_tokens.json": ("gradent tokens", lambda directory, lr: [write_group_report(directory, lr)]),
    "pairs.jsonl": ("EntanglementCallback(out=...)", _write_run),
    "rows.jsonl": ("EntanglementCallback(out=...)", _write_run),
}


_PAGES = ("summary.json", "demo.json", "pairs.jsonl", "rows.jsonl")
"""Records whose page is report.html."""

_WITH_STEPS = ("summary.json", "tokens.json", "group_tokens.json")
"""Records of what a step would do; a run's records are of what its steps did, in nats."""


def write_report(directory: str | os.PathLike[str], lr: float | None = None) -> list[Path]:
    """Find which records lie in a directory, and write their pages and figures.

    Args:
        directory: of `gradent audit` (summary.json), `gradent demo` (demo.json), `gradent scan` (scan.json), `gradent
            tokens` (tokens.json, or group_tokens.json of a group) or `EntanglementCallback(out=...)` (pairs.jsonl, or
            rows.jsonl of groups).
        lr: of an audit and of tokens, the learning rate at which a step of plain gradient descent is shown, in nats.
            Default: the one that the command was given, else nats per unit of it.

    Returns:
        The files that were written.

    Raises:
        DataFileError: the directory is not there, holds none of these records, those of an audit that is not done, or
            of an audit and a demo, or either and a run, which share the names of their files.
        InputError: `lr` is no learning rate, or nothing there shows what a step would do.
    """
    check_lr(lr)
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
    if lr is not None and not set(names) & set(_WITH_STEPS):
        raise InputError(
            f"{directory}: --lr is for what a step would do, in records of `gradent audit` and `gradent tokens`; here "
            f"is {names[0]} ({_WRITERS[names[0]][0]}). Leave it out."
        )
    writers = {_WRITERS[name][1]: None for name in names}  # a run's pairs and rows have one
    return [path for write in writers for path in write(place, lr)]
