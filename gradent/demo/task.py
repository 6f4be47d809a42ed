"""The sentiment task: statements, four styles of response, and the answers that SFT teaches.

The data of the paper's Section 4.3 in miniature. A statement is positive or negative; the chosen response names its
sentiment, the rejected one names the other. Both are the same but for that one word, and the four styles put different
amounts of identical text around it.

SFT sets the scene that Section 4.2 assumes. Most of its answers name the right sentiment, and say it in the words that
the styles use; an answer with the wrong label mostly says it in others (`_OTHER_WORDS`). So the policy is surer of a
suffix after the chosen label than after the rejected one, `s_w >= s_l` in Theorem 3, and sure of no token altogether:
a token of log-prob 0 would have no gradient.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradent.demo.statements import Statement, divide_statements, draw_statements, read_statements, statement_words
from gradent.errors import InputError
from gradent.pairs.tokenize import tokenize_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "LABEL_WORDS", "STYLES", "USUAL_IF_RIGHT", "USUAL_IF_WRONG", "Statement", "Task", "TokenPair", "draw_answers",
    "find_label_words", "make_task", "prompt_of", "read_statements", "responses_of", "text_rows", "tokenize_style",
    "word_list",
]  # fmt: skip

TokenPair = tuple[list[int], list[int], list[int]]
"""`(prompt_ids, chosen_ids, rejected_ids)`."""

STYLES: dict[str, str] = {
    "single token": "{label}",
    "short suffix": "{label} sentiment.",
    "long suffix": "{label} sentiment based on my judgement.",
    "prefix+suffix": "it has a {label} sentiment based on my judgement.",
}
"""Style to response, the paper's four; `{label}` is where chosen and rejected differ."""

LABEL_WORDS: tuple[tuple[str, str], ...] = (("positive", "negative"), ("happy", "sad"), ("good", "bad"), ("yes", "no"))
"""Words for (positive, negative), tried in this order: a tokenizer must have both as single tokens."""

_CUES = {
    "single token": "one word", "short suffix": "two words", "long suffix": "many words", "prefix+suffix": "a sentence",
}  # fmt: skip
_PROMPT = "{statement}\nAnswer with {cue}:"

_OTHER_WORDS = {
    "sentiment": "mood", "based": "going", "on": "by", "my": "the", "judgement": "hunch", ".": "!", "it": "this",
    "has": "shows", "a": "some",
}  # fmt: skip
_WRONG = 0.3
"""Share of SFT's answers that name the wrong sentiment."""
USUAL_IF_RIGHT = 0.7
USUAL_IF_WRONG = 0.15
"""Chance that a word of an answer is the style's own and not its counterpart in `_OTHER_WORDS`."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that is drawn before a model is involved."""

    train: tuple[Statement, ...]  # statements that SFT and DPO train on
    probe: tuple[Statement, ...]  # held-out statements, half of each sentiment; their pairs are measured
    sft: tuple[tuple[str, str], ...]  # `(prompt, answer)` texts, each answer with a space in front
    label_words: tuple[str, str]  # the words for (positive, negative)


def make_task(
    *, seed: int, train: int, probe: int, answers: int, label_words: tuple[str, str] = LABEL_WORDS[0],
    usual_if_wrong: float = USUAL_IF_WRONG, statements: Sequence[Statement] | None = None,
) -> Task:  # fmt: skip
    """Draw a task."""
    rng = random.Random(seed)
    if statements is None:
        drawn = draw_statements(rng, probe + train)
    else:
        if len({statement.text for statement in statements}) < len(statements):
            raise InputError("statements: a text occurs twice, and might be held out and trained on. Remove one.")
        drawn = divide_statements(rng, statements, probe + train)
    training = drawn[probe:]
    sft = []
    for number in range(answers):
        is_wrong = rng.random() < _WRONG
        usual = usual_if_wrong if is_wrong else USUAL_IF_RIGHT
        sft.append(_word_answer(rng, training[number % train], label_words, is_wrong, usual))
    return Task(train=tuple(training), probe=tuple(drawn[:probe]), sft=tuple(sft), label_words=label_words)


def draw_answers(
    seed: int, statements: Sequence[Statement], label_words: tuple[str, str]
) -> tuple[tuple[str, str], ...]:
    """Answers with the right label, worded as SFT's are: held-out ones, where the statements are."""
    rng = random.Random(seed)
    return tuple(_word_answer(rng, statement, label_words, False, USUAL_IF_RIGHT) for statement in statements)


def prompt_of(statement: Statement, style: str) -> str:
    """The prompt that asks for a statement's sentiment in one of the styles."""
    return _PROMPT.format(statement=statement.text, cue=_CUES[style])


def responses_of(statement: Statement, style: str, label_words: tuple[str, str]) -> tuple[str, str]:
    """The pair of a statement in one of the styles."""
    right, wrong = label_words if statement.positive else label_words[::-1]
    return " " + STYLES[style].format(label=right), " " + STYLES[style].format(label=wrong)


def text_rows(statements: Sequence[Statement], style: str, label_words: tuple[str, str]) -> list[dict[str, str]]:
    """The texts of the pairs of some statements in one style, by prompt, chosen and rejected."""
    pairs = [(prompt_of(statement, style), *responses_of(statement, style, label_words)) for statement in statements]
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs]


def tokenize_style(
    tokenizer: PreTrainedTokenizerBase, statements: Sequence[Statement], style: str, label_words: tuple[str, str]
) -> list[TokenPair]:
    """Token ids of the pairs of some statements in one style; no EOS, which would be one more shared token."""
    return [
        tokenize_pair(tokenizer, *texts.values(), max_length=None, where=f"{style}, statement {number}")
        for number, texts in enumerate(text_rows(statements, style, label_words))
    ]


def find_label_words(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The first of `LABEL_WORDS` that a tokenizer has as single tokens."""
    probe = [Statement("the concert", True)]
    for words in LABEL_WORDS:
        if all(_differ_in_one_token(tokenize_style(tokenizer, probe, style, words)[0]) for style in STYLES):
            return words
    tried = ", ".join("/".join(words) for words in LABEL_WORDS)
    raise InputError(
        f"The demo compares responses that differ in one token, and this model's tokenizer splits a word of each pair "
        f"that it knows ({tried}). Give a model with a larger vocabulary, or none to use the demo's own."
    )


def word_list() -> list[str]:
    """Every word and mark of the statements, prompts and answers: the embedded tokenizer's vocabulary."""
    texts = [_PROMPT.format(statement="", cue=cue).replace(":", " :") for cue in _CUES.values()]
    texts += [response.format(label="").replace(".", " .") for response in STYLES.values()]
    words = {word for text in texts for word in text.split()}
    return sorted(words | statement_words() | set(LABEL_WORDS[0]) | set(_OTHER_WORDS.values()))


def _word_answer(
    rng: random.Random, statement: Statement, label_words: tuple[str, str], wrong: bool, usual: float
) -> tuple[str, str]:
    label = label_words[0] if statement.positive != wrong else label_words[1]
    style = rng.choice(list(STYLES))
    words = [
        word if word not in _OTHER_WORDS or rng.random() < usual else _OTHER_WORDS[word]
        for word in STYLES[style].replace(".", " .").split()
    ]
    answer = " ".join(words).replace(" .", ".").replace(" !", "!").format(label=label)
    return prompt_of(statement, style), " " + answer


def _differ_in_one_token(pair: TokenPair) -> bool:
    _, chosen, rejected = pair
    return len(chosen) == len(rejected) and sum(a != b for a, b in zip(chosen, rejected, strict=True)) == 1
