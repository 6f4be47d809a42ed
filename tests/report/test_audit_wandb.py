"""An audit as a wandb run, read back from the file of an offline one."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from google.protobuf.message import DecodeError
from wandb.proto import wandb_internal_pb2

from gradent.errors import InputError
from gradent.report import stream_audit, write_audit_figures, write_audit_report
from gradent.report.audit.sections.records import read_audit
from tests.report.audit_records import EVIL, write_audit
from tests.trainer.wandb_file import _chunks, history


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Iterator[Path]:
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    yield tmp_path
    wandb.teardown()  # it keeps the folder for every run of the process


def records_of(folder: Path, kind: str) -> list[Any]:
    (path,) = folder.rglob("*.wandb")
    found = []
    for raw in _chunks(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        if record.WhichOneof("record_type") == kind:
            found.append(getattr(record, kind))
    return found


def streamed(directory: Path, **asked: Any) -> Path:
    """The directory of an offline run, once wandb's own process has written its last record."""
    place = Path(stream_audit(directory, "my-project", **asked))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if records_of(place, "exit"):
                return place
        except DecodeError:  # a record is half written
            pass
        time.sleep(0.05)
    raise AssertionError(f"{place}: wandb has not written its last record")


def test_an_offline_run_holds_it_all(offline) -> None:
    write_audit(offline / "audit", with_steps=True)
    write_audit_report(offline / "audit")
    write_audit_figures(offline / "audit")
    place = streamed(offline / "audit", name="my audit")
    assert place.is_dir() and list(place.glob("*.wandb")) and wandb.run is None
    rows = [row for row in history(place) if "gradent/cosine" in row]
    measured = read_audit(offline / "audit").measured
    assert [row["gradent/step"] for row in rows] == [100, 200, 300, 400]
    for row, each in zip(rows, measured, strict=True):
        assert row["gradent/cosine"] == pytest.approx(each.mean("cosine"))
        assert row["gradent/case/both_down"] == pytest.approx(each.share("both_down"))
        assert row["gradent/chosen_logp"] == pytest.approx(each.mean("chosen_logp"))
        assert "gradent/logged/logps/chosen" in row
    found = read_audit(offline / "audit").summary["steps"]
    assert found is not None
    for row, sample in zip(rows, found["sample"], strict=True):
        assert row["gradent/sample/chosen/others"] == pytest.approx(sample["chosen_others"])
        assert row["gradent/sample/case/ideal"] == pytest.approx(0.2)
    assert [row.get("gradent/interval/explained") for row in rows] == [None, 0.4, 0.4, 0.96]
    steps = [row["gradent/step"] for row in history(place) if "gradent/step" in row]
    assert steps == sorted(steps) and len(steps) == 41
    (shown,) = [row for row in history(place) if any(key.startswith("gradent/what_if") for key in row)]
    kinds = {key: value for key, value in shown.items() if key.endswith("_type")}
    kinds |= {f"{key}._type": value["_type"] for key, value in shown.items() if isinstance(value, dict)}
    assert kinds == {
        "gradent/what_if._type": "table-file", "gradent/pairs._type": "table-file", "gradent/report._type": "html-file",
        "gradent/pushed._type": "table-file",
    }  # fmt: skip
    (run,) = records_of(place, "run")[:1]
    assert (run.project, run.display_name, run.job_type) == ("my-project", "my audit", "audit")


def test_the_files_are_an_artifact_and_the_tables_hold_text(offline) -> None:
    write_audit(offline / "audit", hostile=EVIL, with_steps=True)
    place = streamed(offline / "audit")
    (artifact,) = [each for each in records_of(place, "artifact") if each.type == "gradent-audit"]
    names = [entry.path for entry in artifact.manifest.contents]
    if not names:  # long lists stand in a file
        manifest = json.loads(Path(artifact.manifest.manifest_file_path).read_text())
        names = list(manifest["contents"])
    assert sorted(names) == [
        "modules.parquet", "pairs.parquet", "sample.parquet", "steps.parquet", "summary.json", "tokens.parquet",
    ]  # fmt: skip
    (table,) = place.rglob("pairs*.table.json")
    content = json.loads(table.read_text("utf-8"))
    assert content["columns"] == ["row", "cosine", "case", "prompt", "chosen", "rejected"]
    assert [row[1] for row in content["data"]] == sorted((row[1] for row in content["data"]), reverse=True)
    assert not any(set("\u202e\x00\x1b") & set(str(cell)) for row in content["data"] for cell in row)
    (table,) = place.rglob("pushed*.table.json")
    pushed = json.loads(table.read_text("utf-8"))
    assert [row[-1] for row in pushed["data"]] == [-2.5] * 3
    assert not any(set("\u202e\x00\x1b") & set(str(cell)) for row in pushed["data"] for cell in row)
    metrics = {each.name or each.glob_name: each.step_metric for each in records_of(place, "metric")}
    assert metrics["gradent/*"] == "gradent/step" or metrics.get("gradent/cosine") == "gradent/step"


def test_a_single_model_and_nulls(offline) -> None:
    write_audit(offline / "audit", 1, with_sample=False, what_if=[], recommendation=None)
    place = streamed(offline / "audit")
    assert [row["gradent/step"] for row in history(place) if "gradent/cosine" in row] == [0]


def test_an_active_run_is_left_alone(offline, monkeypatch) -> None:
    write_audit(offline / "audit")
    monkeypatch.setattr(wandb, "run", SimpleNamespace(name="theirs"))
    with pytest.raises(InputError, match=r"A wandb run is active \(theirs\)"):
        stream_audit(offline / "audit", "my-project")


def test_without_wandb(tmp_path, monkeypatch) -> None:
    write_audit(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="needs wandb, which is not installed"):
        stream_audit(tmp_path, "my-project")
