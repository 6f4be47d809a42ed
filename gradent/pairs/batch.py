"""Preference pairs as one right-padded batch: `PairBatch`.

Letters: B pairs, N = 2B rows (row i chosen, row B + i rejected), L tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradent.errors import InputError, PairError
from gradent.pairs.preparation import KEEP_START, Preparation, check_truncation_mode
from gradent.pairs.tokenize import refuse_equal, tokenize_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PairBatch", "find_problem", "make_row", "pad_rows"]

TokenPair = tuple[Sequence[int], Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class PairBatch:
    """B preference pairs as `[2B, L]` tensors: rows 0..B-1 are chosen, rows B..2B-1 rejected, right-padded.

    Left-padded tensors (a trainer's own batch, say) are accepted by the constructor too: `measure` trims every row to
    its real tokens before anything is computed.

    Attributes:
        input_ids: token ids, int64 `[2B, L]`.
        attention_mask: 1 on real tokens, int64 `[2B, L]`.
        completion_mask: 1 on the tokens of y (chosen or rejected), 0 on x and on padding, int64 `[2B, L]`.

    Raises:
        InputError: the three tensors do not have one shape `[2B, L]`.
        PairError: a row has no completion token, a completion without any token before it, a hole, or a pair's two
            rows are identical.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.input_ids.shape)
        for name, mask in (("attention_mask", self.attention_mask), ("completion_mask", self.completion_mask)):
            if mask.shape != shape:
                raise InputError(
                    f"PairBatch: {name} has shape {list(mask.shape)} but input_ids has shape {list(shape)}; "
                    "all three must be [2B, L]."
                )
        if len(shape) != 2 or shape[0] == 0 or shape[0] % 2:
            raise InputError(
                f"PairBatch: input_ids has shape {list(shape)}; accepted is [2B, L] with B >= 1: "
                "all chosen rows first, then all rejected rows in the same order."
            )
        half = len(self)
        empty = "A completion needs at least one token: remove this pair, or raise max_length if truncation ate it."
        problem = find_problem(self.attention_mask, self.completion_mask, kind="pair", empty=empty)
        if problem is not None:
            row, text = problem
            raise PairError(f"pair {row % half}, {'chosen' if row < half else 'rejected'} (row {row}): {text}")
        for pair in range(half):
            chosen, rejected = self.row(pair), self.row(half + pair)
            if torch.equal(chosen[0], rejected[0]) and torch.equal(chosen[1], rejected[1]):
                raise PairError(
                    f"pair {pair}: chosen equals rejected, token for token (after truncation, if any). Such a pair "
                    "has no preference to learn: remove it, or raise max_length if truncation made the two equal."
                )

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """Real token ids and completion marks of one row, padding removed.

        Args:
            index: row, 0 <= index < 2B.

        Returns:
            `(ids, marks)`: int64 `[T]` and bool `[T]`, T the row's number of real tokens.
        """
        keep = self.attention_mask[index].bool()
        return self.input_ids[index][keep], self.completion_mask[index].bool()[keep]

    def __len__(self) -> int:
        """Number of pairs, B."""
        return int(self.input_ids.shape[0]) // 2

    @property
    def chosen_len(self) -> Tensor:
        """Completion tokens of each chosen response, int64 `[B]`."""
        return self.completion_mask[: len(self)].sum(1)

    @property
    def rejected_len(self) -> Tensor:
        """Completion tokens of each rejected response, int64 `[B]`."""
        return self.completion_mask[len(self) :].sum(1)

    def split_tokens(self, values: Tensor) -> list[tuple[Tensor, Tensor]]:
        """One value a completion token, as `token_effects` returns them, cut into rows.

        Args:
            values: any dtype, `[T]`, T the marked tokens of all rows, in the order of
                `input_ids[completion_mask.bool()]`: the chosen rows of all pairs, then the rejected ones.

        Returns:
            `(chosen [T_w], rejected [T_l])` of each pair, views of `values`.

        Raises:
            InputError: `values` is not one value a marked token.

        Example:
            >>> batch = PairBatch.from_tokens([([1, 2], [3], [4, 5])])
            >>> batch.split_tokens(torch.tensor([0.5, 0.1, 0.2]))
            [(tensor([0.5000]), tensor([0.1000, 0.2000]))]
        """
        lengths = [*self.chosen_len.tolist(), *self.rejected_len.tolist()]
        if values.shape != (sum(lengths),):
            raise InputError(
                f"PairBatch.split_tokens: values has shape {list(values.shape)}; this batch of {len(self)} pairs has "
                f"{sum(lengths)} completion tokens, so accepted is [{sum(lengths)}]. Give the values of this very "
                "batch, one a token, padding and prompts left out."
            )
        rows = torch.split(values, lengths)
        return list(zip(rows[: len(self)], rows[len(self) :], strict=True))

    def select(self, pairs: Sequence[int]) -> PairBatch:
        """The batch of the given pairs, in the given order, trimmed to its longest row.

        Args:
            pairs: pair numbers, 0 <= number < B, at least one.

        Returns:
            A new, right-padded `PairBatch`.
        """
        rows = [*pairs, *(len(self) + pair for pair in pairs)]
        return PairBatch(*pad_rows([self.row(index) for index in rows]))

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[Tensor, Tensor]]) -> PairBatch:
        """A batch from rows as `row` returns them.

        Args:
            rows: `(ids int64 [T], marks bool [T])` of 2B rows, all chosen, then all rejected.

        Returns:
            The right-padded `PairBatch`, on the rows' device.
        """
        return cls(*pad_rows(rows))

    @classmethod
    def join(cls, batches: Sequence[PairBatch]) -> PairBatch:
        """The pairs of several batches, one after the other.

        Args:
            batches: at least one.

        Returns:
            The right-padded `PairBatch` of all their pairs.
        """
        chosen = [batch.row(pair) for batch in batches for pair in range(len(batch))]
        rejected = [batch.row(len(batch) + pair) for batch in batches for pair in range(len(batch))]
        return cls.from_rows([*chosen, *rejected])

    @classmethod
    def from_tokens(cls, pairs: Sequence[TokenPair], pad_token_id: int = 0) -> PairBatch:
        """A batch from token ids.

        Args:
            pairs: `(prompt_ids, chosen_ids, rejected_ids)` of each pair; completions exclude the prompt.
            pad_token_id: what fills rows on the right. It never enters a result.

        Returns:
            The `PairBatch` of `len(pairs)` pairs, int64 on the CPU.

        Raises:
            InputError: no pair was given, or a member is not three sequences of integers.
            PairError: an empty prompt or completion, or a pair whose chosen equals its rejected.

        Example:
            >>> batch = PairBatch.from_tokens([([1, 2], [3], [4, 5])])
            >>> batch.completion_mask.tolist()
            [[0, 0, 1, 0], [0, 0, 1, 1]]
        """
        if len(pairs) == 0:
            raise InputError("PairBatch.from_tokens: received no pair; at least one is needed.")
        chosen_rows, rejected_rows = [], []
        for number, pair in enumerate(pairs):
            if len(pair) != 3:
                raise InputError(
                    f"PairBatch.from_tokens: pair {number} has {len(pair)} members; "
                    "accepted is (prompt_ids, chosen_ids, rejected_ids)."
                )
            prompt, chosen, rejected = (list(map(int, part)) for part in pair)
            for part, ids in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
                if not ids:
                    raise PairError(f"pair {number}: {part} is empty; it needs at least one token.")
            chosen_rows.append(make_row(prompt, chosen))
            rejected_rows.append(make_row(prompt, rejected))
        return cls(*pad_rows([*chosen_rows, *rejected_rows], pad_token_id))

    @classmethod
    def from_text(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Any],
        chosen: Sequence[Any],
        rejected: Sequence[Any],
        max_length: int | None = 1024,
        *,
        add_eos: bool = False,
        truncation_mode: str = KEEP_START,
    ) -> PairBatch:
        """A batch from text, tokenized the way TRL's DPOTrainer does it.

        Prompt and prompt + completion are tokenized separately and the completion starts where the two differ. Strings
        are taken as they are; lists of messages go through the tokenizer's chat template. A row longer than
        `max_length` loses the end of its completion, or its own beginning (TRL's `keep_start` and `keep_end`).

        Args:
            tokenizer: a transformers tokenizer. It needs no pad token: padding never enters a result.
            prompts: one string, or list of messages, a pair.
            chosen: preferred completions, of the prompts' kind.
            rejected: dispreferred completions, of the prompts' kind.
            max_length: most tokens a row may have; None for no limit.
            add_eos: append the tokenizer's EOS to string completions, as TRL's DPOTrainer does while training.
            truncation_mode: "keep_start" or "keep_end": which end of a row longer than `max_length` is kept.

        Returns:
            The `PairBatch` of `len(prompts)` pairs, int64 on the CPU. A prompt of no token (an empty string, and a
            tokenizer without BOS) leaves its completions' first tokens as context: nothing predicts them, and TRL's
            loss does not count them.

        Raises:
            InputError: the three sequences differ in length, or are empty, EOS is asked of a tokenizer without one, or
                `truncation_mode` is neither.
            PairError: an empty completion, a prompt that leaves no room under `max_length` with `keep_start`, or
                chosen equal to rejected.
        """
        if not (len(prompts) == len(chosen) == len(rejected)):
            raise InputError(
                f"PairBatch.from_text: received {len(prompts)} prompts, {len(chosen)} chosen and {len(rejected)} "
                "rejected; there must be one of each a pair."
            )
        if len(prompts) == 0:
            raise InputError("PairBatch.from_text: received no pair; at least one is needed.")
        how = Preparation(
            max_length=max_length, add_eos=add_eos, truncation_mode=check_truncation_mode(truncation_mode)
        )
        pairs = []
        for number, (prompt, *sides) in enumerate(zip(prompts, chosen, rejected, strict=True)):
            where = f"pair {number}"
            rows = tokenize_rows(tokenizer, prompt, sides, how, where=where, names=("chosen", "rejected"))
            refuse_equal(rows, where, max_length)
            pairs.append(rows)
        padded = pad_rows([make_row(*pair[side]) for side in (0, 1) for pair in pairs], tokenizer.pad_token_id or 0)
        return cls(*padded)


def find_problem(attention_mask: Tensor, completion_mask: Tensor, *, kind: str, empty: str) -> tuple[int, str] | None:
    """A row that cannot be measured, of masks `[R, L]`, and why; `empty` says what to do about an empty completion."""
    keep, marks = attention_mask.bool(), completion_mask.bool()
    starts = keep & ~torch.nn.functional.pad(keep, (1, 0))[:, :-1]
    problems = {
        f"the row has no real token (attention_mask is all 0). Remove this {kind}.": ~keep.any(1),
        "attention_mask has a hole; real tokens must be contiguous in a row.": starts.sum(1) > 1,
        "completion_mask marks padding; it may mark real tokens only.": (marks & ~keep).any(1),
        f"the completion is empty. {empty}": ~marks.any(1),
        "the completion starts at the row's first token, so nothing predicts it. Give a prompt of at least one token "
        "(a BOS token will do).": (marks & starts).any(1),
    }
    return next(((int(bad.nonzero()[0]), text) for text, bad in problems.items() if bool(bad.any())), None)


def make_row(prompt: Sequence[int], completion: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A row's ids, int64 `[T]`, and its completion's marks, bool `[T]`."""
    marks = torch.zeros(len(prompt) + len(completion), dtype=torch.bool)
    marks[len(prompt) :] = True
    return torch.tensor([*prompt, *completion], dtype=torch.int64), marks


def pad_rows(rows: Sequence[tuple[Tensor, Tensor]], pad_token_id: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, attention mask and completion mask of rows, int64 `[R, L]`, padded on the right."""
    padded = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids = [ids.long() for ids, _ in rows]
    masks = [torch.ones_like(row) for row in ids], [marks.long() for _, marks in rows]
    return padded(ids, padding_value=pad_token_id), padded(masks[0]), padded(masks[1])
