"""The journal of an audit: what was appended is there after a crash at any byte, and damage is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gradent.auditing.state.journal import Journal
from gradent.errors import DataFileError, InputError
from gradent.record.json_lines import digest

ENTRIES = [
    ("batch", "a", 0, {"inner": [0.1, -1e-300, 1 / 3]}),
    ("batch", "a", 1, {"text": "ä\n\ud83d"}),
    ("note", "b", 0, {}),
]


def fill(folder: Path) -> Path:
    journal = Journal(folder, "key")
    for entry in ENTRIES:
        journal.append(*entry)
    journal.close()
    return journal.path


def found(folder: Path, rank: int = 0) -> list[tuple[str, str, int, dict[str, object]]]:
    journal = Journal(folder, "key", rank)
    try:
        return [
            (kind, of, number, content)
            for kind, of, number, _ in ENTRIES
            if (content := journal.find(kind, of, number)) is not None
        ]
    finally:
        journal.close()


def test_what_was_appended_is_there_to_the_last_bit(tmp_path) -> None:
    fill(tmp_path)
    assert found(tmp_path) == ENTRIES
    journal = Journal(tmp_path, "key")
    assert journal.all("batch") == [content for kind, _, _, content in ENTRIES if kind == "batch"]
    assert journal.find("batch", "a", 2) is journal.find("batch", "b", 0) is None


def test_a_crash_at_any_byte_loses_the_line_in_the_making_alone(tmp_path) -> None:
    whole = fill(tmp_path / "whole").read_bytes()
    ends = [at for at in range(1, len(whole) + 1) if whole[at - 1 : at] == b"\n"]
    for size in range(len(whole) + 1):
        path = fill(tmp_path / "cut")
        os.truncate(path, size)
        kept = max(0, sum(end - 1 <= size for end in ends) - 1)  # a line is whole without its end
        assert found(tmp_path / "cut") == ENTRIES[:kept], size
        journal = Journal(tmp_path / "cut", "key")  # and it is written on behind what is left
        for entry in ENTRIES[kept:]:
            journal.append(*entry)
        journal.close()
        assert path.read_bytes() == whole, size
        path.unlink()


def test_ranks_read_each_other(tmp_path) -> None:
    first, second = Journal(tmp_path, "key", 0), Journal(tmp_path, "key", 1)
    first.append(*ENTRIES[0])
    second.append(*ENTRIES[1])
    assert second.find("batch", "a", 0) is None
    second.refresh()
    first.refresh()
    assert first.find("batch", "a", 1) == second.find("batch", "a", 1) == ENTRIES[1][3]
    assert second.find("batch", "a", 0) == ENTRIES[0][3]


def test_a_line_that_another_rank_is_writing_waits(tmp_path) -> None:
    path = fill(tmp_path)
    with open(path, "ab") as file:
        file.write(b'{"kind": "batch", "of"')
    assert found(tmp_path, rank=1) == ENTRIES


def test_another_key_is_another_journal(tmp_path) -> None:
    fill(tmp_path)
    assert Journal(tmp_path, "other").find(*ENTRIES[0][:3]) is None
    assert found(tmp_path) == ENTRIES


DAMAGE = {
    "a line": (1, b'{"kind": "batc\xff', "journal/key-0.jsonl:2: .*is damaged.*Remove the file"),
    "an entry": (1, b'{"kind": "batch"}', "journal/key-0.jsonl:2: not an entry.*Remove the file"),
    "a list": (1, b"[]", "journal/key-0.jsonl:2: not an entry"),
    "the head": (0, b'{"schema": "else"}', "key-0.jsonl: not a journal of an audit.*Remove the file"),
    "a newer head": (0, b'{"schema": "gradent.audit_journal", "schema_version": 99}', "schema version 99"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(what, tmp_path) -> None:
    number, line, message = DAMAGE[what]
    path = fill(tmp_path)
    lines = path.read_bytes().split(b"\n")
    lines[number] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataFileError, match=message):
        Journal(tmp_path, "key")


def test_a_place_that_cannot_be_written_to(tmp_path) -> None:
    (tmp_path / "journal").touch()
    with pytest.raises(InputError, match=r"cannot be written .*Choose another --out"):
        Journal(tmp_path, "key")


def test_a_full_disk_says_that_nothing_is_lost(tmp_path, monkeypatch) -> None:
    journal = Journal(tmp_path, "key")
    journal.append(*ENTRIES[0])

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(InputError, match=r"No space left.*run the same command again"):
            journal.append(*ENTRIES[1])
    assert journal.find(*ENTRIES[1][:3]) is None
    assert found(tmp_path) == ENTRIES[:1]


def test_a_digest_is_of_the_value() -> None:
    assert digest({"a": 1, "b": [2.5]}) == digest({"b": [2.5], "a": 1}) != digest({"a": 1, "b": [2.500001]})
    assert len(digest(None)) == 16
