"""Text as it is shown: tokens by their own text, and any text with nothing in it that acts, hides or misleads."""

from __future__ import annotations

import difflib
import re
from collections.abc import Container, Iterable
from typing import Any, SupportsInt

__all__ = ["printable", "quoted", "suggest", "token_texts", "visible"]

_MARKS = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}
_PIECE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's name for a byte


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level BPE writes for bytes: printable ones for themselves, others shifted past 255."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(plain))
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


_LETTERS = _byte_letters()


def token_texts(tokenizer: Any, ids: Iterable[SupportsInt]) -> list[str]:
    r"""The text of every token by itself.

    Spaces that belong to a token are in its text, whether the vocabulary writes them `Ġ` (byte-level BPE) or `▁`
    (SentencePiece); bytes that are no whole character are written `\xe2`. The texts one after the other are the text
    of all, but for such bytes and for marks that a vocabulary has of its own (`##` of WordPiece).

    Args:
        tokenizer: a transformers tokenizer, or a processor that holds one.
        ids: token ids, `[T]`; a tensor will do.

    Returns:
        One text an id; `<id 7>` for an id that the tokenizer does not have.
    """
    inner = getattr(tokenizer, "tokenizer", tokenizer)
    added = inner.added_tokens_decoder
    numbers = [int(number) for number in ids]
    texts = {number: _text_of(inner, number, added) for number in set(numbers)}
    return [texts[number] for number in numbers]


def _text_of(tokenizer: Any, number: int, added: Container[int]) -> str:
    piece = tokenizer.convert_ids_to_tokens(number)
    if piece is None:
        return f"<id {number}>"
    if isinstance(piece, bytes):  # vocabularies of tiktoken
        return piece.decode("utf-8", "backslashreplace")
    if number in added:
        return str(piece)
    decoded = tokenizer.decode([number], clean_up_tokenization_spaces=False)
    raw = bytes(_LETTERS[letter] for letter in piece) if all(letter in _LETTERS for letter in piece) else None
    # Both kinds of vocabulary hold "é", as itself or for the byte 0xE9: what the tokenizer makes of it tells.
    if raw is not None and raw.decode("utf-8", "replace").strip() == decoded.strip():
        return raw.decode("utf-8", "backslashreplace")
    byte = _PIECE_BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]).decode("utf-8", "backslashreplace") if byte else str(piece).replace("▁", " ")


def visible(text: str, width: int | None = None, *, space: str = "␣") -> str:
    r"""A text on one line of at most `width` characters: `␣` for a space, `⏎` for a line end, `\x00` for NUL."""
    marks = {**_MARKS, " ": space}
    line = "".join(marks.get(letter) or _escape(letter) for letter in text) or "(empty)"
    return line if width is None or len(line) <= width else line[: width - 1] + "…"


def printable(text: str) -> str:
    r"""A text of several lines for a terminal, a page or a file: other control characters are written as `\x1b`."""
    return "".join(letter if letter in " \n\t" else _MARKS.get(letter) or _escape(letter) for letter in text)


def quoted(text: str, width: int = 100) -> str:
    """A name from an untrusted file as a message has it: in quotes, escaped, and cut behind `width` characters."""
    return repr(text if len(text) <= width else text[:width] + "...")


def _escape(letter: str) -> str:
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")


def suggest(received: object, accepted: Iterable[str]) -> str:
    """The end of a message on an unknown name: the one that is likely meant, or a full stop."""
    names = list(accepted)
    close = difflib.get_close_matches(str(received).lower(), names, n=max(1, len(names)), cutoff=0.66)
    # Of several that are close the first in the table: "dop" is dpo, not dpop.
    return f"; did you mean {min(close, key=names.index)!r}?" if close else "."
