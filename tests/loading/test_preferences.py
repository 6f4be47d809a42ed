"""Rows to token pairs: what TRL's own trainer makes of the same rows, and every row that cannot be used."""

from __future__ import annotations

import copy
from typing import Any

import datasets
import pytest
import torch
import trl
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from gradent import PairBatch
from gradent.errors import DataFileError, InputError
from gradent.loading.preference_files import Row
from gradent.loading.preferences import AuditPair, PairSet, describe_prompts, prepare_pairs
from gradent.pairs.preparation import Preparation
from tests.auditing.made import FORMATS, PAIRS, said

SETTINGS = {"report_to": "none", "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "disable_tqdm": True}


def numbered(values: list[Any]) -> list[Row]:
    return [Row(index=index, where=f"pairs.jsonl:{index + 1}", values=each) for index, each in enumerate(values)]


def installed(**options: Any) -> Preparation:
    """The rules of the TRL that is installed."""
    return Preparation.of_release(trl.__version__, **options)


def triple(pair: AuditPair) -> tuple[list[int], list[int], list[int]]:
    return pair.prompt_ids, pair.chosen_ids, pair.rejected_ids


def texts(pairs: PairSet) -> list[str]:
    return [pair.chosen_text for pair in pairs.pairs]


@pytest.fixture
def trl_batch(tmp_path, tiny_gpt2: GPT2LMHeadModel, tiny_tokenizer: PreTrainedTokenizerFast):
    """What TRL's DPOTrainer hands to the model for some rows: one batch of its own collator."""

    def build(values: list[Any], max_length: int | None) -> dict[str, torch.Tensor]:
        trainer = trl.DPOTrainer(
            tiny_gpt2,
            ref_model=copy.deepcopy(tiny_gpt2),
            args=trl.DPOConfig(str(tmp_path), max_length=max_length, **SETTINGS),
            train_dataset=datasets.Dataset.from_list(values),
            processing_class=tiny_tokenizer,
        )
        return trainer.data_collator(list(trainer.train_dataset))

    return build


def assert_same_batch(pairs: PairSet, batch: dict[str, torch.Tensor]) -> None:
    ours = PairBatch.from_tokens([triple(pair) for pair in pairs.pairs], pad_token_id=0)
    for name in ("input_ids", "attention_mask", "completion_mask"):
        assert torch.equal(getattr(ours, name), batch[name]), name


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_tokens_are_those_of_trl(name, cut, trl_batch, tiny_tokenizer) -> None:
    rows, limit = FORMATS[name], 1024
    if cut:  # a limit that leaves the shortest prompt three tokens of response
        whole = prepare_pairs(numbered(rows), tiny_tokenizer, installed()).pairs
        limit = 3 + min(len(pair.prompt_ids) for pair in whole)
    # Rows whose prompt fills the limit are left out here and dropped there.
    found = prepare_pairs(numbered(rows), tiny_tokenizer, installed(max_length=limit))
    assert bool(sum(pair.truncated for pair in found.pairs)) == cut
    assert_same_batch(found, trl_batch(rows, limit))


def test_the_comparison_with_trl_can_fail(trl_batch, tiny_tokenizer) -> None:
    batch = trl_batch(PAIRS, 1024)
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in PAIRS]
    for wrong in (
        prepare_pairs(numbered(PAIRS), tiny_tokenizer, installed(add_eos=False)),
        prepare_pairs(numbered(swapped), tiny_tokenizer, installed()),
        prepare_pairs(numbered(PAIRS[::-1]), tiny_tokenizer, installed()),
    ):
        with pytest.raises(AssertionError):
            assert_same_batch(wrong, batch)


def test_a_text_prompt_beside_whole_conversations_is_taken_from_the_conversations(tiny_tokenizer) -> None:
    implicit = FORMATS["messages, implicit prompt"][0]
    both = [
        prepare_pairs(numbered([row]), tiny_tokenizer) for row in (implicit, {"prompt": "The film was", **implicit})
    ]
    assert triple(both[0].pairs[0]) == triple(both[1].pairs[0])


def test_cut_responses_are_counted(tiny_tokenizer) -> None:
    def cut(max_length: int | None) -> int:
        pair = prepare_pairs(numbered(PAIRS[1:2]), tiny_tokenizer, Preparation(max_length=max_length)).pairs[0]
        assert max_length is None or pair.longest <= max_length
        return pair.truncated

    pair = prepare_pairs(numbered(PAIRS[1:2]), tiny_tokenizer).pairs[0]
    chosen, rejected = (len(pair.prompt_ids) + len(ids) for ids in (pair.chosen_ids, pair.rejected_ids))
    assert pair.longest == chosen > rejected
    assert [cut(limit) for limit in (None, chosen, chosen - 1, rejected, rejected - 1)] == [0, 0, 1, 1, 2]


TURN = said("q", "user")
UNUSABLE: dict[str, tuple[Any, str]] = {
    "no object": ([1, 2], "the row is a list; an object with keys is expected"),
    "no chosen": ({"prompt": "p", "rejected": "r"}, "missing 'chosen'; the row has .'prompt', 'rejected'.. Accepted"),
    "neither": ({"text": "p"}, "missing 'chosen' and 'rejected'"),
    "empty prompt": ({"prompt": [], "chosen": said("a"), "rejected": said("b")}, "prompt is empty"),
    "null": ({"prompt": "p", "chosen": None, "rejected": "r"}, "chosen is null; accepted is a string"),
    "a number": ({"prompt": "p", "chosen": 3, "rejected": "r"}, "chosen is a int; accepted"),
    "a list of text": ({"prompt": "p", "chosen": ["a"], "rejected": "b"}, "chosen is a list of str; accepted"),
    "several rejected": (
        {"prompt": "p", "chosen": "a", "rejected": ["b", "c"]},
        "rejected is a list of 2 responses; a pair has one. Make a row of each",
    ),
    "no content": (
        {"prompt": TURN, "chosen": [{"role": "assistant"}], "rejected": said("b")},
        "chosen.0. is not a mes",
    ),
    "mixed responses": ({"prompt": "p", "chosen": "a", "rejected": said("b")}, "both must be alike"),
    "mixed prompt": ({"prompt": TURN, "chosen": "a", "rejected": "b"}, "all must be alike"),
    "no common prompt": ({"chosen": "yes ", "rejected": "no"}, "no prompt to take out. Add a 'prompt'"),
    "tools": ({**FORMATS["messages"][0], "tools": "[what"}, "tools is text that is no JSON"),
    "images": ({**FORMATS["messages"][0], "images": ["a.png"]}, "carries 'images'.*Remove 'images'"),
    "half a surrogate pair": ({"prompt": "p", "chosen": "\ud83d", "rejected": "b"}, "surrogate pair.*Repair or remove"),
    "half of one, in a message": ({"prompt": TURN, "chosen": said("\ud83d"), "rejected": said("b")}, "surrogate pair"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_unusable_rows_are_named_with_their_line(what, tiny_tokenizer) -> None:
    values, message = UNUSABLE[what]
    with pytest.raises(DataFileError, match=f"^pairs.jsonl:2: .*{message}") as caught:
        prepare_pairs(numbered([PAIRS[3], values]), tiny_tokenizer, Preparation(max_length=32))
    assert "--skip-bad-rows" in str(caught.value)
    left = prepare_pairs(numbered([values, PAIRS[3]]), tiny_tokenizer, Preparation(max_length=32), skip_bad_rows=True)
    assert [pair.row for pair in left.pairs] == [1]
    assert [(bad.row, bad.where) for bad in left.skipped] == [(0, "pairs.jsonl:1")]


def test_an_unreadable_row_keeps_its_problem(tiny_tokenizer) -> None:
    rows = [Row(index=0, where="pairs.jsonl:1", problem="not valid JSON: oh"), *numbered(PAIRS)[1:]]
    with pytest.raises(DataFileError, match=r"^pairs.jsonl:1: not valid JSON: oh"):
        prepare_pairs(rows, tiny_tokenizer)


def test_further_bad_rows_are_listed_and_counted(tiny_tokenizer) -> None:
    rows = numbered([{"prompt": "p"} for _ in range(9)] + PAIRS)
    with pytest.raises(DataFileError) as caught:
        prepare_pairs(rows, tiny_tokenizer)
    assert "8 other rows cannot be used either: pairs.jsonl:2" in str(caught.value)
    assert "pairs.jsonl:6 and 3 more" in str(caught.value)


def test_nothing_usable_is_an_error_even_when_bad_rows_are_skipped(tiny_tokenizer) -> None:
    with pytest.raises(DataFileError, match=r"No usable row is left"):
        prepare_pairs(numbered([{"prompt": "p"}]), tiny_tokenizer, skip_bad_rows=True)


def test_a_draw_is_settled_by_its_seed_and_keeps_the_order_of_the_rows(tiny_tokenizer) -> None:
    def draw(seed: int, count: int | None = 3) -> list[int]:
        found = prepare_pairs(numbered(PAIRS), tiny_tokenizer, max_pairs=count, seed=seed).pairs
        return [pair.row for pair in found]

    assert draw(0) == draw(0) == sorted(draw(0))
    assert len(draw(0)) == 3
    assert len({tuple(draw(seed)) for seed in range(8)}) > 1
    assert draw(0, None) == draw(0, 99) == list(range(len(PAIRS)))


def test_a_draw_makes_up_for_bad_rows(tiny_tokenizer) -> None:
    bad = [{"prompt": "p"} for _ in range(20)]
    found = prepare_pairs(numbered(PAIRS + bad), tiny_tokenizer, max_pairs=5, skip_bad_rows=True)
    assert len(found.pairs) == 5
    assert {bad.row for bad in found.skipped} <= set(range(len(PAIRS), len(PAIRS) + 20))


def test_no_pair_at_all_is_no_draw(tiny_tokenizer) -> None:
    with pytest.raises(InputError, match=r"max_pairs is 0.*--max-pairs"):
        prepare_pairs(numbered(PAIRS), tiny_tokenizer, max_pairs=0)


def test_messages_need_a_chat_template(tiny_tokenizer) -> None:
    tiny_tokenizer.chat_template = None
    with pytest.raises(InputError, match=r"pairs.jsonl:1: .*no chat template.*plain strings"):
        prepare_pairs(numbered(FORMATS["messages"]), tiny_tokenizer, skip_bad_rows=True)


def test_a_template_that_refuses_names_the_row(tiny_tokenizer) -> None:
    tiny_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataFileError, match=r"pairs.jsonl:1: .*roles must alternate"):
        prepare_pairs(numbered(FORMATS["messages"]), tiny_tokenizer)


def test_responses_are_kept_as_text_for_tables(tiny_tokenizer) -> None:
    assert texts(prepare_pairs(numbered(PAIRS), tiny_tokenizer)) == [pair["chosen"] for pair in PAIRS]
    turns = prepare_pairs(numbered(FORMATS["messages, several turns"]), tiny_tokenizer)
    assert texts(turns) == ["so soon?\nyes\nwell"]


def ignored(values: Any, tokenizer: Any, **options: Any) -> str:
    """Why a row is left out without a word from the user, beside one that is not."""
    found = prepare_pairs(numbered([values, PAIRS[3]]), tokenizer, Preparation(**options))
    assert [pair.row for pair in found.pairs] == [1]
    (left,) = found.skipped
    assert left.where == "pairs.jsonl:1" and left.reason.startswith("pairs.jsonl:1: ")
    return str(left.cause)


IGNORED: dict[str, tuple[Any, str]] = {
    "equal": (
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        "chosen equals rejected, so that there is no pref",
    ),
    "equal once cut": (
        {"prompt": "p", "chosen": 50 * "a" + "b", "rejected": 50 * "a" + "c"},
        "chosen and rejected differ only in what max_length 32 cuts off",
    ),
    "no message": (
        {"prompt": TURN, "chosen": said("a"), "rejected": []},
        "a response has no messages, and TRL trains on the other one alone",
    ),
    "prompt too long": (
        {"prompt": 40 * "p", "chosen": "a", "rejected": "b"},
        "the prompt alone fills max_length 32, and TRL learns nothing from such rows",
    ),
}


@pytest.mark.parametrize("what", IGNORED)
def test_rows_that_teach_nothing_are_left_out(what, tiny_tokenizer) -> None:
    values, cause = IGNORED[what]
    assert ignored(values, tiny_tokenizer, max_length=32).startswith(cause)
    with pytest.raises(DataFileError, match="No usable row is left"):
        prepare_pairs(numbered([values]), tiny_tokenizer, Preparation(max_length=32))


def test_a_template_that_drops_what_differs_is_named(tiny_tokenizer) -> None:
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}{% endfor %}"
    )
    values = {"prompt": TURN, "chosen": said("<think>x</think>4"), "rejected": said("<think>y</think>4")}
    assert ignored(values, tiny_tokenizer) == "the chat template renders both alike (it drops what differs)"


def test_texts_have_neither_none_nor_lists_in_them(tiny_tokenizer) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    chosen = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "hello"}]}]
    (pair,) = prepare_pairs(numbered([{"prompt": TURN, "chosen": chosen, "rejected": parts}]), tiny_tokenizer).pairs
    assert (pair.chosen_text, pair.rejected_text) == ('f({"a": 1})', "hello")


def told(rows: list[Any], tokenizer: Any) -> list[str]:
    return describe_prompts(numbered(rows), prepare_pairs(numbered(rows), tokenizer).pairs)


def test_a_question_beside_an_implicit_prompt_is_told_of(tiny_tokenizer) -> None:
    rows = [
        {"question": "How tall?", "chosen": "The tower is 330 m tall.", "rejected": "The tower is in Lyon."},
        {"system": "Greet.", "chosen": "Sure! Here", "rejected": "Sorry, no"},
    ]
    assert told(rows, tiny_tokenizer) == [
        "2 of 2 pairs have no 'prompt': as in TRL it is what chosen and rejected begin with alike. question, system "
        "are not read. Prompts of fewer than 4 tokens: 1; that end inside a word: 1. If the run was given a question, "
        "put it into 'prompt'."
    ]
    assert told(FORMATS["messages, implicit prompt"], tiny_tokenizer) == []
    assert told(PAIRS, tiny_tokenizer) == []


def test_a_prompt_that_is_there_twice_is_counted(tiny_tokenizer) -> None:
    for name in ("strings", "messages"):
        rows = [
            {**row, **{side: row["prompt"] + row[side] for side in ("chosen", "rejected")}} for row in FORMATS[name][:5]
        ]
        (note,) = told([*rows, FORMATS[name][5]], tiny_tokenizer)
        count = 4 if name == "strings" else 5  # "So" is too short to tell
        assert note.startswith(f"In {count} of 6 pairs chosen begins with the prompt, so that the model sees it twice")


def test_rows_that_say_from_and_value_are_the_same_rows(tiny_tokenizer) -> None:
    row = FORMATS["messages"][0]
    names = {"user": "human", "assistant": "gpt"}
    other = {
        key: [{"from": names[message["role"]], "value": message["content"]} for message in part]
        for key, part in row.items()
    }
    both = [prepare_pairs(numbered([each]), tiny_tokenizer).pairs for each in (row, other)]
    assert both[0] == both[1]
    single = {**other, "chosen": other["chosen"][0], "rejected": other["rejected"][0]}  # as ShareGPT's pairs have it
    assert prepare_pairs(numbered([single]), tiny_tokenizer).pairs == both[0]


def test_a_header_that_all_responses_begin_with_is_told_of(tiny_tokenizer) -> None:
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    rows = [{**row, **{side: header + row[side] for side in ("chosen", "rejected")}} for row in PAIRS]
    (note,) = told(rows, tiny_tokenizer)
    assert note.startswith(
        "All 14 responses begin with the same 47 characters, '<|start_header_id|>assistant<|end_header"
    )
    assert told(rows[:3], tiny_tokenizer) == told(PAIRS, tiny_tokenizer) == []


def test_texts_that_do_not_begin_alike_have_an_empty_prompt_and_are_told_of(tiny_tokenizer) -> None:
    rows = [{"chosen": "Yes", "rejected": "No"}, {"chosen": "Up", "rejected": "Down"}]
    found = prepare_pairs(numbered(rows), tiny_tokenizer).pairs
    assert [pair.prompt_ids for pair in found] == [[tiny_tokenizer.bos_token_id]] * 2
    (note,) = told(rows, tiny_tokenizer)
    assert "Prompts of fewer than 4 tokens: 2" in note
