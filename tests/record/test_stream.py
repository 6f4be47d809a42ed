"""A stream of records is readable after a crash at any byte, and a run that resumes writes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gradent.errors import DataFileError, InputError
from gradent.record import MOVED_COLUMNS, MOVED_SOURCES, PAIR_COLUMNS, SCHEMA_VERSION, UNSPLIT
from gradent.record.stream import PairStream, read_stream


def row(step: int, pair: int, inner: float = 0.5) -> dict[str, Any]:
    values: dict[str, Any] = {name: 1 if kind == "int64" else 0.25 for name, kind in PAIR_COLUMNS.items()}
    return values | {"checkpoint": "train", "step": step, "pair": pair, "inner": inner, "ref_chosen_logp": None}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    stream = PairStream(path)
    stream.append(rows)
    stream.close()
    return path


def keys(path: Path) -> list[tuple[int, int, float]]:
    columns = read_stream(path)
    assert list(columns) == [*PAIR_COLUMNS, *MOVED_COLUMNS]
    return list(zip(columns["step"], columns["pair"], columns["inner"], strict=True))


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    rows = [row(1, 0, 0.1), row(1, 1, -1e300), row(2, 0, 3.0)]
    path = write(tmp_path / "new" / "pairs.jsonl", *rows)
    columns = read_stream(path)
    found = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    assert found == [each | dict.fromkeys(MOVED_COLUMNS) for each in rows], "not accounted for: null"
    head = json.loads(path.read_text().splitlines()[0])
    assert head["schema"] == "gradent.pair_stream" and head["schema_version"] == SCHEMA_VERSION


def test_the_columns_of_an_account() -> None:
    sides = [[f"{side}_moved_{source}" for source in (*MOVED_SOURCES, UNSPLIT)] + [f"{side}_realised"]
             for side in ("chosen", "rejected")]  # fmt: skip
    assert list(MOVED_COLUMNS) == [*sides[0], *sides[1]]
    assert set(MOVED_COLUMNS.values()) == {"float64"} and not set(MOVED_COLUMNS) & set(PAIR_COLUMNS)


def test_rows_with_and_without_an_account(tmp_path: Path) -> None:
    moved = {name: 0.125 * place - 1 for place, name in enumerate(MOVED_COLUMNS)}
    some = {"chosen_moved_own": 2.5, "rejected_moved_own": None}
    path = write(tmp_path / "pairs.jsonl", row(1, 0), row(2, 0) | moved, row(3, 0) | some)
    columns = read_stream(path)
    assert columns["step"] == [1, 2, 3]
    for name, value in moved.items():
        assert columns[name] == [None, value, some.get(name)]


def test_a_stream_of_before_the_account_is_read_and_continued(tmp_path: Path) -> None:
    """Its lines have `PAIR_COLUMNS` alone."""
    path = tmp_path / "pairs.jsonl"
    lines = [{"schema": "gradent.pair_stream", "schema_version": SCHEMA_VERSION, "gradent_version": "0.1"}, row(1, 0)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert keys(path) == [(1, 0, 0.5)]
    write(path, row(2, 0) | {"chosen_moved_momentum": -0.5})
    assert keys(path) == [(1, 0, 0.5), (2, 0, 0.5)]
    assert read_stream(path)["chosen_moved_momentum"] == [None, -0.5]


def test_an_empty_stream(tmp_path: Path) -> None:
    assert keys(write(tmp_path / "pairs.jsonl")) == []


def test_rows_are_there_before_the_file_is_closed(tmp_path: Path) -> None:
    stream = PairStream(tmp_path / "pairs.jsonl")
    stream.append([row(1, 0)])
    assert keys(tmp_path / "pairs.jsonl") == [(1, 0, 0.5)]
    stream.close()


def test_a_crash_at_every_byte_of_the_last_line(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.jsonl", row(1, 0), row(1, 1, 0.75)).read_bytes()
    start = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    for cut in range(start, len(whole) + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(whole[:cut])
        complete = cut >= len(whole) - 1  # without its line end it is whole nonetheless
        assert keys(path) == [(1, 0, 0.5), (1, 1, 0.75)][: 1 + complete]
        write(path, row(1, 1, 0.25), row(2, 0))  # the run that resumes
        assert keys(path) == [(1, 0, 0.5), (1, 1, 0.25), (2, 0, 0.5)]


def test_a_crash_at_every_byte_of_the_head(tmp_path: Path) -> None:
    """Nothing has been recorded yet: the run that resumes begins again."""
    whole = write(tmp_path / "whole.jsonl").read_bytes()
    for cut in range(len(whole)):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(whole[:cut])
        write(path, row(1, 0))
        assert keys(path) == [(1, 0, 0.5)]


def test_a_crash_in_the_second_of_two_runs(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", row(1, 0))
    for step in (2, 3, 4):
        path.write_bytes(path.read_bytes() + b'{"checkpoint": "tra')  # cut short, and continued after it
        write(path, row(step, 0))
    assert [step for step, _, _ in keys(path)] == [1, 2, 3, 4]


def test_the_later_of_two_rows_stands(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", row(2, 1, 1.0), row(2, 0, 2.0), row(1, 0, 3.0))
    write(path, row(2, 0, 4.0), row(3, 0, 5.0))
    assert keys(path) == [(1, 0, 3.0), (2, 0, 4.0), (2, 1, 1.0), (3, 0, 5.0)]


@pytest.mark.parametrize("content", [b"hello\n", b"{}\n", b'{"schema": "other"}\n', b"\xff\xfe\n", b"[1]\n", b"3\n"])
def test_other_files_are_left_alone(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataFileError, match="not a stream"):
        PairStream(path)
    with pytest.raises(DataFileError, match="not a stream"):
        read_stream(path)
    assert path.read_bytes() == content


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"schema": "gradent.pair_stream", "schema_version": SCHEMA_VERSION + 1}) + "\n")
    for use in (PairStream, read_stream):
        with pytest.raises(DataFileError, match="Upgrade gradent"):
            use(path)


def test_a_broken_line_in_the_middle(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", row(1, 0), row(1, 1))
    lines = path.read_bytes().split(b"\n")
    lines[1] = lines[1].replace(b'"step"', b"step")
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataFileError, match=r"pairs.jsonl:2"):
        read_stream(path)


@pytest.mark.parametrize("line", [b"3", b"[]", b'{"step": 1}', b"null"])
def test_a_line_that_is_no_row(line: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", row(1, 0))
    path.write_bytes(path.read_bytes() + line + b"\n" + json.dumps(row(2, 0)).encode() + b"\n")
    with pytest.raises(DataFileError, match=r"pairs.jsonl:3"):
        read_stream(path)


@pytest.mark.parametrize(
    "change",
    [
        {"inner": float("nan")},
        {"inner": float("inf")},
        {"other": 1},
        {"inner": object()},
        {"chosen_moved_own": float("nan")},
        {"chosen_moved_nothing": 1.0},
    ],
)
def test_rows_that_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    stream = PairStream(tmp_path / "pairs.jsonl")
    with pytest.raises(InputError, match="PairStream"):
        stream.append([row(1, 0), row(1, 1) | change])
    stream.append([row(2, 0)])
    stream.close()
    assert keys(tmp_path / "pairs.jsonl") == [(2, 0, 0.5)], "of a refused call nothing is written"


def test_a_missing_key_is_refused(tmp_path: Path) -> None:
    stream = PairStream(tmp_path / "pairs.jsonl")
    with pytest.raises(InputError, match="PAIR_COLUMNS"):
        stream.append([{key: value for key, value in row(1, 0).items() if key != "inner"}])
    stream.close()


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="cannot be read"):
        read_stream(tmp_path / "nowhere.jsonl")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "pairs.jsonl", tmp_path):
        with pytest.raises(InputError, match="cannot be written"):
            PairStream(path)
