"""Records: what is written comes back, appears in one piece or not at all, and what is not a record is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradent.errors import DataFileError, InputError
from gradent.record import (
    PAIR_COLUMNS,
    SCHEMA_VERSION,
    TOKEN_COLUMNS,
    Summary,
    documents,
    pair_schema,
    read_pairs,
    read_summary,
    read_tokens,
    token_schema,
    write_pairs,
    write_summary,
    write_tokens,
)
from gradent.version import __version__

SAMPLES = {"string": ["my-model", "ü"], "int64": [0, 2**62], "float64": [0.1, -1e300], "bool_": [True, False]}
COLUMNS: dict[str, list[Any]] = {name: SAMPLES[kind] for name, kind in PAIR_COLUMNS.items()}
TOKENS: dict[str, list[Any]] = {name: SAMPLES[kind] for name, kind in TOKEN_COLUMNS.items()}

HEAD = ("schema", "schema_version", "gradent_version")
SUMMARY: dict[str, Any] = {
    **{name: {"a": 0.1, "b": None} for name in Summary.__annotations__ if name not in HEAD},
    "notes": ["größer", "\u202e", "a\nb"],
    "seconds": 1.5,
}


def test_pairs_come_back(tmp_path) -> None:
    columns = {**COLUMNS, **{name: [None, 0.25] for name in ("cosine", "ref_chosen_logp", "ref_rejected_logp")}}
    write_pairs(tmp_path / "new" / "pairs.parquet", columns)
    table = read_pairs(tmp_path / "new" / "pairs.parquet")
    assert table.to_pydict() == columns
    assert table.schema.equals(pair_schema(), check_metadata=True)
    assert table.column_names == list(PAIR_COLUMNS)


def test_no_pairs_come_back_too(tmp_path) -> None:
    write_pairs(tmp_path / "pairs.parquet", {name: [] for name in PAIR_COLUMNS})
    assert read_pairs(tmp_path / "pairs.parquet").num_rows == 0


def test_any_reader_of_parquet_sees_the_version(tmp_path) -> None:
    write_pairs(tmp_path / "pairs.parquet", COLUMNS)
    metadata = pq.read_schema(tmp_path / "pairs.parquet").metadata
    assert metadata[b"gradent.schema_version"] == str(SCHEMA_VERSION).encode()
    assert metadata[b"gradent.version"] == __version__.encode()


def test_tokens_come_back(tmp_path) -> None:
    columns = {**TOKENS, "aligned_inner": [0.5, None], "facing_inner": [None, -0.5]}
    write_tokens(tmp_path / "new" / "tokens.parquet", columns)
    table = read_tokens(tmp_path / "new" / "tokens.parquet")
    assert table.to_pydict() == columns
    assert table.schema.equals(token_schema(), check_metadata=True)
    assert table.schema.metadata[b"gradent.schema_version"] == str(SCHEMA_VERSION).encode()
    assert table.column_names == list(TOKEN_COLUMNS)


def test_tokens_of_before_a_column_was_added_are_read(tmp_path) -> None:
    write_tokens(tmp_path / "tokens.parquet", TOKENS)
    table = pq.read_table(tmp_path / "tokens.parquet")
    pq.write_table(table.drop_columns(["own_inner"]), tmp_path / "old.parquet")
    read = read_tokens(tmp_path / "old.parquet")
    assert read.to_pydict() == {**TOKENS, "own_inner": [None, None]}
    pq.write_table(table.drop_columns(["sq"]), tmp_path / "broken.parquet")
    with pytest.raises(DataFileError, match="columns missing or of another type: sq"):
        read_tokens(tmp_path / "broken.parquet")


HOSTILE = [
    ("\ud83d", "?"),  # half of a surrogate pair
    ("a\udcffb\ud800", "a?b?"),
    ("", ""),
    ("\x00", "\x00"),
    ("\x1b[2J\n\r\t", "\x1b[2J\n\r\t"),
    ("\u202e[red]", "\u202e[red]"),
    ("\ufffd", "\ufffd"),
    ("😀", "😀"),
]


def test_tokens_of_any_text_come_back(tmp_path) -> None:
    columns = {name: [each[0]] * len(HOSTILE) for name, each in TOKENS.items()}
    write_tokens(tmp_path / "tokens.parquet", {**columns, "token": [text for text, _ in HOSTILE]})
    assert read_tokens(tmp_path / "tokens.parquet").to_pydict()["token"] == [text for _, text in HOSTILE]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sq": [None, 1.0]}, "write_tokens: column sq holds 1 nulls"),
        ({"identical": ["yes", "no"]}, "write_tokens: .*schema of tokens.parquet"),
        ({"token": [b"\xe2", b"\x82"]}, "write_tokens: .*schema of tokens.parquet"),
        ({"kind": [1, 2]}, r"write_tokens: missing columns \[\], unknown columns \['kind'\]"),
    ],
)
def test_tokens_that_do_not_fit_are_not_written(changes, message, tmp_path) -> None:
    with pytest.raises(InputError, match=message):
        write_tokens(tmp_path / "tokens.parquet", {**TOKENS, **changes})
    assert list(tmp_path.iterdir()) == []


def test_pairs_are_no_tokens_and_tokens_no_pairs(tmp_path) -> None:
    write_pairs(tmp_path / "pairs.parquet", COLUMNS)
    write_tokens(tmp_path / "tokens.parquet", TOKENS)
    with pytest.raises(DataFileError, match=r"not one of gradent's records of tokens \(its schema is 'pairs'\)"):
        read_tokens(tmp_path / "pairs.parquet")
    with pytest.raises(DataFileError, match=r"not one of gradent's records of pairs \(its schema is 'tokens'\)"):
        read_pairs(tmp_path / "tokens.parquet")


BAD_COLUMNS = {
    "missing": ({name: COLUMNS[name] for name in PAIR_COLUMNS if name != "case"}, r"missing columns \['case'\]"),
    "unknown": ({**COLUMNS, "kase": [1, 2]}, r"unknown columns \['kase'\]"),
    "another length": ({**COLUMNS, "case": [1]}, "do not fit"),
    "another type": ({**COLUMNS, "case": ["ideal", "ideal"]}, "do not fit"),
    "a path": ({**COLUMNS, "checkpoint": [Path("a"), Path("b")]}, "do not fit"),
    "a null": ({**COLUMNS, "inner": [None, 1.0]}, "inner holds 1 nulls"),
}


@pytest.mark.parametrize("what", BAD_COLUMNS)
def test_pairs_that_do_not_fit_are_not_written(what, tmp_path) -> None:
    columns, message = BAD_COLUMNS[what]
    with pytest.raises(InputError, match=message):
        write_pairs(tmp_path / "pairs.parquet", columns)
    assert list(tmp_path.iterdir()) == []


def test_a_summary_comes_back(tmp_path) -> None:
    written = write_summary(tmp_path / "new" / "summary.json", SUMMARY)
    found = read_summary(tmp_path / "new" / "summary.json")
    assert found == written
    assert {name: found[name] for name in SUMMARY} == SUMMARY
    assert (found["schema_version"], found["gradent_version"]) == (SCHEMA_VERSION, __version__)
    assert set(found) == set(Summary.__annotations__)


def test_a_summary_read_can_be_written_again_under_this_version(tmp_path) -> None:
    whole = write_summary(tmp_path / "summary.json", SUMMARY)
    again = write_summary(tmp_path / "summary.json", {**whole, "schema_version": 0, "gradent_version": "0.0.1"})
    assert again == whole


def test_half_a_surrogate_pair_does_not_stop_a_summary(tmp_path) -> None:
    write_summary(tmp_path / "summary.json", {**SUMMARY, "notes": ["\ud83d"]})
    assert read_summary(tmp_path / "summary.json")["notes"] == ["?"]


BAD_SUMMARIES = {
    "missing": ({name: SUMMARY[name] for name in SUMMARY if name != "loss"}, r"missing keys \['loss'\]"),
    "unknown": ({**SUMMARY, "lost": 1}, r"unknown \['lost'\]"),
    "nan": ({**SUMMARY, "cosine": {"mean": float("nan")}}, "is not JSON"),
    "inf": ({**SUMMARY, "seconds": float("inf")}, "is not JSON"),
    "a path": ({**SUMMARY, "data": {"source": Path("a")}}, "is not JSON"),
}


@pytest.mark.parametrize("what", BAD_SUMMARIES)
def test_a_summary_that_does_not_fit_is_not_written(what, tmp_path) -> None:
    summary, message = BAD_SUMMARIES[what]
    with pytest.raises(InputError, match=message):
        write_summary(tmp_path / "summary.json", summary)
    assert list(tmp_path.iterdir()) == []


def stamped(path: Path, **changes: bytes | None) -> None:
    """A well-formed pairs.parquet with other metadata."""
    table = pa.table(COLUMNS, schema=pair_schema())
    metadata = {**pair_schema().metadata, **{f"gradent.{key}".encode(): each for key, each in changes.items()}}
    pq.write_table(
        table.replace_schema_metadata({key: each for key, each in metadata.items() if each is not None}), path
    )


BAD_PARQUET = {
    "newer": (lambda path: stamped(path, schema_version=b"2"), "schema version 2; this gradent .* up to 1. Upgrade"),
    "no version": (lambda path: stamped(path, schema_version=None), "its schema version is ''"),
    "a version of words": (lambda path: stamped(path, schema_version=b"new"), "its schema version is 'new'"),
    "foreign": (lambda path: stamped(path, schema=None), "not one of gradent's records"),
    "foreign, bare": (lambda path: pq.write_table(pa.table({"a": [1]}), path), "not one of gradent's records"),
    "a column missing": (
        lambda path: pq.write_table(pa.table(COLUMNS, schema=pair_schema()).drop_columns(["case", "step"]), path),
        "columns missing or of another type: step, case. Run the audit again",
    ),
    "a column of another type": (
        lambda path: pq.write_table(
            pa.table({**COLUMNS, "case": [1.0, 2.0]}).replace_schema_metadata(pair_schema().metadata), path
        ),
        "columns missing or of another type: case",
    ),
    "empty": (lambda path: path.touch(), "not a readable parquet file"),
    "truncated": (
        lambda path: (stamped(path), path.write_bytes(path.read_bytes()[:-9])),
        "not a readable parquet file",
    ),
    "its tail alone": (
        lambda path: (stamped(path), path.write_bytes(path.read_bytes()[500:])),
        "not a readable parquet",
    ),
    "not there": (lambda path: None, "there is no such file. `gradent audit"),
}


@pytest.mark.parametrize("what", BAD_PARQUET)
def test_what_is_no_record_of_pairs_is_refused(what, tmp_path) -> None:
    make, message = BAD_PARQUET[what]
    make(tmp_path / "pairs.parquet")
    with pytest.raises(DataFileError, match=f"pairs.parquet: .*{message}"):
        read_pairs(tmp_path / "pairs.parquet")


GOOD = {"schema": "gradent.audit_summary", "schema_version": 1, "gradent_version": "0", **SUMMARY}
BAD_JSON = {
    "newer": ({**GOOD, "schema_version": 2}, "schema version 2; this gradent .* up to 1. Upgrade"),
    "no version": ({name: GOOD[name] for name in GOOD if name != "schema_version"}, "its schema version is ''"),
    "half a version": ({**GOOD, "schema_version": 1.5}, "its schema version is '1.5'"),
    "foreign": ({"model": "x"}, "not one of gradent's summaries"),
    "a list": ([GOOD], "not one of gradent's summaries"),
    "a key missing": ({name: GOOD[name] for name in GOOD if name != "loss"}, "keys missing: loss. Run the audit again"),
    "truncated": (json.dumps(GOOD)[:-5], "not a readable JSON file"),
    "empty": ("", "not a readable JSON file"),
    "no text": (b"\xff\xfe\x00", "not a readable JSON file"),
    "not there": (None, "there is no such file. `gradent audit"),
}


@pytest.mark.parametrize("what", BAD_JSON)
def test_what_is_no_summary_is_refused(what, tmp_path) -> None:
    content, message = BAD_JSON[what]
    path = tmp_path / "summary.json"
    if content is not None:
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataFileError, match=f"summary.json: .*{message}"):
        read_summary(path)


def test_the_refused_are_each_one_step_from_a_record(tmp_path) -> None:
    stamped(tmp_path / "pairs.parquet")
    (tmp_path / "summary.json").write_text(json.dumps(GOOD))
    assert read_pairs(tmp_path / "pairs.parquet").num_rows == 2
    assert read_summary(tmp_path / "summary.json")["seconds"] == 1.5


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_file_appears_whole_or_the_old_one_stays(step, tmp_path, monkeypatch) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, SUMMARY)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(documents.json, "dumps", lambda *_, **__: Full())
        else:
            patch.setattr(os, step, full)
        with pytest.raises(InputError, match=r"cannot write there \(No space left on device\). Choose another --out"):
            write_summary(path, {**SUMMARY, "seconds": 2.5})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    write_summary(path, {**SUMMARY, "seconds": 2.5})
    assert path.read_bytes() != before


class Full(str):
    """A text that cannot be written."""

    __slots__ = ()

    def __add__(self, other: str) -> Full:
        return self

    def encode(self, *_: Any, **__: Any) -> bytes:
        raise OSError(28, "No space left on device")


def test_no_reader_sees_half_a_file(tmp_path, monkeypatch) -> None:
    path, seen = tmp_path / "pairs.parquet", []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(path.exists()))
    write_pairs(path, COLUMNS)
    assert seen == [False]
    assert path.exists()
