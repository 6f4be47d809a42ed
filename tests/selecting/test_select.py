"""`select` writes the data that is left, in its order and format, and says why each row went and what that changes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from gradent import scan, select
from gradent.cli.app import app
from gradent.errors import DataFileError, InputError
from gradent.record.scans import read_scan
from tests.auditing.made import KINDS, write_jsonl
from tests.auditing.trained import make_base, word_pairs
from tests.shared import folder_once

ROWS = [{**row, "source": "ab"[number % 5 == 0], "n": number} for number, row in enumerate(word_pairs(20))]
for number, row in enumerate(ROWS):  # all different
    row["prompt"] = " ".join([row["prompt"], *["film", "soup", "book", "warm"][: number % 4 + 1] * (1 + number // 8)])


def _make(folder: Path) -> None:
    folder.mkdir()
    make_base(folder / "base")
    for name in ("pairs.jsonl", "pairs.json", "pairs.parquet"):
        KINDS[name](folder / name, ROWS)
    (folder / "pairs.jsonl.gz").write_bytes(gzip.compress((folder / "pairs.jsonl").read_bytes()))
    for name in ("pairs.jsonl", "pairs.json", "pairs.parquet", "pairs.jsonl.gz"):
        out = folder / f"scan of {name}"
        scan(folder / "base", folder / name, out=out, exact=None, report=False, quiet=True, device="cpu")


@pytest.fixture(scope="module")
def made() -> Path:
    """The same rows in files of four kinds, each of them scanned, every pair exactly."""
    return folder_once("selecting", _make)


def columns(made: Path) -> dict[str, np.ndarray[Any, Any]]:
    table = read_scan(made / "scan of pairs.jsonl/scan.parquet")
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("by", "column", "worse"),
    [
        ("ches", "ches", 1),
        ("head", "head_cosine", 1),
        ("exact", "cosine", 1),
        ("predicted_change", "chosen_change", -1),
    ],
)
def test_the_worst_go_in_the_datas_order_and_bytes(by, column, worse, made, tmp_path):
    result = select(made / "scan of pairs.jsonl", by=by, drop="25%", out=tmp_path / "kept.jsonl", quiet=True)
    harm = worse * columns(made)[column].astype(float)
    gone = sorted(np.lexsort((-np.arange(20), -harm))[:5].tolist())
    source = (made / "pairs.jsonl").read_bytes().splitlines(keepends=True)
    assert result.out.read_bytes() == b"".join(line for row, line in enumerate(source) if row not in gone)
    assert (result.kept, result.dropped, result.unscored) == (15, 5, 0)
    reasons = lines(result.reasons_path)
    assert [reason["row"] for reason in reasons] == gone
    assert all("from the worst of 20 pairs, among the worst 0.25 of 20 pairs" in each["reason"] for each in reasons)
    assert reasons[0]["where"].endswith(f"pairs.jsonl:{gone[0] + 1}")


def test_keep_is_what_drop_leaves_and_nothing_is_left_to_chance(made, tmp_path):
    files = [
        select(made / "scan of pairs.jsonl", by="ches", out=tmp_path / name, quiet=True, **how).out.read_bytes()
        for name, how in (("a.jsonl", {"drop": 0.3}), ("b.jsonl", {"keep": "70%"}), ("c.jsonl", {"drop": "30%"}))
    ]
    assert files[0] == files[1] == files[2]
    drawn = [
        select(made / "scan of pairs.jsonl", by="random", drop=0.3, seed=seed, out=tmp_path / "r.jsonl", quiet=True)
        .out.read_bytes()
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("name", ["pairs.json", "pairs.parquet", "pairs.jsonl.gz"])
def test_every_kind_of_file_keeps_its_kind(name, made, tmp_path):
    plain = select(made / "scan of pairs.jsonl", by="ches", drop=0.2, out=tmp_path / "plain.jsonl", quiet=True)
    result = select(made / f"scan of {name}", by="ches", drop=0.2, out=tmp_path / name, quiet=True)
    if name.endswith("parquet"):
        found = pyarrow.parquet.read_table(result.out)
        assert found.schema.equals(pyarrow.parquet.read_table(made / name).schema, check_metadata=True)
        rows = found.to_pylist()
    elif name.endswith("gz"):
        assert gzip.decompress(result.out.read_bytes()) == plain.out.read_bytes()
        return
    else:
        rows = json.loads(result.out.read_text())
    assert rows == lines(plain.out)


def test_another_kind_of_file_is_written_from_the_values(made, tmp_path):
    result = select(made / "scan of pairs.parquet", by="ches", drop=0.2, out=tmp_path / "kept.jsonl", quiet=True)
    other = select(made / "scan of pairs.jsonl", by="ches", drop=0.2, out=tmp_path / "kept.parquet", quiet=True)
    assert lines(result.out) == pyarrow.parquet.read_table(other.out).to_pylist()


def test_a_threshold_is_in_the_scores_own_units(made, tmp_path):
    found = columns(made)
    for by, column, worse in (("ches", "ches", 1), ("predicted_change", "chosen_change", -1)):
        cut = float(np.median(found[column].astype(float)))
        result = select(made / "scan of pairs.jsonl", by=by, threshold=cut, out=tmp_path / "kept.jsonl", quiet=True)
        harm = worse * found[column].astype(float)
        assert [row["n"] for row in lines(result.out)] == np.flatnonzero(harm <= worse * cut).tolist()
    with pytest.raises(InputError, match="no pair would be left"):
        select(made / "scan of pairs.jsonl", by="ches", threshold=-1e9, out=tmp_path / "kept.jsonl", quiet=True)


def test_strata_lose_the_same_share_and_none_vanishes(made, tmp_path, capsys):
    result = select(made / "scan of pairs.jsonl", by="ches", drop=0.5, by_column="source", out=tmp_path / "kept.jsonl")
    assert result.strata == {'source "a"': (16, 8), 'source "b"': (4, 2)}
    few = select(made / "scan of pairs.jsonl", by="ches", drop=0.95, by_column="source", out=tmp_path / "few.jsonl")
    assert few.strata == {'source "a"': (16, 1), 'source "b"': (4, 1)}
    assert "More than half of these went" in capsys.readouterr().out
    with pytest.raises(InputError, match="has no 'where'"):
        select(made / "scan of pairs.jsonl", by="ches", drop=0.5, by_column="where", out=tmp_path / "x.jsonl")


def test_weights_go_by_rank(made, tmp_path):
    for name in ("pairs.jsonl", "pairs.parquet"):
        result = select(made / f"scan of {name}", by="ches", weight=True, out=tmp_path / name, quiet=True)
        rows = lines(result.out) if name.endswith("jsonl") else pyarrow.parquet.read_table(result.out).to_pylist()
        weights = np.array([row["weight"] for row in rows])
        assert len(rows) == 20 and weights.mean() == pytest.approx(1.0) and result.dropped == 0
        ches = columns(made)["ches"].astype(float)
        assert weights[ches.argmax()] == weights.min() and weights[ches.argmin()] == weights.max()


def test_the_expected_effect_is_that_of_a_scan_of_what_is_left(made, tmp_path):
    result = select(
        made / "scan of pairs.jsonl", by="predicted_change", drop="40%", out=tmp_path / "kept.jsonl", quiet=True
    )
    whole = columns(made)["chosen_sample_change"].astype(float)
    assert result.effect["chosen_before"] == pytest.approx(whole.mean(), rel=1e-3)
    again = scan(made / "base", result.out, out=tmp_path / "scan", exact=None, report=False, quiet=True)
    left = np.array(read_scan(again.scan_path)["chosen_sample_change"].to_pylist())
    assert result.effect["chosen_kept_after"] == pytest.approx(left.mean(), rel=1e-3, abs=1e-5)
    assert result.effect["pairs"] == 20 and result.effect["pairs_kept"] == 12


def test_rows_that_were_not_scanned_stay(made, tmp_path):
    rows = [*ROWS[:6], {**ROWS[6], "rejected": ROWS[6]["chosen"]}, *ROWS[7:]]  # a pair with nothing to learn
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    scan(made / "base", data, out=tmp_path / "scan", exact=0, report=False, quiet=True)
    result = select(tmp_path / "scan", by="ches", drop=0.5, out=tmp_path / "kept.jsonl", quiet=True)
    assert result.unscored == 1 and result.effect is None
    assert 6 in [row["n"] for row in lines(result.out)]
    with pytest.raises(InputError, match=r"19 of 19 scanned pairs have none\. Scan again with --exact all"):
        select(tmp_path / "scan", by="exact", drop=0.5, out=tmp_path / "kept.jsonl")
    with pytest.raises(InputError, match="Scan again with --reference"):
        select(tmp_path / "scan", by="reward_margin", drop=0.5, out=tmp_path / "kept.jsonl")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"by": "ches"}, "none of drop, keep, threshold and weight given"),
        ({"by": "ches", "drop": 0.1, "keep": 0.5}, "drop and keep given"),
        ({"by": "nonsense", "drop": 0.1}, "by is 'nonsense'; accepted: edit_distance"),
        ({"by": "ches", "drop": "110%"}, "drop is '110%'"),
        ({"by": "ches", "drop": 0.1, "out": "kept.csv"}, r"Accepted: \.jsonl"),
    ],
)
def test_refusals(options, said, made, tmp_path):
    with pytest.raises(InputError, match=said):
        select(made / "scan of pairs.jsonl", **{"out": tmp_path / "kept.jsonl", "quiet": True, **options})


def test_data_that_has_changed_or_moved(made, tmp_path):
    data = write_jsonl(tmp_path / "other.jsonl", ROWS[:-1])
    with pytest.raises(DataFileError, match="is not the data"):
        select(made / "scan of pairs.jsonl", by="ches", drop=0.1, data=data, out=tmp_path / "kept.jsonl")
    data = write_jsonl(tmp_path / "moved.jsonl", ROWS)
    result = select(
        made / "scan of pairs.jsonl", by="ches", drop=0.1, data=data, out=tmp_path / "kept.jsonl", quiet=True
    )
    assert result.kept == 18
    with pytest.raises(InputError, match="is the scanned data itself"):
        select(made / "scan of pairs.jsonl", by="ches", drop=0.1, out=made / "pairs.jsonl")


def test_the_command(made, tmp_path):
    arguments = ["--by", "ches_normalized", "--keep", "64%", "--out", str(tmp_path / "kept.jsonl")]
    done = CliRunner().invoke(app, ["select", str(made / "scan of pairs.jsonl"), *arguments])
    assert done.exit_code == 0, done.output
    assert "13 rows kept, 7 left out by ches_normalized." in done.output
    assert "mean change of chosen" in done.output and (tmp_path / "kept.jsonl.dropped.jsonl").is_file()
    done = CliRunner().invoke(app, ["select", str(tmp_path), *arguments])
    assert done.exit_code == 2 and "there is no such file" in done.output
