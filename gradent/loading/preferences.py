"""From rows to token pairs: TRL's preference formats, checked row by row, tokenized as TRL's DPOTrainer does it.

A row is `prompt`, `chosen`, `rejected` as strings or as lists of messages, or `chosen` and `rejected` alone with the
prompt as their common beginning. TRL's own helpers tell the formats apart and take the prompt out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational, maybe_extract_prompt

from gradent.errors import DataFileError, InputError, PairError
from gradent.loading.preference_files import Row
from gradent.pairs.tokenize import tokenize_pair

__all__ = [
    "AuditPair", "PairSet", "SkippedRow", "check_template", "draw_in_slices", "kind_of", "prepare_pairs",
    "refuse_unread", "tokenizer_errors",
]  # fmt: skip

Parts = tuple[Any, Any, Any]
"""Prompt, chosen and rejected of a row: all strings, or all lists of messages."""

_LISTED = 5  # further bad rows that an error names


@dataclass(frozen=True, kw_only=True)
class AuditPair:
    """One usable pair."""

    row: int  # row of the data, counted from 0
    where: str  # file and line, as errors name it
    prompt_ids: list[int]  # tokens that both responses share as their context
    chosen_ids: list[int]  # tokens of the chosen response
    rejected_ids: list[int]  # tokens of the rejected response
    chosen_text: str  # the chosen response as one string, for tables
    rejected_text: str  # the rejected response as one string, for tables
    prompt_text: str = ""  # the prompt as one string, for tables
    truncated: int = 0  # responses (0, 1 or 2) that lost their end to `max_length`

    @property
    def ids(self) -> tuple[list[int], list[int], list[int]]:
        """Tokens of prompt, chosen and rejected, as `PairBatch.from_tokens` takes them."""
        return self.prompt_ids, self.chosen_ids, self.rejected_ids

    @property
    def tokens(self) -> int:
        """Tokens of both rows, prompts included: what measuring the pair costs."""
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two rows, prompt included."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True, kw_only=True)
class SkippedRow:
    """A row that was left out, and why."""

    row: int
    where: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class PairSet:
    """The pairs to measure, in order of their rows, and the rows that were left out."""

    pairs: list[AuditPair]
    skipped: list[SkippedRow] = field(default_factory=list)


def prepare_pairs(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = 1024, add_eos: bool = True,
    skip_bad_rows: bool = False, max_pairs: int | None = None, seed: int = 0,
) -> PairSet:  # fmt: skip
    """Check and tokenize the rows."""
    if max_pairs is not None and max_pairs < 1:
        raise InputError(f"max_pairs is {max_pairs}; it must be at least 1 (command line: --max-pairs).")
    readable: list[tuple[Row, Parts]] = []  # the rows that hold a pair
    skipped: list[SkippedRow] = []
    for row in rows:
        try:
            if row.problem is not None:
                raise DataFileError(f"{row.where}: {row.problem}")
            readable.append((row, _split_row(row.where, row.values)))
        except (DataFileError, PairError) as error:
            skipped.append(_skip(row, error))
    pairs: list[AuditPair] = []
    letters = [sum(len(_plain(response)) for response in parts[1:]) for _, parts in readable]
    for candidates in draw_in_slices(letters, max_pairs, seed):
        for number in candidates:  # the first that can be used
            row, parts = readable[number]
            try:
                pairs.append(_to_pair(row, parts, tokenizer, max_length=max_length, add_eos=add_eos))
                break
            except (DataFileError, PairError) as error:
                skipped.append(_skip(row, error))
    pairs.sort(key=lambda pair: pair.row)
    skipped.sort(key=lambda bad: bad.row)
    if skipped and not (skip_bad_rows and pairs):
        raise DataFileError(_describe_bad(skipped, rows=len(rows), anything_left=bool(pairs)))
    return PairSet(pairs=pairs, skipped=skipped)


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
    return SkippedRow(row=row.index, where=row.where, reason=str(error))


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


def _to_pair(
    row: Row, parts: Parts, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None, add_eos: bool
) -> AuditPair:
    prompt, chosen, rejected = parts
    check_template(row.where, chosen, tokenizer)
    ids = _tokenize(tokenizer, parts, max_length=None, add_eos=add_eos, where=row.where)
    lengths = len(ids[0]) + len(ids[1]), len(ids[0]) + len(ids[2])
    truncated = 0 if max_length is None else sum(length > max_length for length in lengths)
    if truncated:
        ids = _tokenize(tokenizer, parts, max_length=max_length, add_eos=add_eos, where=row.where)
    return AuditPair(
        row=row.index, where=row.where, prompt_ids=ids[0], chosen_ids=ids[1], rejected_ids=ids[2],
        chosen_text=_plain(chosen), rejected_text=_plain(rejected), prompt_text=_plain(prompt), truncated=truncated,
    )  # fmt: skip


def check_template(where: str, response: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse messages where the tokenizer cannot render them."""
    if not isinstance(response, str) and not tokenizer.chat_template:
        raise InputError(
            f"{where}: the row holds messages, but the tokenizer has no chat template to render them with. "
            "Use the model's instruction-tuned tokenizer, set tokenizer.chat_template and save it with the model, or "
            "give the data as plain strings."
        )


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, parts: Parts, *, max_length: int | None, add_eos: bool, where: str
) -> tuple[list[int], list[int], list[int]]:
    with tokenizer_errors(where, parts):
        return tokenize_pair(tokenizer, *parts, max_length=max_length, add_eos=add_eos, where=where)


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


def _split_row(where: str, values: Any) -> Parts:
    """Prompt, chosen and rejected of one row, all strings or all messages."""
    if not isinstance(values, Mapping):
        raise DataFileError(f"{where}: the row is a {type(values).__name__}; an object with keys is expected.")
    missing = [key for key in ("chosen", "rejected") if key not in values]
    if missing:
        raise DataFileError(
            f"{where}: missing {' and '.join(map(repr, missing))}; the row has {sorted(map(str, values))}. Accepted: "
            "prompt, chosen and rejected, or chosen and rejected that begin with the same prompt."
        )
    refuse_unread(where, values)
    kinds = {key: kind_of(where, key, values[key]) for key in ("chosen", "rejected")}
    if kinds["chosen"] != kinds["rejected"]:
        raise DataFileError(
            f"{where}: chosen is {kinds['chosen']} but rejected is {kinds['rejected']}; both must be alike."
        )
    if values["chosen"] == values["rejected"]:
        raise PairError(f"{where}: chosen equals rejected; such a pair has no preference to learn. Remove it.")
    return _take_prompt(where, values, kinds["chosen"])


def refuse_unread(where: str, values: Mapping[str, Any]) -> None:
    """Refuse a row with keys that change its tokens in ways that gradent does not know."""
    for key in ("tools", "chat_template_kwargs", "images", "image"):
        if values.get(key):
            raise DataFileError(
                f"{where}: the row carries {key!r}, which gradent does not read, so its tokens would not be those that "
                f"TRL trains on. Remove {key!r} to audit the row without it."
            )


def _take_prompt(where: str, values: Mapping[str, Any], kind: str) -> Parts:
    if "prompt" in values:
        prompt_kind = "text" if values["prompt"] == "" else kind_of(where, "prompt", values["prompt"])
        if (prompt_kind, kind) == ("messages", "text"):
            raise DataFileError(f"{where}: prompt is messages but chosen and rejected are text; all must be alike.")
    is_explicit = "prompt" in values and prompt_kind == kind
    # TRL's extraction needs a common beginning: with none it indexes the last element and cuts at random.
    if not is_explicit and values["chosen"][0] != values["rejected"][0]:
        raise DataFileError(
            f"{where}: no 'prompt', and chosen and rejected do not begin alike, so there is no prompt to take out. "
            "Add a 'prompt', or let both begin with it."
        )
    example = {key: values[key] for key in ("prompt", "chosen", "rejected") if key in values}
    split = maybe_extract_prompt(example)
    return split["prompt"], split["chosen"], split["rejected"]


def kind_of(where: str, key: str, value: Any) -> str:
    """`text` or `messages`, as TRL's own helper sees it, after the checks that the helper leaves out."""
    if isinstance(value, str | list) and not value:
        raise PairError(f"{where}: {key} is empty; it needs at least one token. Remove this pair.")
    if isinstance(value, str):
        return "text"
    if is_conversational({"completion": value}):  # one of the keys that it looks at
        for number, message in enumerate(value):
            if not (isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message):
                raise DataFileError(f"{where}: {key}[{number}] is not a message; each needs 'role' and 'content'.")
        return "messages"
    raise DataFileError(
        f"{where}: {key} is {_describe(value)}; accepted is a string, or a list of messages "
        '([{"role": "user", "content": "..."}, ...]).'
    )


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    return f"a {type(value).__name__}" + (f" of {type(value[0]).__name__}" if isinstance(value, list) else "")


def _plain(response: Any) -> str:
    """A prompt or response as one string: itself, or the contents of its messages."""
    if isinstance(response, str):
        return response
    return "\n".join(str(message["content"]) for message in response)
