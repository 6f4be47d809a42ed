"""How the trainer of a model tokenized: the release of TRL and the limits that its files tell of.

A trainer's training_args.bin is a pickle, which can run code when it is loaded. Here its opcodes are listed, and plain
values are taken from where a known name stands before them.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

__all__ = ["Trained", "read_arguments", "read_trained"]

_LIMITS = ("max_length", "truncation_mode", "max_prompt_length", "max_completion_length")
_LARGEST = 1 << 24  # bytes of pickled arguments that are looked through
_ARGUMENTS = re.compile(r"[\w.]+ \w*(?:Config|Arguments)")
_ENUM = re.compile(r"[\w.]+ \w+Type")
_RELEASE = re.compile(r"^- TRL: (\d+(?:\.\d+)+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a model's files say of its training."""

    release: str | None = None  # of TRL, as the model card names it
    limits: dict[str, Any] = field(default_factory=dict)  # of `_LIMITS`, those that training_args.bin names
    day: datetime | None = None  # when the trainer saved its first state
    beta: float | None = None  # of its loss, where training_args.bin names it


def read_trained(models: Iterable[str]) -> Trained:
    """What the directories of some models say, and those that they are in; the first that says a thing counts."""
    places = [path for model in models if (path := Path(model)).is_dir()]
    places += [path.resolve().parent for path in places if re.fullmatch(r"checkpoint-\d+", path.resolve().parent.name)]
    places += [path.resolve().parent for path in places if re.fullmatch(r"checkpoint-\d+", path.resolve().name)]
    releases, limits, days, betas = list[str](), dict[str, Any](), list[float](), list[float]()
    for place in dict.fromkeys(places):
        releases += _read_release(place / "README.md")
        values = _read_values(place / "training_args.bin")
        found = _named_values(values, (*_LIMITS, "beta"))
        limits = {name: found[name] for name in _LIMITS if name in found and _is_limit(name, found[name])} | limits
        betas += [value for value in (found.get("beta"),) if isinstance(value, float) and value > 0]
        days += [path.stat().st_mtime for path in (place / "trainer_state.json",) if path.is_file()]
    day = datetime.fromtimestamp(min(days)) if days else None
    return Trained(release=releases[0] if releases else None, limits=limits, day=day, beta=betas[0] if betas else None)


def read_arguments(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """The arguments of these names in a training_args.bin, and its `class`; empty where it cannot be read."""
    values = _read_values(path)
    found = _named_values(values, names)
    classes = [value.split()[-1] for value in values if isinstance(value, str) and _ARGUMENTS.fullmatch(value)]
    return {**found, "class": classes[0]} if found and classes else {}


def _named_values(values: Sequence[Any], names: Iterable[str]) -> dict[str, Any]:
    """The value behind each of these names; a list of plain values is a tuple, one of another kind is left out."""
    found: dict[str, Any] = {}
    for place, name in enumerate(values):
        if name not in names or name in found or place + 1 >= len(values):
            continue
        value: Any = values[place + 1]
        if isinstance(value, str) and _ENUM.fullmatch(value):  # a member of an enumeration: its value comes next
            value = next((each for each in values[place + 2 :] if isinstance(each, str)), None)
        if value is pickletools:  # a list, or what is no plain value
            value = tuple(takewhile(lambda each: each is not pickletools, values[place + 2 :]))
            if not value:
                continue
        found[name] = value
    return found


def _read_release(card: Path) -> list[str]:
    try:
        return _RELEASE.findall(card.read_text("utf-8"))
    except (OSError, UnicodeError):
        return []


def _read_values(path: Path) -> list[Any]:
    """All plain values of a trainer's arguments, in order; none where the file cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(names) != 1 or archive.getinfo(names[0]).file_size > _LARGEST:
                return []
            return list(_plain_values(archive.read(names[0])))
    except (OSError, ValueError, zipfile.BadZipFile, RuntimeError, NotImplementedError):
        return []


def _is_limit(name: str, value: Any) -> bool:
    if name == "truncation_mode":
        return value in ("keep_start", "keep_end")
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)


def _plain_values(pickled: bytes) -> Iterator[Any]:
    """The values that a pickle pushes, in order; an object in place of what is no plain value."""
    memo: dict[Any, Any] = {}
    last: Any = None
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = last
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = last
        elif opcode.name not in ("SETITEM", "SETITEMS", "MARK"):
            if opcode.name in ("BINGET", "LONG_BINGET"):
                last = memo.get(argument)
            elif opcode.name in ("NONE", "NEWTRUE", "NEWFALSE"):
                last = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name]
            else:
                last = argument if isinstance(argument, str | int | float) else pickletools
            yield last
