"""Rows from every kind of file, each with the place it came from; what cannot be read says where and why."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from gradent.errors import DataFileError
from gradent.loading.preference_files import read_rows
from tests.auditing.made import FORMATS, KINDS, PAIRS, write_jsonl


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` converts is cached under the test's directory."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def without_nulls(value: Any) -> Any:
    """Tables give every message all keys."""
    return {key: each for key, each in value.items() if each is not None}


@pytest.mark.parametrize("name", ["strings", "messages", "messages, implicit prompt"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_rows(kind, name, tmp_path) -> None:
    KINDS[kind](tmp_path / kind, FORMATS[name])
    rows = read_rows(tmp_path / kind)
    assert [without_nulls(row.values) for row in rows] == FORMATS[name]
    assert [row.index for row in rows] == list(range(len(FORMATS[name])))
    assert [row.problem for row in rows] == [None] * len(rows)


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("pairs.jsonl", "pairs.jsonl:3"),
        ("lines.json", "lines.json:3"),
        ("pairs.json", "pairs.json:12"),
        ("pairs.parquet", "pairs.parquet, row 2"),
        ("saved", "saved[train], row 2"),
        ("saved-dict", "saved-dict[train], row 2"),
        ("folder", "folder[train], row 2"),
    ],
)
def test_every_row_knows_its_place(kind, place, tmp_path) -> None:
    KINDS[kind](tmp_path / kind, PAIRS)
    assert read_rows(tmp_path / kind)[2].where == f"{tmp_path}/{place}"


def test_a_path_may_be_a_string(tmp_path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    assert read_rows(str(path)) == read_rows(path)


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", ["", PAIRS[0], "   ", "", PAIRS[1]])
    assert [(row.index, row.where) for row in read_rows(path)] == [(0, f"{path}:2"), (1, f"{path}:5")]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json"])
def test_byte_order_marks_and_carriage_returns_are_no_matter(name, tmp_path) -> None:
    path = tmp_path / name
    lines = [json.dumps(pair) for pair in PAIRS]
    text = "\r\n".join(lines) if name == "pairs.jsonl" else "[" + ",\r\n".join(lines) + "]\r\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [row.values for row in read_rows(path)] == PAIRS


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b"])
def test_only_a_newline_ends_a_line(separator, tmp_path) -> None:
    pair = {**PAIRS[0], "chosen": f"two{separator}lines"}
    for name in ("pairs.jsonl", "pairs.json"):
        path = tmp_path / name
        path.write_text(json.dumps(pair, ensure_ascii=False) + "\n", "utf-8")
        assert [row.values for row in read_rows(path)] == [json.loads(json.dumps(pair))]


BAD_LINES = {
    "half an object": ('{"prompt": "p", "cho', "not valid JSON: .* at column"),
    "python": ("{'prompt': 'p'}", "not valid JSON.*One JSON object a line"),
    "two objects": ("{} {}", "Extra data"),
    "latin-1": (b'{"prompt": "caf\xe9"}', "not UTF-8 text .byte 0xe9 at offset 15.*Save the file as UTF-8"),
    "a number without end": ('{"prompt": ' + 5000 * "1" + "}", "not valid JSON: Exceeds the limit"),
    "nesting without end": (100_000 * "[", "not valid JSON: maximum recursion depth"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_a_bad_line_costs_one_row(what, tmp_path) -> None:
    line, message = BAD_LINES[what]
    path = tmp_path / "pairs.jsonl"
    good = json.dumps(PAIRS[0]).encode()
    path.write_bytes(b"\n".join([good, line if isinstance(line, bytes) else line.encode(), good]))
    before, bad, after = read_rows(path)
    assert (before.values, after.values, after.index) == (PAIRS[0], PAIRS[0], 2)
    assert bad.where == f"{path}:2"
    assert bad.problem is not None
    assert re.search(message, bad.problem), bad.problem


BAD_ARRAYS = {
    "no array": ('"text"', ":1: a JSON array of objects is expected"),
    "an object of arrays": ('{"prompt": ["p"],\n"chosen": ["c"]}', ":1: a JSON array of objects is expected"),
    "cut off": ('[\n{"a": 1},\n{"b"', ":3: not valid JSON"),
    "nothing after a comma": ('[\n{"a": 1},\n', ":3: not valid JSON"),
    "a trailing comma": ('[\n{"a": 1},\n]', ":3: not valid JSON"),
    "no comma": ('[\n{"a": 1}\n{"b": 2}]', ":3: not valid JSON: ',' or ']' expected after row 0"),
    "something after it": ('[{"a": 1}]\n[]', ":2: not valid JSON: something follows"),
    "a number without end": ("[" + 5000 * "1" + "]", ":1: not valid JSON: Exceeds the limit"),
    "nesting without end": ("[\n" + 100_000 * "[", ":2: not valid JSON: maximum recursion depth"),
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_a_bad_array_names_the_line(what, tmp_path) -> None:
    text, message = BAD_ARRAYS[what]
    path = tmp_path / "pairs.json"
    path.write_text(text)
    with pytest.raises(DataFileError) as caught:
        read_rows(path)
    assert f"{path}{message}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("pairs.jsonl", b""), ("pairs.jsonl", b"\n \n"), ("pairs.json", b"[]"), ("pairs.json", b"[\n]\n")],
)
def test_a_file_without_rows(name, content, tmp_path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataFileError, match=r"no row in it; at least one pair is needed"):
        read_rows(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all, but long enough to look at its end"])
def test_a_damaged_parquet_file(content, tmp_path) -> None:
    path = tmp_path / "pairs.parquet"
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=r"pairs.parquet: not a readable parquet file"):
        read_rows(path)


def test_a_truncated_parquet_file(tmp_path) -> None:
    path = tmp_path / "pairs.parquet"
    KINDS["pairs.parquet"](path, PAIRS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataFileError, match=r"pairs.parquet: not a readable parquet file"):
        read_rows(path)


@pytest.mark.parametrize(
    "name", ["nosuch.jsonl", "no/such/pairs.json", "nosuch.txt", "pairs.josnl", "./nosuch", "a b/c"]
)
def test_a_file_that_is_not_there(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataFileError, match=r"there is no such file or directory\. Accepted: a \.jsonl, \.json"):
        read_rows(name)


def test_a_file_of_another_kind(tmp_path) -> None:
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\n")
    with pytest.raises(DataFileError, match=r"a file ending in '.csv' is not read. Accepted"):
        read_rows(tmp_path / "pairs.csv")


@pytest.mark.parametrize("name", ["nosuch", "owner/nosuch"])
def test_a_dataset_that_the_hub_cannot_give(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataFileError, match=f"^{name}: datasets cannot read it .*There is no such directory here"):
        read_rows(name)


def test_a_folder_without_data(tmp_path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataFileError, match=r"folder: datasets cannot read it"):
        read_rows(tmp_path / "folder")


def test_a_folder_of_damaged_files_says_what_is_wrong_with_them(tmp_path) -> None:
    KINDS["folder"](tmp_path / "folder", ['{"prompt": "p", "cho'])
    with pytest.raises(DataFileError, match=r"folder: datasets cannot read it .*JSON"):
        read_rows(tmp_path / "folder")


def test_the_split_of_a_saved_dataset(tmp_path) -> None:
    data = datasets.Dataset.from_list(PAIRS)
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(tmp_path / "both")
    assert [row.values for row in read_rows(tmp_path / "both", "test")] == [PAIRS[2]]
    with pytest.raises(DataFileError, match=r"has no split 'dev'; it has \['test', 'train'\]. Pass --split"):
        read_rows(tmp_path / "both", "dev")


def test_the_split_of_a_single_dataset(tmp_path) -> None:
    datasets.Dataset.from_list(PAIRS, split="test").save_to_disk(tmp_path / "one")
    assert len(read_rows(tmp_path / "one", "test")) == len(read_rows(tmp_path / "one")) == len(PAIRS)
    with pytest.raises(DataFileError, match=r"has no split 'dev'"):
        read_rows(tmp_path / "one", "dev")


def test_a_file_has_no_split(tmp_path) -> None:
    with pytest.raises(DataFileError, match=r"a file has no splits, but split 'test' is asked for"):
        read_rows(write_jsonl(tmp_path / "pairs.jsonl", PAIRS), "test")


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json"])
def test_compressed_files_are_read(name, tmp_path) -> None:
    KINDS[name](tmp_path / name, PAIRS)
    packed = tmp_path / f"{name}.gz"
    packed.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert [row.values for row in read_rows(packed)] == PAIRS
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(DataFileError, match=r"\.gz: cannot be read \("):
        read_rows(packed)


def test_links_are_followed_as_in_the_hub_s_cache(tmp_path) -> None:
    blob, link = tmp_path / "blobs/1f3a", tmp_path / "snapshots/pairs.jsonl"
    for path in (blob, link):
        path.parent.mkdir()
    write_jsonl(blob, PAIRS)
    link.symlink_to(blob)
    for source in (link, link.parent):
        assert [row.values for row in read_rows(source)] == PAIRS


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", ("owner/name", None, None)),
        ("owner/name:cleaned", ("owner/name", "cleaned", None)),
        ("owner/name@v1.0", ("owner/name", None, "v1.0")),
        ("owner/name:cleaned@3f2a", ("owner/name", "cleaned", "3f2a")),
    ],
)
def test_a_hub_id_has_a_configuration_and_a_revision(source, asked, monkeypatch) -> None:
    def load(name: str, config: str | None, *, split: str, revision: str | None) -> list[dict[str, str]]:
        assert ((name, config, revision), split) == (asked, "train")
        return PAIRS

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(read_rows(source)) == len(PAIRS)
