"""Responses in groups as one right-padded batch: `RowBatch`.

Letters: N rows, L tokens of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradent.errors import InputError, PairError
from gradent.pairs.batch import find_problem, make_row, pad_rows
from gradent.pairs.preparation import KEEP_START, Preparation, check_truncation_mode
from gradent.pairs.tokenize import tokenize_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RowBatch"]


@dataclass(frozen=True)
class RowBatch:
    """N responses as `[N, L]` tensors, in groups of any size: the rollouts of a prompt, a pair, or a single response.

    Left-padded tensors are accepted by the constructor too: rows are trimmed to their real tokens before anything is
    computed. Rows may be equal.

    Attributes:
        input_ids: token ids, int64 `[N, L]`.
        attention_mask: 1 on real tokens, int64 `[N, L]`.
        completion_mask: 1 on the tokens of the response, 0 on the prompt and on padding, int64 `[N, L]`.
        group: the group of each row, int64 `[N]`, in any order.

    Raises:
        InputError: the tensors do not have one shape `[N, L]`, or `group` is not `[N]`.
        PairError: a row has no completion token, a completion without any token before it, or a hole.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    group: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.input_ids.shape)
        shapes = [tuple(part.shape) for part in (self.attention_mask, self.completion_mask)]
        if len(shape) != 2 or shape[0] == 0 or shapes != [shape, shape] or tuple(self.group.shape) != shape[:1]:
            raise InputError(
                f"RowBatch: input_ids is {list(shape)}, attention_mask {list(shapes[0])}, completion_mask "
                f"{list(shapes[1])} and group {list(self.group.shape)}; accepted are [N, L] with N >= 1 for the first "
                "three and [N] for group."
            )
        empty = "It needs at least one token: remove this row."
        problem = find_problem(self.attention_mask, self.completion_mask, kind="row", empty=empty)
        if problem is not None:
            number, text = problem
            raise PairError(f"row {number} (group {int(self.group[number])}): {text}")

    def row(self, index: int) -> tuple[Tensor, Tensor]:
        """Real token ids and completion marks of one row, padding removed.

        Args:
            index: row, 0 <= index < N.

        Returns:
            `(ids, marks)`: int64 `[T]` and bool `[T]`, T the row's number of real tokens.
        """
        keep = self.attention_mask[index].bool()
        return self.input_ids[index][keep], self.completion_mask[index].bool()[keep]

    def __len__(self) -> int:
        """Number of rows, N."""
        return int(self.input_ids.shape[0])

    @classmethod
    def from_rows(cls, rows: Sequence[tuple[Tensor, Tensor]], group: Tensor) -> RowBatch:
        """A batch of rows as `row` gives them.

        Args:
            rows: `(ids, marks)` of each of N rows, as `row` returns them.
            group: the group of each row, int64 `[N]`.

        Returns:
            The right-padded `RowBatch`, on the rows' device.
        """
        return cls(*pad_rows(rows), group)

    @classmethod
    def join(cls, batches: Sequence[RowBatch], group: Tensor) -> RowBatch:
        """The rows of several batches, one after the other.

        Args:
            batches: at least one.
            group: the group of each of all their rows, int64 `[N]`.

        Returns:
            The right-padded `RowBatch` of all their rows.
        """
        return cls.from_rows([batch.row(row) for batch in batches for row in range(len(batch))], group)

    @classmethod
    def from_tokens(
        cls, groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], pad_token_id: int = 0
    ) -> RowBatch:
        """A batch from token ids.

        Args:
            groups: `(prompt_ids, [completion_ids, ...])` of each group; completions exclude the prompt.
            pad_token_id: what fills rows on the right. It never enters a result.

        Returns:
            The `RowBatch` of all completions, group after group, int64 on the CPU.

        Raises:
            InputError: no group was given, or a member is not a prompt and a sequence of completions.
            PairError: an empty prompt or completion, or a group without a completion.

        Example:
            >>> batch = RowBatch.from_tokens([([1, 2], [[3], [4, 5], [6]]), ([1], [[7]])])
            >>> batch.group.tolist()
            [0, 0, 0, 1]
        """
        if len(groups) == 0:
            raise InputError("RowBatch.from_tokens: received no group; at least one is needed.")
        rows: list[tuple[Tensor, Tensor]] = []
        numbers: list[int] = []
        for number, group in enumerate(groups):
            if len(group) != 2 or any(isinstance(ids, int) for ids in group[1]):
                raise InputError(
                    f"RowBatch.from_tokens: group {number} is not (prompt_ids, [completion_ids, ...]); a single "
                    "completion is a list of one: (prompt_ids, [completion_ids])."
                )
            prompt, completions = list(map(int, group[0])), [list(map(int, ids)) for ids in group[1]]
            if not prompt or not completions or not all(completions):
                raise PairError(f"group {number}: the prompt and every completion need at least one token.")
            rows += [make_row(prompt, completion) for completion in completions]
            numbers += [number] * len(completions)
        return cls(*pad_rows(rows, pad_token_id), torch.tensor(numbers))

    @classmethod
    def from_text(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Any],
        completions: Sequence[Sequence[Any]],
        max_length: int | None = 1024,
        *,
        add_eos: bool = False,
        truncation_mode: str = KEEP_START,
    ) -> RowBatch:
        """A batch from text, tokenized as `PairBatch.from_text` does it.

        Args:
            tokenizer: a transformers tokenizer. It needs no pad token: padding never enters a result.
            prompts: one string, or list of messages, a group.
            completions: the completions of each prompt, of the prompts' kind.
            max_length: most tokens a row may have; None for no limit.
            add_eos: append the tokenizer's EOS to string completions.
            truncation_mode: "keep_start" or "keep_end": which end of a row longer than `max_length` is kept.

        Returns:
            The `RowBatch` of all completions, group after group, int64 on the CPU.

        Raises:
            InputError: the two sequences differ in length, or are empty, EOS is asked of a tokenizer without one, or
                `truncation_mode` is neither.
            PairError: a group without a completion, an empty completion, or a prompt that leaves no room under
                `max_length` with `keep_start`.
        """
        if len(prompts) != len(completions):
            raise InputError(
                f"RowBatch.from_text: received {len(prompts)} prompts and {len(completions)} lists of completions; "
                "there must be one of each a group."
            )
        if len(prompts) == 0:
            raise InputError("RowBatch.from_text: received no group; at least one is needed.")
        how = Preparation(
            max_length=max_length, add_eos=add_eos, truncation_mode=check_truncation_mode(truncation_mode)
        )
        rows: list[tuple[Tensor, Tensor]] = []
        numbers: list[int] = []
        for number, (prompt, texts) in enumerate(zip(prompts, completions, strict=True)):
            if not texts:
                raise PairError(f"group {number}: there is no completion; a group needs one at least.")
            found = tokenize_rows(tokenizer, prompt, texts, how, where=f"group {number}")
            rows += [make_row(*row) for row in found]
            numbers += [number] * len(found)
        return cls(*pad_rows(rows, tokenizer.pad_token_id or 0), torch.tensor(numbers))
