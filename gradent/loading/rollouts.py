"""From a row to a group of rollouts: a prompt, its completions, and how far the loss raises or lowers each.

A row is `prompt`, `completions` (a list, of strings or of lists of messages as the prompt is), and one of `weights`,
`advantages` and `rewards`: a number for each completion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gradent.errors import DataFileError
from gradent.loading.preference_files import Row
from gradent.loading.preference_rows import kind_of, read_template, refuse_unread
from gradent.loading.preferences import check_template, tokenizer_errors
from gradent.pairs.batch import make_row
from gradent.pairs.preparation import Preparation, TokenRow
from gradent.pairs.row_batch import RowBatch

__all__ = ["RolloutGroup", "holds_rollouts", "prepare_rollouts"]

_WEIGHTS = ("weights", "advantages", "rewards")
"""Keys that say how far each completion is raised; where a row has several, the first of these counts."""

_ACCEPTED = (
    "one of 'weights' (−∂L/∂log π of each completion), 'advantages' and 'rewards': a list of finite numbers, one for "
    "each completion"
)
_ROUNDING = 1e-9  # of the largest reward: what is nearer to the mean than this is at the mean


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """The rollouts of one prompt."""

    row: int  # row of the data, counted from 0
    where: str  # file and line, as errors name it
    rows: list[TokenRow]  # context and completion of each; the contexts differ where a cut at the start made them
    weights: list[float]  # above 0 raises a completion
    weights_from: str  # the key that they come from
    truncated: int  # rows that `max_length` shortened

    @property
    def prompt_ids(self) -> list[int]:
        """The longest context: the prompt, or what a cut at the start left of it."""
        return max((context for context, _ in self.rows), key=len)

    @property
    def completion_ids(self) -> list[list[int]]:
        """Tokens of each completion."""
        return [ids for _, ids in self.rows]

    @property
    def batch(self) -> RowBatch:
        """All rows, as one group."""
        return RowBatch.from_rows([make_row(*row) for row in self.rows], torch.zeros(len(self.rows), dtype=torch.int64))

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return max(number for row in self.rows for ids in row for number in ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, prompt included."""
        return max(len(context) + len(ids) for context, ids in self.rows)


def holds_rollouts(row: Row) -> bool:
    """Whether a row is a group of rollouts, and no pair."""
    return isinstance(row.values, Mapping) and "completions" in row.values and "chosen" not in row.values


def prepare_rollouts(row: Row, tokenizer: PreTrainedTokenizerBase, how: Preparation | None = None) -> RolloutGroup:
    """Check and tokenize a row that holds rollouts."""
    how = how or Preparation()
    where, values = row.where, row.values
    refuse_unread(where, values)
    completions = values["completions"]
    if not isinstance(completions, Sequence) or isinstance(completions, str) or len(completions) < 2:
        count = f" of {len(completions)}" if isinstance(completions, list) else ""
        raise DataFileError(
            f"{where}: completions is a {type(completions).__name__}{count}; accepted is a list of two completions or "
            "more, all strings or all lists of messages."
        )
    if "prompt" not in values:
        raise DataFileError(f"{where}: missing 'prompt', which the completions follow; the row has {sorted(values)}.")
    prompt = values["prompt"]
    kinds = {"prompt": "text" if prompt == "" else kind_of(where, "prompt", prompt)}
    kinds.update({f"completions[{n}]": kind_of(where, f"completions[{n}]", each) for n, each in enumerate(completions)})
    odd = next((name for name, kind in kinds.items() if kind != kinds["prompt"]), None)
    if odd is not None:
        raise DataFileError(f"{where}: {odd} is {kinds[odd]} but prompt is {kinds['prompt']}; all must be alike.")
    weights, key = _read_weights(where, values, len(completions))
    check_template(where, completions[0], tokenizer)
    template = read_template(where, values)
    with tokenizer_errors(where, [prompt, *completions]):
        rows, truncated = how.rows(tokenizer, prompt, completions, where=where, names=list(kinds)[1:], **template)
    return RolloutGroup(row=row.index, where=where, rows=rows, weights=weights, weights_from=key, truncated=truncated)


def _read_weights(where: str, values: Mapping[str, Any], count: int) -> tuple[list[float], str]:
    """How far each completion is raised, and the key that says so."""
    key = next((key for key in _WEIGHTS if values.get(key) is not None), None)
    if key is None:
        raise DataFileError(
            f"{where}: the row has {sorted(map(str, values))}, which weighs nothing. Accepted: {_ACCEPTED}."
        )
    numbers = values[key]
    if not isinstance(numbers, Sequence) or isinstance(numbers, str) or len(numbers) != count:
        received = f"{len(numbers)} values" if isinstance(numbers, list) else f"a {type(numbers).__name__}"
        raise DataFileError(f"{where}: {key} is {received} for {count} completions. Accepted: {_ACCEPTED}.")
    for number, each in enumerate(numbers):
        if isinstance(each, bool) or not isinstance(each, int | float) or not math.isfinite(each):
            raise DataFileError(f"{where}: {key}[{number}] is {each!r}. Accepted: {_ACCEPTED}.")
    weights = list(map(float, numbers))
    if key == "rewards":
        mean, largest = fmean(weights), max(map(abs, weights))
        weights = [0.0 if abs(each - mean) <= _ROUNDING * largest else each - mean for each in weights]
    if not min(weights) < 0 < max(weights):
        about = "above and one below their mean" if key == "rewards" else "above 0 and one below it"
        raise DataFileError(
            f"{where}: {key} are {_listed(numbers)}, so no completion is lowered beside one that is raised, and there "
            f"is no influence to show. Choose a row with one of them {about} (command line: --pair)."
        )
    return weights, key


def _listed(numbers: Sequence[float]) -> str:
    more = f" and {len(numbers) - 6} more" if len(numbers) > 6 else ""
    return ", ".join(f"{number:g}" for number in numbers[:6]) + more
