"""An audit of a real run: TRL trains, saves checkpoints, and all numbers equal what `measure` says of them by hand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradent import PairBatch, audit, losses, measure, verdict
from gradent.auditing.analysis.loss_grid import label_loss
from gradent.auditing.api import AuditResult
from gradent.auditing.measuring import sweep
from gradent.auditing.rejudge import rejudge
from gradent.errors import GradentWarning, InputError, ModelError
from gradent.measurement import sequence_logps
from gradent.record import read_modules, read_pairs, read_sample, read_summary
from tests.auditing.trained import Trained, train_run, word_pairs

ROWS = 16


@pytest.fixture(scope="module", params=["full", "adapter"])
def trained(request, tmp_path_factory) -> Trained:
    return train_run(tmp_path_factory.mktemp(request.param), lora=request.param == "adapter", data_rows=ROWS)


WHOLE = {"checkpoints": [2, 4], "token_pairs": 2, "attribution": True}


def run(trained: Trained, out: Path, **options: Any) -> AuditResult:
    """An audit without the account of its steps, three quarters of the work: tests of the steps ask for it."""
    settings = {
        "base": trained.base, "report": False, "quiet": True, "batch_size": 3, "attribution": False, **options
    }  # fmt: skip
    return audit(trained.run, trained.pairs, out=out, **settings)


def kind(trained: Trained) -> str:
    return "adapter" if (trained.run / "checkpoint-2" / "adapter_config.json").is_file() else "full"


def by_hand(trained: Trained, step: int) -> torch.nn.Module:
    if step == 0:
        return AutoModelForCausalLM.from_pretrained(trained.base).eval()
    place = trained.run / f"checkpoint-{step}"
    if kind(trained) == "full":
        return AutoModelForCausalLM.from_pretrained(place).eval()
    base = AutoModelForCausalLM.from_pretrained(trained.base)
    return PeftModel.from_pretrained(base, place, is_trainable=True).eval()


def test_numbers_are_those_of_measure_on_each_checkpoint(trained, tmp_path) -> None:
    result = run(trained, tmp_path / "out", loss=losses.get("dpo", beta=0.3))
    columns = read_pairs(result.pairs_path).to_pydict()
    steps = [0, 2, 4, 6] if kind(trained) == "full" else [2, 4, 6]
    assert list(dict.fromkeys(columns["step"])) == steps
    rows = word_pairs(ROWS)
    tokenizer = AutoTokenizer.from_pretrained(trained.base)
    texts = [[row[key] for row in rows] for key in ("prompt", "chosen", "rejected")]
    batch = PairBatch.from_text(tokenizer, *texts, max_length=64, add_eos=True)
    refs = sequence_logps(by_hand(trained, 0), batch)
    for number, step in enumerate(steps):
        gram = measure(by_hand(trained, step), batch)
        judged = verdict(gram, losses.get("dpo", beta=0.3), *refs)
        part = slice(number * ROWS, (number + 1) * ROWS)
        assert columns["pair"][part] == list(range(ROWS))
        scale = (gram.chosen_sq * gram.rejected_sq).sqrt()
        inner = torch.tensor(columns["inner"][part], dtype=torch.float64)
        assert float(((inner - gram.inner) / scale).abs().max()) < 2e-6
        for name, expected in {
            "chosen_logp": gram.chosen_logp, "ref_rejected_logp": refs[1], "d_w": judged.d_w,
            "chosen_change": judged.chosen_change, "rejected_sq": gram.rejected_sq,
        }.items():  # fmt: skip
            found = torch.tensor(columns[name][part], dtype=torch.float64)
            torch.testing.assert_close(
                found, expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
        assert columns["case"][part] == judged.case.tolist()
    assert columns["inner"][:ROWS] != columns["inner"][-ROWS:]


def test_the_summary_tells_the_run(trained, tmp_path) -> None:
    result = run(trained, tmp_path / "out", attribution=True)
    summary = read_summary(result.summary_path)
    whole = kind(trained) == "full"
    assert summary["complete"] and summary["left_out"] == []
    assert summary["run"] is not None
    assert summary["run"]["kind"] == kind(trained)
    assert summary["run"]["base"] == str(trained.base)
    assert [each["step"] for each in summary["checkpoints"]] == ([0, 2, 4, 6] if whole else [2, 4, 6])
    assert all(each["pairs"] == ROWS for each in summary["checkpoints"])
    assert summary["cosine"] == summary["checkpoints"][-1]["cosine"]
    assert summary["model"]["step"] == 6
    assert summary["history"] is not None and len(summary["history"]["curves"]["logps/chosen"]) == 6
    assert summary["dynamics"] is not None and len(summary["dynamics"]["intervals"]) == (3 if whole else 2)
    groups = [row["group"] for row in summary["what_if"]]
    assert groups.count("paper") == 10 and groups.count("run") == 1 and groups.count("design") == 3
    assert summary["recommendation"] is not None and summary["recommendation"]["text"]
    assert {row["property"] for row in summary["properties"]} >= {"edit_distance", "shared_suffix", "length_ratio"}
    assert summary["reference"]["kind"] == ("model" if whole else "adapter_off")
    sample = read_sample(result.sample_path).to_pydict()
    assert [(row["prompt"], row["chosen"]) for row in word_pairs(ROWS)] == list(
        zip(sample["prompt"], sample["chosen"], strict=True)
    )
    assert set(sample["edit_distance"]) == {1}  # a word, before the words of the end and EOS
    assert sample["shared_suffix"] == [len(row["chosen"].split()) for row in word_pairs(ROWS)]
    assert result.modules_path is not None
    modules = read_modules(result.modules_path).to_pydict()
    for each in summary["checkpoints"]:
        parts = [
            part for part, step in zip(modules["cosine_part"], modules["step"], strict=True) if step == each["step"]
        ]
        assert sum(parts) == pytest.approx(each["cosine"]["mean"])


def test_going_on_measures_nothing_twice_and_another_loss_measures_nothing(trained, tmp_path, monkeypatch) -> None:
    first = run(trained, tmp_path / "out", checkpoints="last", token_pairs=2, attribution=True)
    counted: list[Any] = []
    real = sweep.open_model
    monkeypatch.setattr(
        sweep, "open_model", lambda source, *rest, **more: counted.append(source.name) or real(source, *rest, **more)
    )
    again = run(trained, tmp_path / "out", checkpoints="last", token_pairs=2, attribution=True)
    assert counted == []
    assert {**again.summary, "seconds": 0} == {**first.summary, "seconds": 0}
    other = run(trained, tmp_path / "out", checkpoints="last", loss="simpo")
    assert counted == []
    assert other.summary["loss"]["name"] == "simpo"
    run(trained, tmp_path / "out", checkpoints="last", loss="simpo", attribution=True)
    assert counted == ["checkpoint-6"]  # for the loss's step on the sample
    counted.clear()
    run(trained, tmp_path / "out", checkpoints=[4, 6], loss="simpo")
    assert counted == ["checkpoint-4"]
    counted.clear()
    run(trained, tmp_path / "out", checkpoints=[4, 6], loss="simpo", batch_size=4, attribution=True)
    assert "checkpoint-6" in counted


def test_a_checkpoint_that_was_written_anew_is_measured_anew(trained, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained.run, copy)
    moved = Trained(base=trained.base, run=copy, pairs=trained.pairs)
    before = run(moved, tmp_path / "out", checkpoints=[2])
    inner = read_pairs(before.pairs_path)["inner"].to_pylist()
    shutil.rmtree(copy / "checkpoint-2")
    shutil.copytree(copy / "checkpoint-6", copy / "checkpoint-2")
    state = copy / "checkpoint-2" / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 6', '"global_step": 2'))
    after = read_pairs(run(moved, tmp_path / "out", checkpoints=[2]).pairs_path)["inner"].to_pylist()
    assert after != inner


def test_what_cannot_be_measured_is_left_out_and_the_rest_is_there(trained, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained.run, copy)
    (weights,) = (copy / "checkpoint-4").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-40])
    result = run(Trained(base=trained.base, run=copy, pairs=trained.pairs), tmp_path / "out")
    summary = read_summary(result.summary_path)
    assert [(each["checkpoint"], each["step"]) for each in summary["left_out"]] == [("checkpoint-4", 4)]
    assert "checkpoint-4" in summary["left_out"][0]["reason"]
    assert [each["step"] for each in summary["checkpoints"]][-2:] == [2, 6]
    assert summary["complete"]


def test_a_checkpoint_with_nan_is_left_out_with_its_row(trained, tmp_path) -> None:
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    copy = tmp_path / "run"
    shutil.copytree(trained.run, copy)
    (weights,) = (copy / "checkpoint-4").glob("*.safetensors")
    tensors = load_file(weights)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})
    summary = run(Trained(base=trained.base, run=copy, pairs=trained.pairs), tmp_path / "out").summary
    assert [each["step"] for each in summary["left_out"]] == [4]
    assert [each["step"] for each in summary["checkpoints"]][-2:] == [2, 6]


def test_nothing_that_can_be_measured(trained, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(trained.run, copy)
    for weights in copy.glob("checkpoint-*/*.safetensors"):
        weights.write_bytes(b"")
    with pytest.raises(ModelError, match=r"checkpoint-6"):
        run(Trained(base=trained.base, run=copy, pairs=trained.pairs), tmp_path / "out", checkpoints=[2, 4, 6])


def test_the_base_is_found_by_itself_and_a_moved_one_is_asked_for(trained, tmp_path) -> None:
    if kind(trained) == "adapter":
        assert run(trained, tmp_path / "out", base=None, checkpoints="last").summary["run"]["base"] == str(trained.base)
        return
    copy = tmp_path / "run"
    shutil.copytree(trained.run, copy)
    for card in copy.rglob("README.md"):
        card.unlink()
    moved = Trained(base=trained.base, run=copy, pairs=trained.pairs)
    with pytest.raises(InputError, match=r"dpo needs the log-probs of a reference.*Pass it with --base"):
        run(moved, tmp_path / "out", base=None)
    summary = run(moved, tmp_path / "out", base=None, loss="simpo").summary
    assert summary["reference"] == {"kind": "none", "source": None}
    assert {row["reason"] is None for row in summary["what_if"] if row["loss"] == "dpo"} == {False}


@pytest.fixture(scope="module")
def undisturbed(trained, tmp_path_factory) -> AuditResult:
    """The audit that the stopped ones end as."""
    return run(trained, tmp_path_factory.mktemp("undisturbed"), **WHOLE)


@pytest.mark.parametrize("when", [0, 1, 4])
def test_stopped_by_ctrl_c_a_partial_record_is_left_and_the_same_call_goes_on(
    when, trained, undisturbed, tmp_path, monkeypatch
) -> None:
    real, seen = sweep.Journal.append, []

    def interrupted(journal: Any, name: str, *rest: Any) -> None:
        real(journal, name, *rest)
        seen.extend([name] if name == "batch" else [])
        if len(seen) > when:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sweep.Journal, "append", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"holds a partial record.*The same command goes on"):
            run(trained, tmp_path / "out", **WHOLE)
    partial = read_summary(tmp_path / "out" / "summary.json")
    assert not partial["complete"]
    measured = sum(each["pairs"] for each in partial["checkpoints"])
    assert measured == len(read_pairs(tmp_path / "out" / "pairs.parquet")) == min(3 * (when + 1), 2 * ROWS)
    result = run(trained, tmp_path / "out", **WHOLE)
    assert {**result.summary, "seconds": 0} == {**undisturbed.summary, "seconds": 0}
    for name in ("pairs", "modules", "tokens", "sample", "steps"):
        found, expected = (each.pairs_path.with_name(f"{name}.parquet").read_bytes() for each in (result, undisturbed))
        assert found == expected, name


def test_a_second_audit_of_one_directory_is_refused(trained, tmp_path, monkeypatch) -> None:
    refused: list[str] = []
    real = sweep.measure_batches

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        if not refused:
            with pytest.raises(InputError, match=r"another audit or scan is writing there now") as caught:
                run(trained, tmp_path / "out", checkpoints="last", loss="simpo")
            refused.append(str(caught.value))
        return real(*arguments, **options)

    monkeypatch.setattr(sweep, "measure_batches", meanwhile)
    assert run(trained, tmp_path / "out", checkpoints="last").summary["complete"]
    assert refused
    run(trained, tmp_path / "out", checkpoints="last", loss="simpo")


def test_what_was_warned_of_is_still_on_record_where_an_audit_went_on(trained, tmp_path, monkeypatch) -> None:
    import warnings  # noqa: PLC0415

    real = sweep.measure_batches

    def warn(*arguments: Any, **options: Any) -> Any:
        warnings.warn("one row at a time", GradentWarning, stacklevel=1)
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(sweep, "measure_batches", warn)
        assert run(trained, tmp_path / "out", checkpoints="last").summary["notes"].count("one row at a time") == 1
    assert run(trained, tmp_path / "out", checkpoints="last").summary["notes"].count("one row at a time") == 1


@pytest.mark.parametrize("name", ["simpo", "ipo"])
def test_one_audit_serves_every_loss(name: str, trained: Trained, tmp_path: Path) -> None:
    """What another loss says of its record is what an audit under that loss says."""
    options = {"checkpoints": "all", "token_pairs": 2}
    first = run(trained, tmp_path / "dpo", loss="dpo", **options)
    want = run(trained, tmp_path / "fresh", loss=losses.get(name), **options)
    rejudge(tmp_path / "dpo", losses.get(name), tmp_path / "again")
    got = read_summary(tmp_path / "again" / "summary.json")
    assert got["notes"][0].startswith(f"Judged again under {label_loss(losses.get(name))}, from the record of ")
    skipped = {"notes": None, "seconds": None}
    assert {**got, **skipped} == {**want.summary, **skipped}
    assert got["cases"] != first.summary["cases"] or got["loss"] != first.summary["loss"]
    again, fresh = (read_pairs(tmp_path / place / "pairs.parquet").to_pydict() for place in ("again", "fresh"))
    assert again == fresh
    assert (tmp_path / "again" / "report.html").is_file()
    rejudge(tmp_path / "dpo", "ipo", tmp_path / "trl", beta=0.3)  # of a TRL run, as TRL has it
    told = read_summary(tmp_path / "trl" / "summary.json")
    assert (told["loss"]["beta"], told["loss"]["length_normalized"]) == (0.3, True)
    assert any(note.startswith("IPO is judged as TRL has it") for note in told["notes"])
    with pytest.raises(InputError, match="is the audit's own directory"):
        rejudge(tmp_path / "dpo", losses.get(name), tmp_path / "dpo")


def test_steps_that_were_taken_by_another_loss_are_not_shown(trained: Trained, tmp_path: Path) -> None:
    run(trained, tmp_path / "dpo", **WHOLE)
    rejudge(tmp_path / "dpo", losses.get("simpo"), tmp_path / "again")
    before, after = (read_summary(tmp_path / place / "summary.json") for place in ("dpo", "again"))
    assert before["steps"]["sample"] and not after["steps"]["sample"] and not after["steps"]["pushed"]
    assert after["steps"]["what_if"] is None and not any(row["sample"] for row in after["what_if"])
    kept = [{key: value for key, value in row.items() if "sample" not in key} for row in before["steps"]["intervals"]]
    assert [{key: row[key] for key in kept[0]} for row in after["steps"]["intervals"]] == kept
    assert not (tmp_path / "again" / "steps.parquet").exists()
