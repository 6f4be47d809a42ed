"""A preference pair from text to token ids, the way TRL's DPOTrainer does it.

Prompt and prompt + completion are tokenized separately, and the completion starts where the two differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradent.errors import InputError, PairError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["tokenize_pair"]


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
    """`(prompt_ids, chosen_ids, rejected_ids)`, truncated, of strings or message lists; `where` is for errors."""
    if len({isinstance(part, str) for part in (prompt, chosen, rejected)}) != 1:
        kinds = ", ".join(type(part).__name__ for part in (prompt, chosen, rejected))
        raise InputError(
            f"{where}: prompt, chosen and rejected are {kinds}; they must be all strings or all lists of messages."
        )
    for side, completion in (("chosen", chosen), ("rejected", rejected)):
        if not completion:
            raise PairError(f"{where}: {side} is empty; a completion needs at least one token. Remove this pair.")
    if isinstance(prompt, str) and add_eos:
        eos = tokenizer.eos_token
        if eos is None:
            raise InputError(
                f"{where}: add_eos=True, but the tokenizer has no EOS token. Set tokenizer.eos_token, or pass "
                "add_eos=False (command line: --no-add-eos)."
            )
        chosen, rejected = (text if text.endswith(eos) else text + eos for text in (chosen, rejected))
    prompt_ids = _token_ids(tokenizer, prompt, add_generation_prompt=True)
    chosen_ids = _token_ids(tokenizer, prompt + chosen)
    rejected_ids = _token_ids(tokenizer, prompt + rejected)
    start = min(_common_prefix(prompt_ids, chosen_ids), _common_prefix(prompt_ids, rejected_ids))
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
    result = prompt_ids[:start], chosen_ids[start:max_length], rejected_ids[start:max_length]
    for side, ids in (("chosen", result[1]), ("rejected", result[2])):
        if not ids:
            raise PairError(f"{where}: {side} is empty after tokenization; it needs at least one token.")
    if result[1] == result[2]:
        raise PairError(
            f"{where}: chosen equals rejected, token for token (after truncation to max_length={max_length}). Such a "
            "pair has no preference to learn: remove it, or raise max_length if truncation made the two equal."
        )
    return result


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: Any, *, add_generation_prompt: bool = False) -> list[int]:
    if isinstance(text, str):
        return list(tokenizer(text)["input_ids"])
    encoded: Any = tokenizer.apply_chat_template(
        text, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt
    )
    return list(encoded["input_ids"])


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    matches = [a == b for a, b in zip(left, right, strict=False)]
    return matches.index(False) if False in matches else len(matches)
