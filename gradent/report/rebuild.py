"""Every page and figure that the records in a directory allow, made anew."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from gradent.errors import DataFileError
from gradent.report.audit.figures import draw_audit
from gradent.report.audit.page import write_audit_page
from gradent.report.audit.records import read_audit
from gradent.report.demo import write_demo_report
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
}


def write_report(directory: str | os.PathLike[str]) -> list[Path]:
    """Find which records lie in a directory, and write their pages and figures.

    Args:
        directory: of `gradent audit` (summary.json), `gradent demo` (demo.json), `gradent scan` (scan.json) or
            `gradent tokens` (tokens.json, or group_tokens.json of a group).

    Returns:
        The files that were written.

    Raises:
        DataFileError: the directory is not there, holds none of these records, or those of an audit and of a demo,
            which share the names of their files.
    """
    place = Path(directory)
    if not place.is_dir():
        raise DataFileError(
            f"{directory}: there is no such directory. Name one that a gradent command wrote with --out."
        )
    names = [name for name in _WRITERS if (place / name).is_file()]
    if not names:
        looked = ", ".join(f"{name} (`{command}`)" for name, (command, _) in _WRITERS.items())
        raise DataFileError(f"{directory}: no records in it. Looked for: {looked}.")
    if {"summary.json", "demo.json"} <= set(names):
        raise DataFileError(
            f"{directory}: holds summary.json of an audit and demo.json of a demo, and one pairs.parquet for both. Run "
            "one of them again with another --out, and remove its JSON file here."
        )
    return [path for name in names for path in _WRITERS[name][1](place)]
