"""What is judged: statements that are generated from a word list, or read from a file."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from gradent.errors import DataFileError, InputError
from gradent.notices import warn

__all__ = ["LONGEST", "Statement", "divide_statements", "draw_statements", "read_statements", "statement_words"]

LONGEST = 160
"""Characters of a statement that is read from a file, at most."""

_LABELS = {"positive": True, "negative": False}

_OPENERS = ("", "today", "well", "honestly", "last week", "this morning", "in the end", "so")
_SUBJECTS = (
    "the concert", "my new phone", "this coffee", "our holiday", "the exam", "my birthday", "the bus ride",
    "the match", "her talk", "the film", "that song", "my garden", "the weather", "the meeting", "our dinner",
    "the hotel", "the game", "his letter", "the party", "my job", "the trip", "the book", "the class", "our team",
    "the show", "the soup",
)  # fmt: skip
_VERBS = ("was", "felt", "seemed", "turned out", "looked", "sounded")
_DEGREES = ("", "really", "quite", "so", "a bit", "truly")
_POSITIVE = (
    "wonderful", "great", "lovely", "brilliant", "delightful", "amazing", "pleasant", "splendid", "cheerful",
    "beautiful", "fantastic", "charming", "excellent", "joyful", "perfect", "sweet",
)  # fmt: skip
_NEGATIVE = (
    "awful", "terrible", "horrible", "dreadful", "boring", "annoying", "painful", "gloomy", "miserable", "ugly",
    "disgusting", "hopeless", "dull", "rotten", "broken", "bitter",
)  # fmt: skip
_TAILS = ("", "for me", "again", "as usual", "for everyone", "you know", "after all", "to be fair")


@dataclass(frozen=True)
class Statement:
    """One statement and its true sentiment."""

    text: str
    positive: bool


def draw_statements(rng: random.Random, count: int) -> list[Statement]:
    """Distinct generated statements, positive and negative by turns."""
    drawn: dict[str, Statement] = {}
    while len(drawn) < count:
        positive = len(drawn) % 2 == 0
        words = (_OPENERS, _SUBJECTS, _VERBS, _DEGREES, _POSITIVE if positive else _NEGATIVE, _TAILS)
        text = " ".join(part for part in map(rng.choice, words) if part)
        drawn.setdefault(text, Statement(text, positive))
    return list(drawn.values())


def statement_words() -> set[str]:
    """Every word of the generated statements."""
    parts = (_OPENERS, _SUBJECTS, _VERBS, _DEGREES, _POSITIVE, _NEGATIVE, _TAILS)
    return {word for text in chain(*parts) for word in text.split()}


def divide_statements(rng: random.Random, statements: Sequence[Statement], count: int) -> list[Statement]:
    """Some of the given statements, shuffled, positive and negative by turns."""
    sides: list[list[Statement]] = []
    for positive, name in ((True, "positive"), (False, "negative")):
        side = [statement for statement in statements if statement.positive is positive]
        wanted = (count + positive) // 2
        if len(side) < wanted:
            raise InputError(
                f"statements: {len(side)} {name} ones, and {wanted} are needed ({count} in all for probe and training, "
                "half of each sentiment). Give more of them, or ask for fewer."
            )
        rng.shuffle(side)
        sides.append(side)
    return [sides[number % 2][number // 2] for number in range(count)]


def read_statements(
    path: str | os.PathLike[str], *, text: str = "text", label: str = "label", longest: int = LONGEST
) -> list[Statement]:
    """Distinct statements of a JSONL file; a warning counts those that are too long, repeated or contradictory."""
    seen: dict[str, set[bool]] = {}
    labelled = list(_labelled(Path(path), text, label))
    short = [row for row in labelled if len(row[0]) <= longest]
    for content, positive in short:
        seen.setdefault(content, set()).add(positive)
    rows, too_long = len(labelled), len(labelled) - len(short)
    statements = [Statement(content, True in signs) for content, signs in seen.items() if len(signs) == 1]
    both, repeated = len(seen) - len(statements), len(short) - len(seen)
    if not statements:
        raise InputError(f"{path}: {rows} rows, of which none is left ({too_long} of over {longest} characters).")
    if too_long or repeated or both:
        warn(
            f"{path}: of {rows} rows {too_long} are left out that have over {longest} characters, {repeated} that "
            f"repeat an earlier text, and {both} texts that have both sentiments; {len(statements)} statements remain."
        )
    return statements


def _labelled(path: Path, text: str, label: str) -> Iterator[tuple[str, bool]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _parse(line, text, label, f"{path}:{number}")
    except OSError as error:
        raise DataFileError(f"{path}: cannot be read ({error.strerror}). Give a JSONL file.") from error
    except UnicodeDecodeError as error:
        raise DataFileError(f"{path}: is not UTF-8 ({error.reason}). Give a JSONL file.") from error


def _parse(line: str, text: str, label: str, where: str) -> tuple[str, bool]:
    wanted = f'{{"{text}": "...", "{label}": "positive" or "negative"}}'
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise DataFileError(f"{where}: is not JSON ({error}); accepted is {wanted}, an object a line.") from error
    if not isinstance(row, dict) or text not in row or label not in row:
        problem = f"has the keys {sorted(row)}" if isinstance(row, dict) else f"is a {type(row).__name__}"
        raise DataFileError(f"{where}: {problem}; accepted is {wanted}.")
    if row[label] not in ("positive", "negative"):
        raise DataFileError(f"{where}: {label} is {row[label]!r}; accepted are 'positive' and 'negative'. Remove it.")
    content = " ".join(row[text].split()) if isinstance(row[text], str) else ""
    if not content:
        raise DataFileError(f"{where}: {text} is {row[text]!r}; accepted is text that is not empty. Remove it.")
    return content, _LABELS[row[label]]
