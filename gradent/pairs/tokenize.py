"""A preference pair from text to token ids, the way TRL's DPOTrainer does it.

Prompt and prompt + completion are tokenized separately, and the completion starts where the two differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradent.errors import InputError, PairError
from gradent.pairs.preparation import common_prefix, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["tokenize_completions", "tokenize_pair"]


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
    names = ("chosen", "rejected")
    prompt_ids, (chosen_ids, rejected_ids) = tokenize_completions(
        tokenizer, prompt, (chosen, rejected), max_length=max_length, add_eos=add_eos, where=where, names=names
    )
    if chosen_ids == rejected_ids:
        raise PairError(
            f"{where}: chosen equals rejected, token for token (after truncation to max_length={max_length}). Such a "
            "pair has no preference to learn: remove it, or raise max_length if truncation made the two equal."
        )
    return prompt_ids, chosen_ids, rejected_ids


def tokenize_completions(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Any,
    completions: Sequence[Any],
    *,
    max_length: int | None,
    add_eos: bool,
    where: str,
    names: Sequence[str] | None = None,
    **template: Any,
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt and its completions, truncated; `names` are for errors, `template` for a chat template."""
    names = names or [f"completion {number}" for number in range(len(completions))]
    parts = (prompt, *completions)
    if len({isinstance(part, str) for part in parts}) != 1:
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise InputError(
            f"{where}: prompt, {' and '.join(names)} are {kinds}; they must be all strings or all lists of messages."
        )
    for name, completion in zip(names, completions, strict=True):
        if not completion:
            raise PairError(f"{where}: {name} is empty; a completion needs at least one token. Remove this pair.")
    if isinstance(prompt, str) and add_eos:
        eos = tokenizer.eos_token
        if eos is None:
            raise InputError(
                f"{where}: add_eos=True, but the tokenizer has no EOS token. Set tokenizer.eos_token, or pass "
                "add_eos=False (command line: --no-add-eos)."
            )
        completions = [text if text.endswith(eos) else text + eos for text in completions]
    prompt_ids = token_ids(tokenizer, prompt, add_generation_prompt=True, **template)
    texts = [token_ids(tokenizer, prompt + completion, **template) for completion in completions]
    start = min((common_prefix(prompt_ids, ids) for ids in texts), default=0)
    if start == 0:
        raise PairError(
            f"{where}: the tokenized prompt is empty (or shares no token with prompt + completion), so nothing "
            "predicts the completion's first token. Give a longer prompt, or a tokenizer that adds a BOS token."
        )
    if max_length is not None and start >= max_length:
        raise PairError(
            f"{where}: the prompt has {start} tokens and max_length is {max_length}, which leaves no room for a "
            "completion. Raise max_length (command line: --max-length) or shorten the prompt."
        )
    shortened = [ids[start:max_length] for ids in texts]
    for name, ids in zip(names, shortened, strict=True):
        if not ids:
            raise PairError(f"{where}: {name} is empty after tokenization; it needs at least one token.")
    return prompt_ids[:start], shortened
