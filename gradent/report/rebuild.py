"""Every page and figure that the records in a directory allow, made anew."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from gradent.errors import DataFileError
from gradent.report.audit.figures import write_audit_figures
from gradent.report.audit.page import write_audit_report
from gradent.report.demo import write_demo_report
from gradent.report.tokens.page import write_token_report

__all__ = ["write_report"]

_Writer = Callable[[str | os.PathLike[str]], Path]

_PAGES: dict[str, tuple[str, _Writer]] = {
    "summary.json": ("gradent audit", write_audit_report),
    "demo.json": ("gradent demo", write_demo_report),
    "tokens.json": ("gradent tokens", write_token_report),
}


def write_report(directory: str | os.PathLike[str]) -> list[Path]:
    """Find which records lie in a directory, and write their pages and figures.

    Args:
        directory: of `gradent audit` (summary.json), `gradent demo` (demo.json) or `gradent tokens` (tokens.json).

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
    found = [name for name in _PAGES if (place / name).is_file()]
    if not found:
        looked = ", ".join(f"{name} (`{command}`)" for name, (command, _) in _PAGES.items())
        raise DataFileError(f"{directory}: no records in it. Looked for: {looked}.")
    if {"summary.json", "demo.json"} <= set(found):
        raise DataFileError(
            f"{directory}: holds summary.json of an audit and demo.json of a demo, and one pairs.parquet for both. Run "
            "one of them again with another --out, and remove its JSON file here."
        )
    written: list[Path] = []
    for name in found:
        written.append(_PAGES[name][1](place))
        if name == "summary.json":
            written += write_audit_figures(place)
    return written
