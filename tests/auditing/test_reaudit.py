"""Audits in odd weather: settings that change between calls, disks that fill, damaged files, passes that fail."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from gradent import audit
from gradent.auditing.api import AuditResult
from gradent.auditing.measuring import sweep
from gradent.auditing.state.journal import JournalError
from gradent.errors import GradentError, InputError, ModelError
from gradent.record import json_lines, read_pairs, read_summary, read_tokens
from tests.auditing.made import said, write_jsonl
from tests.auditing.trained import Trained, train_run

ROWS = 16
TEMPLATE = "{% for m in messages %} {{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module", params=["full", "adapter"])
def trained(request, tmp_path_factory) -> Trained:
    return train_run(tmp_path_factory.mktemp(request.param), lora=request.param == "adapter", data_rows=ROWS)


@pytest.fixture
def copied(trained, tmp_path) -> Trained:
    """A run that may be damaged."""
    shutil.copytree(trained.run, tmp_path / "run")
    return Trained(base=trained.base, run=tmp_path / "run", pairs=trained.pairs)


def run(trained: Trained, out: Path, **options: Any) -> AuditResult:
    """An audit without the account of its steps, three quarters of the work: tests of the steps ask for it."""
    settings = {
        "base": trained.base, "report": False, "quiet": True, "batch_size": 3, "attribution": False, **options
    }  # fmt: skip
    return audit(trained.run, trained.pairs, out=out, **settings)


def test_another_reference_is_measured_anew(trained, tmp_path) -> None:
    found = {}
    for name in ("checkpoint-2", "checkpoint-6", "base"):
        reference = trained.base if name == "base" else trained.run / name
        result = run(trained, tmp_path / "out", checkpoints="last", reference=reference)
        fresh = run(trained, tmp_path / name, checkpoints="last", reference=reference)
        found[name] = read_pairs(result.pairs_path)["ref_chosen_logp"].to_pylist()
        assert found[name] == read_pairs(fresh.pairs_path)["ref_chosen_logp"].to_pylist()
        assert result.summary["dynamics"] is None or result.summary["dynamics"]["start"] is None
    assert len({tuple(values) for values in found.values()}) == 3


def test_another_loss_of_a_single_model_measures_nothing(local_model, trained, tmp_path, monkeypatch) -> None:
    """But for its step on the sample."""
    options = {"out": tmp_path / "out", "report": False, "quiet": True, "attribution": False}
    audit(trained.base, trained.pairs, loss="simpo", **options)
    monkeypatch.setattr(sweep, "open_model", lambda *_, **__: pytest.fail("measured anew"))
    assert audit(trained.base, trained.pairs, loss="dpo", **options).summary["reference"]["kind"] == "self"
    again = audit(trained.base, trained.pairs, loss="simpo", **options)
    assert read_pairs(again.pairs_path)["ref_chosen_logp"].null_count == ROWS


def test_fewer_token_pairs_than_before(trained, tmp_path) -> None:
    many = run(trained, tmp_path / "out", checkpoints="last", token_pairs=5)
    few = run(trained, tmp_path / "out", checkpoints="last", token_pairs=2)
    fresh = run(trained, tmp_path / "fresh", checkpoints="last", token_pairs=2)
    assert many.tokens_path is not None and few.tokens_path is not None and fresh.tokens_path is not None
    found, expected = (read_tokens(each.tokens_path).to_pydict() for each in (few, fresh))
    assert found == expected and len(set(found["pair"])) == 2


@pytest.fixture(scope="module")
def undisturbed(trained, tmp_path_factory) -> AuditResult:
    return run(trained, tmp_path_factory.mktemp("undisturbed"), attribution=True)


@pytest.mark.parametrize("part", [0, 40])
def test_a_full_disk_stops_the_audit_and_spoils_nothing(part, trained, undisturbed, tmp_path, monkeypatch) -> None:
    real, seen = os.write, []

    def full(file: int, line: bytes) -> int:
        seen.extend([line] if line.startswith(b'{"kind": "batch"') else [])
        if len(seen) >= 3:
            if part and len(line) > part:
                real(file, line[:part])
            raise OSError(28, "No space left on device")
        return real(file, line)

    with monkeypatch.context() as patched:
        patched.setattr(json_lines.os, "write", full)
        with pytest.raises(JournalError, match=r"No space left on device.*run the same command again"):
            run(trained, tmp_path / "out", attribution=True)
    result = run(trained, tmp_path / "out", attribution=True)
    assert {**result.summary, "seconds": 0} == {**undisturbed.summary, "seconds": 0}
    assert result.pairs_path.read_bytes() == undisturbed.pairs_path.read_bytes()


DAMAGES = {"vocab_size": None, "num_attention_heads": 0, "num_hidden_layers": "two", "model_type": "nosuch"}


@pytest.mark.parametrize("key", DAMAGES)
@pytest.mark.parametrize("step", [2, 6])
def test_a_damaged_config_costs_its_checkpoint_alone(key, step, copied, tmp_path) -> None:
    import json  # noqa: PLC0415

    config = copied.run / f"checkpoint-{step}" / "config.json"
    if not config.is_file():
        pytest.skip("an adapter has no configuration of a model")
    config.write_text(json.dumps({**json.loads(config.read_text()), key: DAMAGES[key]}))
    summary = run(copied, tmp_path / "out", loss="simpo").summary
    assert [each["step"] for each in summary["left_out"]] == [step]
    assert len(summary["checkpoints"]) == 3


@pytest.mark.parametrize("step", [2, 6])
def test_a_damaged_tokenizer_costs_nothing(step, copied, tmp_path) -> None:
    place = copied.run / f"checkpoint-{step}" / "tokenizer.json"
    place.write_text(place.read_text()[:100])
    assert run(copied, tmp_path / "out", loss="simpo").summary["left_out"] == []


def test_the_run_s_own_chat_template_counts(copied, tmp_path) -> None:
    for checkpoint in copied.run.glob("checkpoint-*"):
        (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    rows = [{"prompt": said("the film was", "user"), "chosen": said("bright ."), "rejected": said("dull .")}]
    data = write_jsonl(tmp_path / "messages.jsonl", rows)
    assert run(Trained(base=copied.base, run=copied.run, pairs=data), tmp_path / "out").summary["data"]["measured"] == 1


def test_a_reference_that_cannot_be_had(trained, tmp_path) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(trained.base, gone)
    next(gone.glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(ModelError, match=r"dpo needs, cannot be measured.*--base.*--reference"):
        run(trained, tmp_path / "out", loss="dpo", reference=gone)
    summary = run(trained, tmp_path / "out", loss="simpo", reference=gone).summary
    assert any("The reference cannot be measured" in note for note in summary["notes"])
    assert summary["logps"]["ref_chosen_logp"] is None and summary["left_out"] == []


def test_tokens_that_fail_leave_the_rest_whole(trained, tmp_path, monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise GradentError("pairs.jsonl:3: no memory")

    monkeypatch.setattr(sweep, "measure_pair_tokens", fail)
    summary = run(trained, tmp_path / "out", token_pairs=2).summary
    assert summary["tokens"] is None and summary["complete"]
    assert [(each["step"], "no memory" in each["reason"]) for each in summary["left_out"]] == [(6, True)]


def test_a_partial_record_is_judged_on_a_whole_checkpoint_and_keeps_its_failures(copied, tmp_path, monkeypatch) -> None:
    (weights,) = (copied.run / "checkpoint-2").glob("*.safetensors")
    weights.write_bytes(b"")
    real, seen = sweep.Journal.append, []

    def interrupted(self: Any, name: str, *rest: Any) -> None:
        real(self, name, *rest)
        seen.extend([name] if name == "batch" else [])
        if len(seen) > 6 + (6 if (copied.run / "checkpoint-4" / "config.json").is_file() else 0):
            raise KeyboardInterrupt

    monkeypatch.setattr(sweep.Journal, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(copied, tmp_path / "out", attribution=True)
    summary = read_summary(tmp_path / "out" / "summary.json")
    assert not summary["complete"]
    assert [each["step"] for each in summary["left_out"]] == [2]
    assert summary["checkpoints"][-1]["step"] == 6 and summary["checkpoints"][-1]["pairs"] < ROWS
    assert summary["model"]["step"] == 4
    assert {row["pairs"] for row in summary["what_if"] if row["reason"] is None} == {ROWS}


def test_pictures_of_an_earlier_audit_do_not_stay(trained, tmp_path) -> None:
    (tmp_path / "out" / "figures").mkdir(parents=True)
    (tmp_path / "out" / "figures" / "logps.png").touch()
    run(trained, tmp_path / "out", checkpoints="last")
    assert list((tmp_path / "out" / "figures").iterdir()) == []


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("run/checkpoint-7", {}, "named like a checkpoint"),
        ("demo", {}, "holds the records of `gradent demo`"),
        ("out", {"wandb": " "}, "wandb is an empty name"),
    ],
)
def test_refused_before_anything_is_measured(out, options, message, copied, tmp_path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "demo.json").write_text("{}")
    with pytest.raises(InputError, match=message):
        run(copied, tmp_path / out, **options)
