"""Committed records of today's schema: today's reader reads them, its writer writes them, their page says the same.

What a change of the schema or of the page renews is seen in the diff of tests/golden/, after `make golden`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradent.record import PAIR_COLUMNS, SAMPLE_COLUMNS, SCHEMA_VERSION, TOKEN_COLUMNS
from tests.golden_records import PAGE, RECORDS, TABLES, audited, contents, page_of

RENEW = "`make golden` renews tests/golden/, if the change is meant"


def differences(found: Any, golden: Any, where: str = "") -> list[str]:
    """Where two plain values differ, floats by more than rounding on another machine may make."""
    if isinstance(golden, dict) and isinstance(found, dict) and list(found) == list(golden):
        return [each for name in golden for each in differences(found[name], golden[name], f"{where}.{name}")]
    if isinstance(golden, list) and isinstance(found, list) and len(found) == len(golden):
        pairs = enumerate(zip(found, golden, strict=True))
        return [each for at, pair in pairs for each in differences(*pair, f"{where}[{at}]")]
    if type(found) is type(golden) is float:
        return [] if found == pytest.approx(golden, rel=1e-3, abs=1e-6) else [f"{where}: {found} for {golden}"]
    return [] if found == golden and type(found) is type(golden) else [f"{where}: {found!r:.80} for {golden!r:.80}"]


def test_todays_reader_reads_the_golden_records() -> None:
    golden = contents(RECORDS)
    summary, pairs, tokens = golden["summary"], golden["pairs"], golden["tokens"]
    assert (summary["schema"], summary["schema_version"], SCHEMA_VERSION) == ("gradent.audit_summary", 1, 1)
    assert summary["complete"] is True and summary["left_out"] == [] and len(summary["notes"]) == 3
    assert summary["run"]["kind"] == "adapter" and summary["run"]["found"] == [2, 4]
    assert [(each["name"], each["pairs"]) for each in summary["checkpoints"]] == [
        ("checkpoint-2", 12), ("checkpoint-4", 12),
    ]  # fmt: skip
    assert summary["loss"] == {"name": "dpo", "beta": 0.1}
    assert summary["history"]["curves"]["logps/chosen"] == [[1, -10.0], [2, -11.0], [3, -12.0], [4, -13.0]]
    assert summary["cosine"]["max"] == pytest.approx(0.790672, abs=1e-6)
    assert {name: column[2] for name, column in pairs.items()} == {
        "checkpoint": "checkpoint-2", "step": 2, "pair": 2, "chosen_len": 5, "rejected_len": 5, "case": 1,
        "chosen_sq": pytest.approx(0.071789, abs=1e-6), "rejected_sq": pytest.approx(0.169997, abs=1e-6),
        "inner": pytest.approx(0.056516, abs=1e-6), "cosine": pytest.approx(0.511593, abs=1e-6),
        "chosen_logp": pytest.approx(-15.874221, abs=1e-6), "rejected_logp": pytest.approx(-15.855244, abs=1e-6),
        "ref_chosen_logp": pytest.approx(-15.889220, abs=1e-6),
        "ref_rejected_logp": pytest.approx(-15.884835, abs=1e-6),
        "d_w": pytest.approx(0.050036, abs=1e-6), "d_l": pytest.approx(0.050036, abs=1e-6),
        "chosen_change": pytest.approx(0.000764, abs=1e-6), "rejected_change": pytest.approx(-0.005678, abs=1e-6),
    }  # fmt: skip
    assert {name: column[0] for name, column in tokens.items()} == {
        "checkpoint": "checkpoint-4", "step": 4, "pair": 7, "side": "chosen", "position": 0, "token_id": 19,
        "token": "bright", "identical": False, "aligned_inner": None, "sq": pytest.approx(0.014791, abs=1e-6),
        "entanglement": pytest.approx(-0.003981, abs=1e-6), "facing_inner": pytest.approx(-0.002829, abs=1e-6),
        "own_inner": pytest.approx(0.014963, abs=1e-6),
    }  # fmt: skip
    assert {name: column[-1] for name, column in golden["sample"].items()} == {
        "pair": 11, "where": "/somewhere/pairs.jsonl:12", "prompt": "the book was", "chosen": " bright felt a bore .",
        "rejected": " dull felt a bore .", "prompt_len": 3, "chosen_len": 6, "rejected_len": 6, "shared_prefix": 0,
        "shared_suffix": 5, "edit_distance": 1, "truncated": 0,
    }  # fmt: skip
    assert golden["modules"]["module"][2] == "base_model.model.model.layers.0.mlp.down_proj.lora_A.default"
    assert golden["modules"]["cosine_part"][2] == pytest.approx(0.278606, abs=1e-6)
    assert [len(golden[name]["step"]) for name in ("pairs", "modules", "tokens")] == [24, 16, 24]


def test_todays_writer_writes_the_golden_records(tmp_path: Path) -> None:
    assert differences(contents(audited(tmp_path)), contents(RECORDS)) == [], RENEW


def test_the_page_of_the_golden_records(tmp_path: Path) -> None:
    shutil.copytree(RECORDS, tmp_path / "audit")
    found, golden = page_of(tmp_path / "audit").splitlines(), PAGE.read_text("utf-8").splitlines()
    gone, new = [line for line in golden if line not in found], [line for line in found if line not in golden]
    assert (gone, new) == ([], []), RENEW
    assert found == golden, f"the order of the page's parts differs; {RENEW}"


def test_a_difference_is_seen() -> None:
    golden = contents(RECORDS)
    assert differences(golden, golden) == []
    for change in ({"loss": "kto"}, {"seconds": 2}, {"seconds": 1.6}, {"notes": ["new"]}):
        assert len(differences({**golden["summary"], **change}, golden["summary"])) == 1
    moved = {**golden["pairs"], "inner": [2 * value for value in golden["pairs"]["inner"]]}
    assert len(differences(moved, golden["pairs"])) == len(moved["inner"])


VALUES = {
    "string": st.text(st.characters(exclude_categories=["Cs"])),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "float64": st.floats(allow_nan=False),
    "bool_": st.booleans(),
}
MAY_BE_NULL = {
    "pairs": {"cosine", "ref_chosen_logp", "ref_rejected_logp"},
    "tokens": {"aligned_inner", "facing_inner", "own_inner"},
}
COLUMNS = {"pairs": PAIR_COLUMNS, "tokens": TOKEN_COLUMNS, "sample": SAMPLE_COLUMNS}


@pytest.mark.parametrize("name", COLUMNS)
@given(data=st.data())
def test_what_is_written_is_read(name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    rows = data.draw(st.integers(0, 5))
    columns = {}
    for column, kind in COLUMNS[name].items():
        values = VALUES[kind] | st.none() if column in MAY_BE_NULL.get(name, set()) else VALUES[kind]
        columns[column] = data.draw(st.lists(values, min_size=rows, max_size=rows))
    read, write = TABLES[name]
    path = tmp_path_factory.mktemp("round", numbered=True) / f"{name}.parquet"
    write(path, columns)
    assert read(path).to_pydict() == columns
