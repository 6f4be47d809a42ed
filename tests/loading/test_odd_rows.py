"""Odd data sets: what the installed TRL trains on is read alike, what it refuses is refused, in words.

`make test-release` runs this file with another release.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from gradent.errors import DataFileError
from gradent.loading.preference_files import Row
from gradent.loading.preferences import prepare_pairs
from tests.auditing.made import PAIRS, said
from tests.loading.test_trainer_tokens import (
    CALL,
    OLD,
    RELEASE,
    TOKENIZERS,
    TOOL,
    TURN,
    make_trainer,
    model,
    ours,
    prepared,
)

__all__ = ["model"]  # a fixture

ANSWERS = {"chosen": said("4"), "rejected": said("5")}

ALIKE: dict[str, dict[str, Any]] = {
    "roles of other data sets": {
        "prompt": [*said("be", "developer"), *said("q?", "user")], "chosen": said("a", "model"),
        "rejected": said("b", "model"),
    },
    "nothing in prompt and chosen": {"prompt": "", "chosen": "", "rejected": "no"},
    "white space": {"prompt": "   ", "chosen": " ", "rejected": "\n"},
    "several parts": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": part} for part in ("two?", " three?")]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": part} for part in "45"]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "5"}]}],
    },
    "letters of all kinds": {
        "prompt": "e\u0301 \u200d\U0001f469\u200d\U0001f467 \ufeff", "chosen": " 日本\u2028語", "rejected": " \x00\x07",
    },
    "a system message alone": {"prompt": said("Be brief.", "system"), **ANSWERS},
    "a prompt that ends in an answer": {"prompt": [*TURN, *said("I think")], **ANSWERS},
    "turns of a user in chosen": {
        "prompt": TURN, "chosen": [*said("4"), *said("why?", "user"), *said("so")], "rejected": said("5"),
    },
    "an answer without words": {"prompt": TURN, "chosen": said(""), "rejected": said("5")},
    "an answer of None": {
        "prompt": TURN, "chosen": [{"role": "assistant", "content": None}], "rejected": said("5"),
    },
    "columns of other tasks": {"prompt": "p", "chosen": "a", "rejected": "b", "label": True},
    "keys of other trainers": {
        "prompt": [{"role": "user", "content": "q", "name": "bob", "weight": None}],
        "chosen": [{"role": "assistant", "content": "a", "thinking": "t"}], "rejected": said("b"),
    },
    "EOS in the middle": {"prompt": "p<eos>", "chosen": "a<eos>b", "rejected": "b<eos><eos>"},
    "no tools": {"prompt": TURN, **ANSWERS, "tools": None},
    "an answer of a tool": {
        "prompt": [*TURN, {**CALL, "content": ""}, {"role": "tool", "name": "f", "content": "{}"}], **ANSWERS,
    },
    "no prompt, no common beginning": {"chosen": "yes", "rejected": "no"},
    "no prompt, one word in common": {"chosen": "The tower is big", "rejected": "The tower is bad"},
}  # fmt: skip
if not OLD:
    ALIKE["tools as text"] = {"prompt": TURN, **ANSWERS, "tools": json.dumps([TOOL])}


@pytest.mark.parametrize("name", ALIKE)
@pytest.mark.parametrize("kind", ["BOS", "no special tokens"])
def test_what_is_trained_on_is_measured_alike(kind, name, tmp_path, model) -> None:
    tokenizer, row = TOKENIZERS[kind](), ALIKE[name]
    if kind != "BOS" and (0, 29) <= RELEASE < (1,) and name.startswith(("nothing", "no prompt, no")):
        pytest.skip("TRL 0.29 fails at a prompt without tokens")
    if OLD and name in {"a system message alone", "an answer of a tool"}:  # a prompt must end in a user's words there
        with pytest.raises(ValueError, match="Invalid role in the last message"):
            make_trainer(tmp_path, model, [row], tokenizer)
        return
    (trained,) = prepared(make_trainer(tmp_path, model, [row], tokenizer))
    prompt, chosen, rejected = trained
    if not prompt and len(chosen) == 1:  # EOS alone, which nothing predicts
        with pytest.raises(DataFileError, match="nothing predicts the only token of chosen"):
            ours([row], tokenizer)
        return
    (pair,) = ours([row], tokenizer)
    if not prompt:  # nothing predicts a first token
        assert pair.rows == ((chosen[:1], chosen[1:]), (rejected[:1], rejected[1:]))
    else:
        assert (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) == trained


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a prompt of None": ({"prompt": None, "chosen": "Q a", "rejected": "Q b"}, "prompt is null; accepted is a string"),
    "chosen of None": ({"prompt": "p", "chosen": None, "rejected": "b"}, "chosen is null; accepted is a string"),
    "messages, then text": ({"prompt": TURN, "chosen": "4", "rejected": "5"}, "prompt is messages but chosen and"),
    "text, then messages": ({"prompt": "2+2?", **ANSWERS}, "no 'prompt', and chosen and rejected do not begin alike"),
    "messages without a list": (
        {"prompt": TURN[0], "chosen": said("4")[0], "rejected": said("5")[0]}, "chosen is a dict; accepted",
    ),
    "a prompt without messages": ({"prompt": [], **ANSWERS}, "prompt is empty; it needs at least one message"),
    "messages that share nothing": (ANSWERS, "so there is no prompt to take out. Add a 'prompt'"),
    "texts with their scores": (
        {"prompt": "p", "chosen": {"text": "a", "score": 1}, "rejected": {"text": "b", "score": 0}}, "chosen is a dict",
    ),
    "numbers": ({"prompt": "p", "chosen": 1, "rejected": 2}, "chosen is a int; accepted is a string"),
    "no JSON in tools": ({"prompt": TURN, **ANSWERS, "tools": "f()"}, "tools is text that is no JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_in_words(name, tmp_path, model) -> None:
    row, words = REFUSED[name]
    with pytest.raises(DataFileError, match=f"pairs.jsonl:1: .*{words}"):
        ours([row], TOKENIZERS["BOS"]())
    if not OLD:  # TRL up to 0.28 renders what it can
        with pytest.raises((TypeError, ValueError, AttributeError, IndexError)):
            make_trainer(tmp_path, model, [row], TOKENIZERS["BOS"]())


LEFT_OUT: dict[str, tuple[dict[str, Any], str]] = {
    "one text": ({"prompt": "p", "chosen": "same", "rejected": "same"}, "chosen equals rejected, so that there is no"),
    "one text, but for EOS": ({"prompt": "p", "chosen": "a<eos>", "rejected": "a"}, "makes the same tokens of both"),
}


@pytest.mark.skipif(OLD, reason="TRL up to 0.28 appends EOS to each of them")
@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_teaches_no_preference_is_left_out_and_the_audit_goes_on(name, tmp_path, model) -> None:
    row, cause = LEFT_OUT[name]
    tokenizer = TOKENIZERS["BOS"]()
    (trained,) = prepared(make_trainer(tmp_path, model, [row], tokenizer))
    assert trained[1] == trained[2] or not trained[2]  # TRL trains on it all the same
    rows = [
        Row(index=number, where=f"pairs.jsonl:{number + 1}", values=each) for number, each in enumerate([row, *PAIRS])
    ]
    found = prepare_pairs(rows, tokenizer)
    (left,) = found.skipped
    assert (left.where, len(found.pairs)) == ("pairs.jsonl:1", len(PAIRS)) and cause in str(left.cause)
