"""From rows to token pairs: checked row by row, tokenized and cut as TRL's DPOTrainer does it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gradent.errors import DataFileError, InputError, PairError
from gradent.loading.preference_files import Row
from gradent.loading.preference_rows import Parts, plain_text, read_template, split_row
from gradent.pairs.batch import PairBatch, make_row
from gradent.pairs.preparation import IgnoredPairError, Preparation, common_prefix

__all__ = [
    "AuditPair", "PairSet", "SkippedRow", "batch_of", "check_template", "collect_pairs", "count_repeated",
    "describe_prompts", "draw_in_slices", "prepare_pairs", "require_usable", "tokenizer_errors",
]  # fmt: skip

_QUESTIONS = ("question", "instruction", "input", "system", "query", "messages", "conversations")
"""Columns in which other data sets have what TRL calls the prompt."""

_SHORT = 4  # tokens: a prompt of fewer is told of, where it was taken from the responses
_MANY, _HEADER = 4, 12  # pairs, and characters that all of their responses begin with: from these on it is told of
_LISTED = 5  # further bad rows that an error names


@dataclass(frozen=True, kw_only=True)
class AuditPair:
    """One usable pair."""

    row: int  # row of the data, counted from 0
    where: str  # file and line, as errors name it
    prompt_ids: Sequence[int]  # tokens of the context, of chosen where `rejected_prompt_ids` is there
    chosen_ids: Sequence[int]  # tokens of the chosen response
    rejected_ids: Sequence[int]  # tokens of the rejected response
    chosen_text: str  # the chosen response as one string, for tables
    rejected_text: str  # the rejected response as one string, for tables
    prompt_text: str = ""  # the prompt as one string, for tables
    truncated: int = 0  # rows (0, 1 or 2) that `max_length` shortened
    rejected_prompt_ids: Sequence[int] | None = None  # context of rejected, where a cut at the start left it another

    @property
    def ids(self) -> list[Sequence[int]]:
        """Tokens of prompt, chosen and rejected, and of rejected's own prompt where it has one."""
        own = [] if self.rejected_prompt_ids is None else [self.rejected_prompt_ids]
        return [self.prompt_ids, self.chosen_ids, self.rejected_ids, *own]

    @property
    def rows(self) -> tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]:
        """Context and response of chosen, and of rejected."""
        other = self.prompt_ids if self.rejected_prompt_ids is None else self.rejected_prompt_ids
        return (self.prompt_ids, self.chosen_ids), (other, self.rejected_ids)

    @property
    def tokens(self) -> int:
        """Tokens of both rows, prompts included: what measuring the pair costs."""
        return sum(len(prompt) + len(ids) for prompt, ids in self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two rows, prompt included."""
        return max(len(prompt) + len(ids) for prompt, ids in self.rows)


def batch_of(pairs: Sequence[AuditPair]) -> PairBatch:
    """Pairs as a batch."""
    return PairBatch.from_rows([make_row(*pair.rows[side]) for side in (0, 1) for pair in pairs])


@dataclass(frozen=True, kw_only=True)
class SkippedRow:
    """A row that was left out, and why."""

    row: int
    where: str
    reason: str
    cause: str | None = None  # why a trainer learns nothing from it; None where the row is faulty


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """The pairs to measure, in order of their rows, and the rows that were left out."""

    pairs: list[AuditPair]
    skipped: list[SkippedRow] = field(default_factory=list)


def prepare_pairs(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, how: Preparation | None = None, *,
    skip_bad_rows: bool = False, max_pairs: int | None = None, seed: int = 0,
) -> PairSet:  # fmt: skip
    """Check and tokenize the rows; those from which a trainer learns nothing are left out."""
    found = collect_pairs(rows, tokenizer, how, max_pairs=max_pairs, seed=seed)
    require_usable(found, len(rows), skip_bad_rows=skip_bad_rows)
    return found


def collect_pairs(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, how: Preparation | None = None, *,
    max_pairs: int | None = None, seed: int = 0,
) -> PairSet:  # fmt: skip
    """The rows that can be used, tokenized, and the others with their reasons."""
    how = how or Preparation()
    if max_pairs is not None and max_pairs < 1:
        raise InputError(f"max_pairs is {max_pairs}; it must be at least 1 (command line: --max-pairs).")
    readable: list[tuple[Row, Parts]] = []  # the rows that hold a pair
    skipped: list[SkippedRow] = []
    for row in rows:
        try:
            if row.problem is not None:
                raise DataFileError(f"{row.where}: {row.problem}")
            readable.append((row, split_row(row.where, row.values)))
        except (DataFileError, PairError) as error:
            skipped.append(_skip(row, error))
    pairs: list[AuditPair] = []
    letters = [sum(len(plain_text(response)) for response in parts[1:]) for _, parts in readable]
    for candidates in draw_in_slices(letters, max_pairs, seed):
        for number in candidates:  # the first that can be used
            row, parts = readable[number]
            try:
                pairs.append(_to_pair(row, parts, tokenizer, how))
                break
            except (DataFileError, PairError) as error:
                skipped.append(_skip(row, error))
    pairs.sort(key=lambda pair: pair.row)
    skipped.sort(key=lambda bad: bad.row)
    return PairSet(pairs=pairs, skipped=skipped)


def require_usable(found: PairSet, rows: int, *, skip_bad_rows: bool) -> None:
    """Refuse data with faulty rows, unless these are to be skipped, and data without a usable pair."""
    bad = [row for row in found.skipped if row.cause is None]
    if (bad and not skip_bad_rows) or (found.skipped and not found.pairs):
        raise DataFileError(_describe_bad(bad or found.skipped, rows=rows, anything_left=bool(found.pairs)))


def draw_in_slices(sizes: Sequence[int], count: int | None, seed: int) -> list[list[int]]:
    """Cut items, sorted by size, into slices of equal count, and shuffle each: its first item is the one drawn."""
    # Stratified sampling, one draw a stratum: long and short items are there in their true proportions, in every
    # sample. The items after the first stand in for it, where it proves to be of no use.
    if count is None or count >= len(sizes):
        return [[position] for position in range(len(sizes))]
    order = sorted(range(len(sizes)), key=lambda position: (sizes[position], position))
    chance = random.Random(seed)
    slices = [order[part * len(order) // count : (part + 1) * len(order) // count] for part in range(count)]
    for positions in slices:
        chance.shuffle(positions)
    return slices


def _skip(row: Row, error: Exception) -> SkippedRow:
    cause = error.cause if isinstance(error, IgnoredPairError) else None
    return SkippedRow(row=row.index, where=row.where, reason=str(error), cause=cause)


def _describe_bad(skipped: Sequence[SkippedRow], *, rows: int, anything_left: bool) -> str:
    lines = [skipped[0].reason]
    others = skipped[1 : 1 + _LISTED]
    if others:
        more = len(skipped) - 1 - len(others)
        listed = ", ".join(bad.where for bad in others) + (f" and {more} more" if more else "")
        lines.append(f"{len(skipped) - 1} other rows cannot be used either: {listed}.")
    if anything_left:
        lines.append(
            "Correct the data, or pass --skip-bad-rows to go on without such rows (they are counted and listed)."
        )
    elif rows == 1:
        lines.append("No usable row is left: correct this one, or choose another.")
    else:
        lines.append("No usable row is left: correct the data.")
    return "\n".join(lines)


def _to_pair(row: Row, parts: Parts, tokenizer: PreTrainedTokenizerBase, how: Preparation) -> AuditPair:
    prompt, chosen, rejected = parts
    check_template(row.where, chosen, tokenizer)
    template = {} if isinstance(chosen, str) else read_template(row.where, row.values)
    with tokenizer_errors(row.where, parts):
        ((prompt_ids, chosen_ids), (other, rejected_ids)), truncated = how.rows(
            tokenizer, prompt, (chosen, rejected), where=row.where, names=("chosen", "rejected"), **template
        )
    if (prompt_ids, chosen_ids) == (other, rejected_ids):
        _refuse_alike(row.where, how, is_chat=not isinstance(chosen, str), truncated=truncated, length=len(chosen_ids))
    return AuditPair(
        row=row.index, where=row.where, prompt_ids=prompt_ids, chosen_ids=chosen_ids, rejected_ids=rejected_ids,
        chosen_text=plain_text(chosen), rejected_text=plain_text(rejected), prompt_text=plain_text(prompt),
        truncated=truncated, rejected_prompt_ids=None if other == prompt_ids else other,
    )  # fmt: skip


def _refuse_alike(where: str, how: Preparation, *, is_chat: bool, truncated: int, length: int) -> None:
    name = "max_length" if truncated else "max_completion_length"
    if truncated or length == how.max_completion_length:
        cause = f"chosen and rejected differ only in what {name} {getattr(how, name)} cuts off"
        remedy = f"Raise {name} (command line: --{name.replace('_', '-')}), or remove the pair."
    elif is_chat:
        cause, remedy = "the chat template renders both alike (it drops what differs)", "Such pairs teach nothing."
    else:
        cause, remedy = "the tokenizer makes the same tokens of both", "Such pairs teach nothing."
    raise IgnoredPairError(f"{where}: chosen equals rejected, token for token: {cause}. {remedy}", cause)


def describe_prompts(rows: Sequence[Row], pairs: Sequence[AuditPair]) -> list[str]:
    """What is odd about the prompts: there twice, taken from responses beside a column that may hold them, a header."""
    values = {row.index: row.values for row in rows}
    implicit = [pair for pair in pairs if "prompt" not in values[pair.row]]
    twice = count_repeated(rows, pairs)
    notes = []
    if twice:
        notes.append(
            f"In {twice} of {len(pairs)} pairs chosen begins with the prompt, so that the model sees it twice. "
            "Where rejected does as well, both responses share it. Take it out of the responses, unless the run was "
            "trained so."
        )
    texts = [text for pair in pairs for text in (pair.chosen_text, pair.rejected_text)]
    header = texts[0][: common_prefix(min(texts), max(texts))] if texts else ""  # between them lie all others
    if len(pairs) >= _MANY and len(header) >= _HEADER:
        notes.append(
            f"All {2 * len(pairs)} responses begin with the same {len(header)} characters, {header[:40]!r}: what both "
            "responses share brings their gradients together. If it is a header of the chat template, take it out of "
            "the responses (the template writes one), unless the run was trained so."
        )
    columns = sorted({key for pair in implicit for key in _QUESTIONS if values[pair.row].get(key)})
    short = sum(len(pair.prompt_ids) < _SHORT for pair in implicit)
    inside = sum(
        pair.prompt_text[-1:].isalnum() and any(text[:1].isalnum() for text in (pair.chosen_text, pair.rejected_text))
        for pair in implicit if isinstance(values[pair.row]["chosen"], str)
    )  # fmt: skip
    if columns or short or inside:
        unread = f" {', '.join(columns)} {'is' if len(columns) == 1 else 'are'} not read." if columns else ""
        notes.append(
            f"{len(implicit)} of {len(pairs)} pairs have no 'prompt': as in TRL it is what chosen and rejected begin "
            f"with alike.{unread} Prompts of fewer than {_SHORT} tokens: {short}; that end inside a word: {inside}. If "
            "the run was given a question, put it into 'prompt'."
        )
    return notes


def count_repeated(rows: Sequence[Row], pairs: Sequence[AuditPair]) -> int:
    """Pairs whose chosen begins with the prompt once more; 0 where they are fewer than half, or a single one."""
    values = {row.index: row.values for row in rows}
    count = sum("prompt" in values[pair.row] and _repeats_prompt(values[pair.row]) for pair in pairs)
    return count if count >= 2 and 2 * count >= len(pairs) else 0


def _repeats_prompt(values: Any) -> bool:
    prompt, chosen = values["prompt"], values["chosen"]
    if isinstance(prompt, str) != isinstance(chosen, str) or len(prompt) < (_SHORT if isinstance(prompt, str) else 1):
        return False
    return bool(chosen[: len(prompt)] == prompt)


def check_template(where: str, response: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse messages where the tokenizer cannot render them."""
    if not isinstance(response, str) and not tokenizer.chat_template:
        raise InputError(
            f"{where}: the row holds messages, but the tokenizer has no chat template to render them with. "
            "Use the model's instruction-tuned tokenizer, set tokenizer.chat_template and save it with the model, or "
            "give the data as plain strings."
        )


@contextmanager
def tokenizer_errors(where: str, parts: Sequence[Any]) -> Iterator[None]:
    """Name the row in what a tokenizer says of its prompt and responses."""
    try:
        yield
    except (TemplateError, TypeError, KeyError, UnicodeError) as error:
        if any("\ud800" <= letter <= "\udfff" for letter in json.dumps(parts, ensure_ascii=False)):
            raise DataFileError(
                f"{where}: the text holds half of a surrogate pair (\\ud800 to \\udfff), which is no character. Repair "
                "or remove the row."
            ) from error
        raise DataFileError(f"{where}: the tokenizer's chat template refuses the messages ({error}).") from error
