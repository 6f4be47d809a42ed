"""How a release of TRL's DPOTrainer makes tokens of a row, and what it cuts off: what differs, in one place.

| TRL | prompt and response | EOS | cut |
|---|---|---|---|
| to 0.27.1 | tokenized apart, no special tokens | on all, after a template's own too | keep_end, 512 of a prompt |
| to 0.28 | the same | on strings | the same |
| 0.29 to 1.14 | prompt, and prompt + response from its length on | on strings that lack it | keep_start |
| 1.15 and on | their common beginning, and what follows it | the same | the same |

Up to 0.28, `max_prompt_length` keeps a prompt's end and `max_completion_length` a response's start, before the cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gradent.errors import InputError, PairError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "KEEP_END", "KEEP_START", "IgnoredPairError", "Preparation", "TokenRow", "check_truncation_mode", "common_prefix",
    "read_release", "release_defaults", "token_ids",
]  # fmt: skip

KEEP_START, KEEP_END = "keep_start", "keep_end"
TokenRow = tuple[list[int], list[int]]
"""Tokens of the context, at least one, and of the response after it."""


class IgnoredPairError(PairError):
    """A pair from which a trainer learns nothing, and `cause`, which it has in common with others."""

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Rules by which a row becomes tokens; the defaults are those of the newest TRL."""

    max_length: int | None = 1024
    truncation_mode: str = KEEP_START
    max_prompt_length: int | None = None  # most tokens of a prompt, whose end is kept; TRL has it up to 0.28
    max_completion_length: int | None = None  # most tokens of a response, EOS included; TRL has it up to 0.28
    add_eos: bool = True
    seam: str = "common"  # where a response begins: "apart", "prompt" or "common", the rows of the table above
    has_chat_eos: bool = False  # whether EOS follows what the chat template made as well
    template: Mapping[str, Any] = field(default_factory=dict)  # what chat templates are given besides the messages

    @classmethod
    def of_release(cls, version: str | None, **options: Any) -> Preparation:
        """The rules of a release of TRL ("0.24.0"), None for the newest; its defaults are in `release_defaults`."""
        release = read_release(version)
        seam = "apart" if release < (0, 29) else "prompt" if release < (1, 15) else "common"
        return cls(seam=seam, has_chat_eos=release < (0, 27, 2), **options)

    def rows(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Any, completions: Sequence[Any], *, where: str,
        names: Sequence[str], **template: Any,
    ) -> tuple[list[TokenRow], int]:  # fmt: skip
        """Each response's row, cut, and how many were; `template` is what a chat template is given for this row."""
        given = {**self.template, **template}
        if self.seam == "apart":
            given.pop("tools", None)  # of a row, TRL reads them since 0.29
        tokenize = self._apart if self.seam == "apart" else self._together
        prompt_ids, responses = tokenize(tokenizer, prompt, completions, given)
        for name, ids in zip(names, responses, strict=True):
            if not ids:
                raise self._empty(where, name)
        if self.truncation_mode == KEEP_START and self.max_length is not None and len(prompt_ids) >= self.max_length:
            raise IgnoredPairError(
                f"{where}: the prompt has {len(prompt_ids)} tokens and max_length is {self.max_length}, which leaves "
                "no room for a response. Raise max_length (command line: --max-length) or shorten the prompt.",
                f"the prompt alone fills max_length {self.max_length}, and TRL learns nothing from such rows",
            )
        rows = [self._cut(prompt_ids, ids) for ids in responses]
        for name, row in zip(names, rows, strict=True):
            if not row[1]:
                raise IgnoredPairError(
                    f"{where}: nothing predicts the only token of {name}. Give a longer prompt.",
                    "a response is one token with nothing before it, and TRL counts no token that nothing predicts",
                )
        lengths = [len(prompt_ids) + len(ids) for ids in responses]
        return rows, 0 if self.max_length is None else sum(length > self.max_length for length in lengths)

    def _empty(self, where: str, name: str) -> IgnoredPairError:
        """What is wrong with a response of which no token is left."""
        if self.seam == "prompt":
            why = "no longer than the prompt, generation prompt included, at whose length TRL 0.29 to 1.14 cuts it off"
        else:
            why = "no token of it is left"
        return IgnoredPairError(
            f"{where}: {name} is empty after tokenization ({why}); it needs at least one token.",
            f"a response is empty ({why}), and TRL trains on the other one alone",
        )

    def _together(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Any, completions: Sequence[Any], given: Mapping[str, Any]
    ) -> tuple[list[int], list[list[int]]]:
        """Prompt, and prompt + response, each tokenized as one text."""
        eos = tokenizer.eos_token if self.add_eos and isinstance(prompt, str) else None
        if eos:
            completions = [text if text.endswith(eos) else text + eos for text in completions]
        prompt_ids = token_ids(tokenizer, prompt, add_generation_prompt=True, **given)
        texts = [token_ids(tokenizer, prompt + completion, **given) for completion in completions]
        start = len(prompt_ids)
        if self.seam == "common":
            start = min((common_prefix(prompt_ids, ids) for ids in texts), default=0)
        return prompt_ids[:start], [ids[start:] for ids in texts]

    def _apart(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Any, completions: Sequence[Any], given: Mapping[str, Any]
    ) -> tuple[list[int], list[list[int]]]:
        """Prompt and response as texts of their own, without special tokens."""
        is_chat = not isinstance(prompt, str)
        if is_chat:
            has_answer = prompt[-1]["role"] == "assistant"
            text = _render(
                tokenizer, prompt, add_generation_prompt=not has_answer, continue_final_message=has_answer, **given
            )
            parts = []
            for completion in completions:  # a prompt that a later one shortens leaves those before it as they are
                whole = _render(tokenizer, prompt + completion, **given)
                text = text[: common_prefix(text, whole)]
                parts.append(whole[len(text) :])
            prompt, completions = text, parts
        ids = [list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (prompt, *completions)]
        if self.add_eos and tokenizer.eos_token_id is not None and (self.has_chat_eos or not is_chat):
            ids[1:] = [[*part, tokenizer.eos_token_id] for part in ids[1:]]
        responses = [part[: self.max_completion_length] for part in ids[1:]]
        return ids[0] if self.max_prompt_length is None else ids[0][-self.max_prompt_length :], responses

    def _cut(self, prompt_ids: list[int], ids: list[int]) -> TokenRow:
        if self.max_length is not None and self.truncation_mode == KEEP_START:
            ids = ids[: max(0, self.max_length - len(prompt_ids))]
        elif self.max_length is not None:
            lost = max(0, len(prompt_ids) + len(ids) - self.max_length)
            prompt_ids, ids = prompt_ids[lost:], ids[max(0, lost - len(prompt_ids)) :]
        # Nothing predicts a row's first token, so that a trainer's loss leaves it out: it is context here.
        return (prompt_ids, ids) if prompt_ids else (ids[:1], ids[1:])


def read_release(version: str | None) -> tuple[int, ...]:
    """The numbers of a release; those of the newest for None."""
    if version is None:
        return (99,)
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def release_defaults(version: str | None) -> dict[str, Any]:
    """The defaults of a release's DPOConfig for what it cuts."""
    if read_release(version) < (0, 29):
        mode, prompt = KEEP_END, 512
    else:
        mode, prompt = KEEP_START, None
    return {"max_length": 1024, "truncation_mode": mode, "max_prompt_length": prompt, "max_completion_length": None}


def check_truncation_mode(mode: str) -> str:
    """Refuse a truncation mode that TRL does not know."""
    if mode not in (KEEP_START, KEEP_END):
        raise InputError(
            f"truncation_mode is {mode!r}; accepted: {KEEP_START!r} and {KEEP_END!r} (command line: --truncation-mode)."
        )
    return mode


def token_ids(
    tokenizer: PreTrainedTokenizerBase, text: Any, *, add_generation_prompt: bool = False, **given: Any
) -> list[int]:
    """Token ids of a string, special tokens included, or of messages under the tokenizer's chat template."""
    if isinstance(text, str):
        return list(tokenizer(text)["input_ids"])
    encoded: Any = tokenizer.apply_chat_template(
        text, tokenize=True, return_dict=True, add_generation_prompt=add_generation_prompt, **given
    )
    return list(encoded["input_ids"])


def _render(tokenizer: PreTrainedTokenizerBase, messages: Any, **given: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **given))


def common_prefix(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How many leading elements two sequences share."""
    matches = [a == b for a, b in zip(left, right, strict=False)]
    return matches.index(False) if False in matches else len(matches)
