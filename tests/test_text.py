"""What a token looks like: by tokenizers of every kind, byte by byte, and with nothing in it that acts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tokenizers
import torch
from transformers import PreTrainedTokenizerFast

from gradent.text import printable, token_texts, visible
from tests.report.token_records import HOSTILE

TEXT = "Häuser größer 屋  \n\t$x$ <b>é"


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A vocabulary as SentencePiece writes it: `▁` for a space, `<0xE5>` for a byte."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁film", "film", "é", "▁größ", "<b>"]
    model = tokenizers.models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True
    )
    core = tokenizers.Tokenizer(model)
    core.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")


def byte_level(text: str) -> PreTrainedTokenizerFast:
    """A byte-level vocabulary with the words of a text as whole tokens, and their first bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    splitter = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = [word for word, _ in splitter.pre_tokenize_str(text)]
    vocab = dict.fromkeys(["<eos>", *alphabet, *words, *(word[:2] for word in words)])
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(vocab)}, "<eos>")
    )
    core.pre_tokenizer, core.decoder = splitter, tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def test_bytes_of_a_byte_level_vocabulary(tiny_tokenizer) -> None:
    ids = tiny_tokenizer("é <")["input_ids"]
    assert token_texts(tiny_tokenizer, ids) == ["<bos>", "\\xc3", "\\xa9", " ", "<"]


def test_words_of_a_byte_level_vocabulary() -> None:
    tokenizer = byte_level(TEXT)
    ids = tokenizer(TEXT)["input_ids"]
    assert "".join(token_texts(tokenizer, ids)) == TEXT
    part = tokenizer.convert_tokens_to_ids("Ġå")  # a space and the first of the three bytes of 屋
    assert token_texts(tokenizer, [part, 0]) == [" \\xe5", "<eos>"]


def test_every_token_of_a_byte_level_vocabulary_is_what_it_decodes_to() -> None:
    tokenizer = byte_level(TEXT)
    ids = list(range(len(tokenizer)))
    for number, text in zip(ids, token_texts(tokenizer, ids), strict=True):
        decoded = tokenizer.decode([number])
        assert text == decoded or ("�" in decoded and "\\x" in text)


def test_a_vocabulary_as_sentencepiece_writes_it() -> None:
    tokenizer = sentencepiece_like()
    pieces = ["<s>", "▁film", "film", "▁", "é", "▁größ", "<0xE5>", "<0xB1>", "<0x8B>", "<0x0A>", "<0x00>", "<b>"]
    ids = tokenizer.convert_tokens_to_ids(pieces)
    assert token_texts(tokenizer, ids) == [
        "<s>", " film", "film", " ", "é", " größ", "\\xe5", "\\xb1", "\\x8b", "\n", "\x00", "<b>",
    ]  # fmt: skip


def test_tensors_processors_and_ids_beyond_the_vocabulary(tiny_tokenizer) -> None:
    ids = torch.tensor([1, 2])
    assert token_texts(SimpleNamespace(tokenizer=tiny_tokenizer), ids) == ["<bos>", "<eos>"]
    assert token_texts(tiny_tokenizer, [999]) == ["<id 999>"]
    assert token_texts(tiny_tokenizer, []) == []


def test_pieces_that_are_bytes() -> None:
    tokenizer = SimpleNamespace(added_tokens_decoder={}, convert_ids_to_tokens=lambda number: b" \xe5x")
    assert token_texts(tokenizer, [0]) == [" \\xe5x"]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_acts(text) -> None:
    for shown in (visible(text), visible(3 * text, 7), printable(text)):
        assert all(letter.isprintable() or letter in "\n\t" for letter in shown)
    assert visible(text) and visible(text).isprintable() and " " not in visible(text)
    assert printable(printable(text)) == printable(text)


def test_spaces_and_line_ends_are_seen() -> None:
    assert visible(" a\n\tb\r") == "␣a⏎⇥b␍"
    assert printable(" a\n\tb\r\x00") == " a\n\tb␍\\x00"
    assert (visible(""), visible("abcdef", 4), visible("abcd", 4)) == ("(empty)", "abc…", "abcd")
