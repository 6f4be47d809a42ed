"""A prompt and its responses as token ids, as TRL's DPOTrainer makes them (`gradent.pairs.preparation`), checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradent.errors import InputError, PairError
from gradent.pairs.preparation import Preparation, TokenRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["refuse_equal", "tokenize_pair", "tokenize_rows"]

_SIDES = ("chosen", "rejected")


def tokenize_pair(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Any,
    chosen: Any,
    rejected: Any,
    *,
    max_length: int | None = 1024,
    add_eos: bool = False,
    where: str = "pair",
) -> tuple[list[int], list[int], list[int]]:
    """`(prompt_ids, chosen_ids, rejected_ids)`, the end cut, of strings or message lists; `where` is for errors."""
    how = Preparation(max_length=max_length, add_eos=add_eos)
    rows = tokenize_rows(tokenizer, prompt, (chosen, rejected), how, where=where, names=_SIDES)
    (prompt_ids, chosen_ids), (other, rejected_ids) = rows
    if prompt_ids != other:
        raise PairError(
            f"{where}: the tokenized prompt is empty (or shares no token with prompt + completion), so nothing "
            "predicts the completion's first token. Give a longer prompt, or a tokenizer that adds a BOS token."
        )
    refuse_equal(rows, where, max_length)
    return prompt_ids, chosen_ids, rejected_ids


def refuse_equal(rows: Sequence[TokenRow], where: str, max_length: int | None) -> None:
    """Refuse a pair whose two rows are one."""
    if rows[0] == rows[1]:
        raise PairError(
            f"{where}: chosen equals rejected, token for token (after truncation to max_length={max_length}). Such a "
            "pair has no preference to learn: remove it, or raise max_length if truncation made the two equal."
        )


def tokenize_rows(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Any,
    completions: Sequence[Any],
    how: Preparation,
    *,
    where: str,
    names: Sequence[str] | None = None,
) -> list[TokenRow]:
    """Context and completion of each of a prompt's completions, cut; `names` are for errors."""
    names = names or [f"completion {number}" for number in range(len(completions))]
    parts = (prompt, *completions)
    if len({isinstance(part, str) for part in parts}) != 1:
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise InputError(
            f"{where}: prompt, {' and '.join(names)} are {kinds}; they must be all strings or all lists of messages."
        )
    for name, completion in zip(names, completions, strict=True):
        if not completion and not (isinstance(completion, str) and how.add_eos):
            raise PairError(f"{where}: {name} is empty; a completion needs at least one token. Remove this pair.")
    if isinstance(prompt, str) and how.add_eos and tokenizer.eos_token is None:
        raise InputError(
            f"{where}: add_eos=True, but the tokenizer has no EOS token. Set tokenizer.eos_token, or pass "
            "add_eos=False (command line: --no-add-eos)."
        )
    return how.rows(tokenizer, prompt, completions, where=where, names=names)[0]
