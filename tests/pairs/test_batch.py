"""Pairs as a batch: layout, truncation, chat templates, and every way a pair can be unusable."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from gradent import PairBatch
from gradent.errors import InputError, PairError
from tests.batches import left_padded


def test_layout_of_from_tokens() -> None:
    batch = PairBatch.from_tokens([([1, 2], [3], [4, 5, 6]), ([7], [8, 9], [8])], pad_token_id=42)
    assert batch.input_ids.tolist() == [[1, 2, 3, 42, 42], [7, 8, 9, 42, 42], [1, 2, 4, 5, 6], [7, 8, 42, 42, 42]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1] * 5, [1, 1, 0, 0, 0]]
    assert batch.completion_mask.tolist() == [[0, 0, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]
    assert len(batch) == 2
    assert batch.chosen_len.tolist() == [1, 2] and batch.rejected_len.tolist() == [3, 1]


def test_select_keeps_pairs_together() -> None:
    pairs = [([1, 2], [3], [4, 5, 6]), ([7], [8, 9], [8]), ([5], [1], [2])]
    picked = PairBatch.from_tokens(pairs).select([2, 0])
    expected = PairBatch.from_tokens([pairs[2], pairs[0]])
    assert torch.equal(picked.input_ids, expected.input_ids)
    assert torch.equal(picked.completion_mask, expected.completion_mask)


def test_values_of_tokens_are_split_by_row() -> None:
    batch = left_padded(PairBatch.from_tokens([([1, 2], [3], [4, 5, 6]), ([7], [8, 9], [8])]))
    values = batch.input_ids[batch.completion_mask.bool()]
    split = [(chosen.tolist(), rejected.tolist()) for chosen, rejected in batch.split_tokens(values)]
    assert split == [([3], [4, 5, 6]), ([8, 9], [8])]
    for wrong in (values[:-1], values[None], torch.zeros(())):
        with pytest.raises(InputError, match=r"values has shape \[.*this batch of 2 pairs has 7.*accepted is \[7\]"):
            batch.split_tokens(wrong)


def test_text_is_tokenized_as_trl_does(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    batch = PairBatch.from_text(tiny_tokenizer, ["ab"], ["cd"], ["x"], add_eos=True)
    ids, marks = batch.row(0)
    assert tiny_tokenizer.convert_ids_to_tokens(ids.tolist()) == ["<bos>", "a", "b", "c", "d", "<eos>"]
    assert marks.tolist() == [False, False, False, True, True, True]
    assert tiny_tokenizer.decode(batch.row(1)[0]).endswith("x<eos>")


def test_conversations_go_through_the_chat_template(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = [{"role": "user", "content": "hi"}]
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))
    batch = PairBatch.from_text(tiny_tokenizer, [prompt], [chosen], [rejected])
    ids, marks = batch.row(0)
    assert tiny_tokenizer.decode(ids[marks]) == "yes<eos>"
    assert tiny_tokenizer.decode(ids[~marks]).endswith("assistant: ")


def test_long_completions_lose_their_end(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    batch = PairBatch.from_text(tiny_tokenizer, ["abc"], ["defgh"], ["xy"], max_length=6)
    assert tiny_tokenizer.decode(batch.row(0)[0]) == "<bos>abcde"
    assert batch.chosen_len.tolist() == [2]


def test_a_completion_that_merges_with_its_prompt_starts_where_the_two_part() -> None:
    class Merging:
        """A tokenizer of character pairs: "ab" + "c" is "ab", "c"; "abc" + "d" is "ab", "cd"."""

        eos_token = None
        pad_token_id = None

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [hash(text[i : i + 2]) % 1000 for i in range(0, len(text), 2)]}

    batch = PairBatch.from_text(Merging(), ["abc"], ["de"], ["xy"])  # type: ignore[arg-type]
    assert batch.completion_mask.tolist() == [[0, 1, 1], [0, 1, 1]]


UNUSABLE_TOKENS = {
    "empty prompt": ([], [1], [2]),
    "empty chosen": ([1], [], [2]),
    "empty rejected": ([1], [2], []),
    "chosen equals rejected": ([1], [2, 3], [2, 3]),
}


@pytest.mark.parametrize("what", UNUSABLE_TOKENS)
def test_unusable_token_pairs(what: str) -> None:
    with pytest.raises(PairError, match=f"pair 1.*{what.split()[-1]}|pair 1.*equals"):
        PairBatch.from_tokens([([1], [2], [3]), UNUSABLE_TOKENS[what]])


UNUSABLE_TEXT = {
    "empty": (("p", "", "x"), "chosen is empty"),
    "equal": (("p", "same", "same"), "equals rejected"),
    "no room": (("a prompt of many characters", "y", "z"), "leaves no room"),
    "equal once truncated": (("p", "123456789", "12345678!"), "after truncation"),
    "kinds": (("p", [{"role": "assistant", "content": "y"}], "z"), "str, list, str"),
}


@pytest.mark.parametrize("what", UNUSABLE_TEXT)
def test_unusable_text(tiny_tokenizer: PreTrainedTokenizerFast, what: str) -> None:
    texts, message = UNUSABLE_TEXT[what]
    with pytest.raises(InputError, match=f"pair 1.*{message}"):
        PairBatch.from_text(
            tiny_tokenizer, *([good, bad] for good, bad in zip("pyz", texts, strict=True)), max_length=8
        )


def test_lists_of_different_lengths(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="2 prompts, 1 chosen and 2 rejected"):
        PairBatch.from_text(tiny_tokenizer, ["a", "b"], ["c"], ["d", "e"])


def test_eos_of_a_tokenizer_without_one(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_tokenizer.eos_token = None
    with pytest.raises(InputError, match="no EOS"):
        PairBatch.from_text(tiny_tokenizer, ["a"], ["b"], ["c"], add_eos=True)


def test_a_tokenizer_without_a_pad_token_will_do(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tiny_tokenizer.pad_token = None
    assert len(PairBatch.from_text(tiny_tokenizer, ["a"], ["b"], ["cd"])) == 1


def test_no_pairs() -> None:
    with pytest.raises(InputError, match="at least one"):
        PairBatch.from_tokens([])


def tensors(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows)


UNUSABLE_TENSORS = {
    "odd rows": ([[1, 2]], [[1, 1]], [[0, 1]], InputError, r"\[2B, L\]"),
    "shapes": ([[1, 2], [1, 3]], [[1, 1]], [[0, 1], [0, 1]], InputError, "attention_mask has shape"),
    "marks padding": ([[1, 2], [1, 3]], [[1, 0], [1, 1]], [[0, 1], [0, 1]], PairError, "marks padding"),
    "empty completion": ([[1, 2], [1, 3]], [[1, 1], [1, 1]], [[0, 0], [0, 1]], PairError, "chosen.*empty"),
    "nothing before it": ([[1, 2], [1, 3]], [[1, 1], [1, 1]], [[0, 1], [1, 1]], PairError, "rejected.*first token"),
    "a hole": ([[1, 2, 4], [1, 3, 4]], [[1, 0, 1], [1, 1, 1]], [[0, 0, 1], [0, 0, 1]], PairError, "hole"),
    "no token": ([[1, 2], [1, 3]], [[0, 0], [1, 1]], [[0, 0], [0, 1]], PairError, "no real token"),
}


@pytest.mark.parametrize("what", UNUSABLE_TENSORS)
def test_unusable_tensors(what: str) -> None:
    ids, keep, marks, kind, message = UNUSABLE_TENSORS[what]
    with pytest.raises(kind, match=message):
        PairBatch(tensors(ids), tensors(keep), tensors(marks))


def test_left_padding_is_read() -> None:
    batch = PairBatch(tensors([[0, 1, 2], [1, 3, 4]]), tensors([[0, 1, 1], [1, 1, 1]]), tensors([[0, 0, 1], [0, 1, 1]]))
    assert batch.row(0)[0].tolist() == [1, 2]
