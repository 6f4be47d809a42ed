"""What reaches the logs and those who write them: names, values, and nothing where nothing belongs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from transformers import PreTrainedTokenizerFast, TrainerCallback

from gradent import EntanglementCallback
from gradent.model.layer_names import layer_of
from gradent.record import MOVED_SOURCES
from tests.batches import ragged
from tests.trainer.runs import llama, make_trainer, preferences, with_lora
from tests.trainer.wandb_file import history, summary

NAMES = {
    "gradent/inner", "gradent/cosine", "gradent/chosen_norm", "gradent/rejected_norm", "gradent/case/ideal",
    "gradent/case/both_down", "gradent/case/both_up", "gradent/case/reversed", "gradent/weight_ratio",
    "gradent/band/low", "gradent/band/high",
    "gradent/chosen_change", "gradent/rejected_change", "gradent/inactive", "gradent/coverage", "gradent/overhead_s",
}  # fmt: skip
MOVED = {f"gradent/moved/{side}/{source}" for side in ("chosen", "rejected") for source in MOVED_SOURCES}
MOVED |= {f"gradent/moved/{side}/{name}" for side in ("chosen", "rejected") for name in ("others", "total")}
SHOWN = {
    "gradent/moved/chosen/total", "gradent/moved/rejected/total", "gradent/moved/chosen/partner",
    "gradent/moved/chosen/others", "gradent/moved/chosen/momentum", "gradent/case/both_down", "gradent/cosine",
}  # fmt: skip
BESIDE_FIGURES = {"gradent/moved/chosen/total", "gradent/case/both_down", "gradent/cosine"}
REALISED = {"gradent/chosen_realised", "gradent/rejected_realised"}
EXPLAINED = {"gradent/explained"}
PROBE = {
    f"gradent/probe/{name}"
    for name in ("inner cosine chosen_norm rejected_norm chosen_logp rejected_logp case/ideal case/both_down "
                 "case/both_up case/reversed").split()
}  # fmt: skip
LAYERS = {"model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"}
LORA_LAYERS = {"model.layers.0", "model.layers.1"}


def names_in(logs: dict[str, Any]) -> set[str]:
    return {key for key in logs if key.startswith("gradent/")}


class Logger(TrainerCallback):
    """Stands where TensorBoard, trackio and the like stand: what it was given to write."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, Any]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append((state.global_step, dict(logs)))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_names(lora: bool, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def names(**options: Any) -> set[str]:
        model = with_lora(llama()) if lora else llama()
        trainer = make_trainer("dpo", model, tiny_tokenizer, tmp_path, [EntanglementCallback(every=1, **options)])
        trainer.train()
        found = [names_in(logs) for logs in trainer.state.log_history]
        assert found[0] == found[1] and found[2] == set()
        return found[0]

    assert names() == NAMES | MOVED
    assert names(attribution=False) == NAMES
    assert names(attribution=False, realised=True) == NAMES | REALISED
    layers = {f"gradent/layer/{layer}/cosine" for layer in (LORA_LAYERS if lora else LAYERS)}
    everything = names(realised=True, probe_data=preferences(2), probe_every=1, by_module=True)
    assert everything == NAMES | MOVED | REALISED | EXPLAINED | PROBE | layers


def test_the_error_of_sketches(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    callback = EntanglementCallback(every=1, memory_budget=2**19)
    trainer = make_trainer(
        "dpo", llama(), tiny_tokenizer, tmp_path, [callback], max_steps=4, logging_steps=2,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    assert names_in(trainer.state.log_history[0]) == NAMES | MOVED | {"gradent/sketch_error"}
    accounts = [record.attribution for record in callback.records]
    assert all(account.is_whole and not account.pushes.isnan().any() for account in accounts)
    squares = [account.sketch_error**2 for account in accounts[:2]]
    assert trainer.state.log_history[0]["gradent/sketch_error"] == pytest.approx((sum(squares) / 2) ** 0.5)
    assert max(squares) ** 0.5 <= 0.03


def test_loggers_that_stand_before_it_see_it_all(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    loggers, callback = [Logger(), Logger()], EntanglementCallback(every=2, detail=True)
    trainer = make_trainer("dpo", llama(), tiny_tokenizer, tmp_path, [loggers[0], callback, loggers[1]], max_steps=4)
    trainer.train()
    for logger in loggers:
        assert [(step, names_in(logs) == NAMES | MOVED) for step, logs in logger.seen if "loss" in logs] == [
            (1, True), (2, True), (3, False), (4, True),
        ]  # fmt: skip
        kept = [{k: v for k, v in logs.items() if k not in ("step",)} for logs in trainer.state.log_history]
        assert [logs for _, logs in logger.seen] == kept


def test_loggers_see_eight_scalars_at_most(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    logger, callback = Logger(), EntanglementCallback(every=1)
    trainer = make_trainer("dpo", llama(), tiny_tokenizer, tmp_path, [logger, callback], max_steps=2)
    trainer.train()
    for (_, seen), kept in zip(logger.seen[:2], trainer.state.log_history, strict=False):
        reversed_pairs = {"gradent/case/reversed"} if kept["gradent/case/reversed"] else set()
        assert SHOWN <= names_in(seen) <= SHOWN | reversed_pairs and len(SHOWN) <= 8
        assert names_in(kept) == NAMES | MOVED, "log_history keeps all"
        assert {name: seen[name] for name in SHOWN} == {name: kept[name] for name in SHOWN}
        assert all(type(name) is str for name in kept)
        for side in ("chosen", "rejected"):
            parts = {source: kept[f"gradent/moved/{side}/{source}"] for source in MOVED_SOURCES}
            assert kept[f"gradent/moved/{side}/total"] == pytest.approx(sum(parts.values()))
            others = parts["others_chosen"] + parts["others_rejected"] + parts["earlier_batches"]
            assert kept[f"gradent/moved/{side}/others"] == pytest.approx(others)


def test_added_after_the_trainer_was_made(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    logger = Logger()
    trainer = make_trainer("dpo", llama(), tiny_tokenizer, tmp_path, [logger])
    trainer.add_callback(EntanglementCallback(every=1, detail=True))
    trainer.train()
    assert [names_in(logs) for _, logs in logger.seen] == [NAMES | MOVED, NAMES | MOVED, set()]


def test_values_are_means_over_the_window(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    callback = EntanglementCallback(every=1, realised=True, by_module=True)
    trainer = make_trainer(
        "dpo", llama(), tiny_tokenizer, tmp_path, [callback], max_steps=4, logging_steps=2, learning_rate=0.5
    )
    trainer.train()
    logs, records = trainer.state.log_history[0], list(callback.records)[:2]
    assert logs["step"] == 2

    def mean(read: Any) -> float:
        return pytest.approx(float(torch.cat([read(record) for record in records]).mean()), rel=1e-9)

    assert logs["gradent/inner"] == mean(lambda r: r.gram.inner)
    assert logs["gradent/cosine"] == mean(lambda r: r.gram.inner / (r.gram.chosen_sq * r.gram.rejected_sq).sqrt())
    assert logs["gradent/chosen_norm"] == mean(lambda r: r.gram.chosen_sq.sqrt())
    assert logs["gradent/rejected_norm"] == mean(lambda r: r.gram.rejected_sq.sqrt())
    assert logs["gradent/weight_ratio"] == mean(lambda r: r.verdict.d_w / r.verdict.d_l)
    entries = [
        torch.cat([getattr(record.gram, name) for record in records]) for name in ("chosen_sq", "rejected_sq", "inner")
    ]
    chosen_sq, rejected_sq, inner = (each[entries[2] > 0] for each in entries)
    assert len(inner) and logs["gradent/band/low"] == pytest.approx(float((inner / chosen_sq).median()))
    assert logs["gradent/band/high"] == pytest.approx(float((rejected_sq / inner).median()))
    assert logs["gradent/chosen_change"] == mean(lambda r: r.verdict.chosen_change)
    assert logs["gradent/rejected_change"] == mean(lambda r: r.verdict.rejected_change)
    assert logs["gradent/chosen_realised"] == mean(lambda r: r.chosen_realised)
    assert logs["gradent/rejected_realised"] == mean(lambda r: r.rejected_realised)
    for source in MOVED_SOURCES:
        for side, half in (("chosen", slice(0, 4)), ("rejected", slice(4, 8))):
            want = mean(lambda r, source=source, half=half: r.attribution.moved[source][half])
            assert logs[f"gradent/moved/{side}/{source}"] == want
    rest = torch.cat([record.attribution.rest for record in records]).square().sum()
    realised = torch.cat([record.attribution.realised for record in records]).square().sum()
    assert logs["gradent/explained"] == pytest.approx(float(1 - rest / realised), rel=1e-9)
    assert logs["gradent/coverage"] == 1.0 and logs["gradent/inactive"] == 0.0 and logs["gradent/overhead_s"] > 0
    cases = {name: logs[f"gradent/case/{name}"] for name in ("ideal", "both_down", "both_up", "reversed")}
    for number, name in enumerate(cases, start=1):
        assert cases[name] == mean(lambda r, number=number: (r.verdict.case == number).double())
    assert sum(cases.values()) == pytest.approx(1)
    for layer in LAYERS:
        assert logs[f"gradent/layer/{layer}/cosine"] == mean(lambda r, layer=layer: cosine_of(r, layer))


def cosine_of(record: Any, layer: str) -> torch.Tensor:
    parts = [parts for name, parts in record.gram.modules.items() if layer_of(name) == layer]
    chosen_sq, rejected_sq, inner = (sum(column) for column in zip(*parts, strict=True))
    return inner / (chosen_sq * rejected_sq).sqrt()


def test_modules_are_kept_only_where_asked_for(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    callback = EntanglementCallback(every=1)
    make_trainer("dpo", llama(), tiny_tokenizer, tmp_path, [callback]).train()
    (record, _) = callback.records
    assert record.gram.modules is None and set(record.layers) == LAYERS
    sums = torch.stack([torch.stack(parts) for parts in record.layers.values()]).sum(0)
    torch.testing.assert_close(sums, torch.stack([record.gram.chosen_sq, record.gram.rejected_sq, record.gram.inner]))


@pytest.mark.parametrize("lr", [1e-6, 1e-5])
def test_realised_is_what_was_predicted(lr: float, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """One pair a step, plain SGD: the step is on that pair's own loss, so its change is `lr` times the prediction."""
    callback = EntanglementCallback(every=1, realised=True)
    make_trainer(
        "dpo", llama().double(), tiny_tokenizer, tmp_path, [callback], learning_rate=lr, per_device_train_batch_size=1,
        options={"ref_model": llama(seed=3).double()},
    ).train()  # fmt: skip
    for record in callback.records:
        predicted = torch.cat([record.verdict.chosen_change, record.verdict.rejected_change]) * lr
        realised = torch.cat([record.chosen_realised, record.rejected_realised])
        assert float((realised - predicted).abs().max()) < 0.1 * float(predicted.abs().max())


@pytest.mark.parametrize("kind", ["rows", "conversations", "batch"])
def test_probe(kind: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data: Any = ragged() if kind == "batch" else preferences(3)
    if kind == "conversations":
        data = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in data
        ]
    callback = EntanglementCallback(every=9, probe_data=data, probe_every=2, on_error="raise")
    trainer = make_trainer("dpo", llama(), tiny_tokenizer, tmp_path, [callback], max_steps=5)
    trainer.train()
    due = [logs["step"] for logs in trainer.state.log_history if names_in(logs) >= PROBE]
    assert due == [1, 2, 4]
    values = [logs["gradent/probe/inner"] for logs in trainer.state.log_history if "gradent/probe/inner" in logs]
    assert len(set(values)) == 3


def test_adam_is_accounted_for_from_its_second_step_on(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    callback = EntanglementCallback(every=1, realised=True, on_error="raise")
    trainer = make_trainer(
        "dpo", llama(), tiny_tokenizer, tmp_path, [callback], optim="adamw_torch", learning_rate=1e-4, max_steps=3
    )
    trainer.train()
    found = [names_in(logs) for logs in trainer.state.log_history]
    assert found[:3] == [NAMES | REALISED, *[NAMES | MOVED | REALISED | EXPLAINED] * 2]
    assert [record.attribution is None for record in callback.records] == [True, False, False]


def wandb_run(callback: EntanglementCallback, tokenizer: Any, folder: Path, monkeypatch: Any, **options: Any) -> Any:
    """A trainer that has trained beside an offline run of wandb; the run's file is below the folder."""
    monkeypatch.setenv("WANDB_DIR", str(folder))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer = make_trainer("dpo", llama(), tokenizer, folder / "run", [callback], report_to="wandb", **options)
    trainer.train()
    wandb.finish()
    wandb.teardown()  # waits for the service, which may still be writing the file
    return trainer


def by_step(rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The trainer's step to what was logged at it, in however many rows; no key twice."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        known = merged.setdefault(row["train/global_step"], {})
        own = {name for name in row if "gradent" in name}
        assert not own & set(known), "logged twice at one step"
        known |= row
    return merged


MEDIA = {"cases", "layers", "pairs", "pushes", "moved_chosen", "moved_rejected"}


def media_in(row: dict[str, Any]) -> set[str]:
    return {key.split("/")[1].split(".")[0] for key in row if key.startswith("gradent/") and "." in key}


def test_a_run_of_wandb(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file, key by key: one section, no key twice, eight charts and two tables."""
    trainer = wandb_run(EntanglementCallback(every=1), tiny_tokenizer, tmp_path, monkeypatch)
    rows = history(tmp_path)
    assert not [key for row in rows for key in row if key.startswith("train/gradent")]
    written = by_step(rows)
    assert sorted(written) == [1, 2]
    for kept in trainer.state.log_history[:2]:
        row = written[kept["step"]]
        assert row["train/loss"] == pytest.approx(kept["loss"])
        scalars = {key for key in row if key.startswith("gradent/") and "." not in key}
        assert scalars - {"gradent/case/reversed"} == BESIDE_FIGURES
        assert {name: row[name] for name in scalars} == {name: pytest.approx(kept[name]) for name in scalars}
        assert media_in(row) == MEDIA
        charts = {*BESIDE_FIGURES, "gradent/unseen/chosen", *(MEDIA - {"pairs", "pushes"})}
        assert 6 <= len(charts) <= 8
    verdict = summary(tmp_path)["gradent/verdict"]
    assert verdict.startswith("2 measured steps, 8 pairs: ") and "% both down" in verdict


def test_all_scalars_in_a_run_of_wandb(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = EntanglementCallback(every=1, realised=True, detail=True)
    trainer = wandb_run(callback, tiny_tokenizer, tmp_path, monkeypatch)
    for step, row in by_step(history(tmp_path)).items():
        kept = trainer.state.log_history[step - 1]
        assert {key for key in row if key.startswith("gradent/") and "." not in key} == names_in(kept)
        assert row["gradent/inner"] == pytest.approx(kept["gradent/inner"])
        assert media_in(row) == MEDIA | {"changes"}


def test_a_run_of_wandb_without_transformers_logger(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that the user began: gradent sends its scalars itself."""
    for name, value in (("WANDB_DIR", str(tmp_path)), ("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    with wandb.init(project="mine"):
        make_trainer("dpo", llama(), tiny_tokenizer, tmp_path / "run", [EntanglementCallback(every=1)]).train()
    wandb.teardown()
    written = by_step(history(tmp_path))
    assert sorted(written) == [1, 2]
    assert all(set(row) >= BESIDE_FIGURES and media_in(row) == MEDIA for row in written.values())


def test_a_run_of_tensorboard(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Its event file: the same names as everywhere, in a section of their own."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    callback = EntanglementCallback(every=1)
    trainer = make_trainer(
        "dpo", llama(), tiny_tokenizer, tmp_path / "run", [callback], report_to="tensorboard", max_steps=3
    )
    trainer.train()
    (path,) = tmp_path.rglob("events.out.tfevents*")
    events = reader.EventAccumulator(str(path.parent)).Reload()
    tags = events.Tags()["scalars"]
    assert {tag for tag in tags if "gradent" in tag} - {"gradent/case/reversed"} == SHOWN
    for name in SHOWN:
        values = [(event.step, event.value) for event in events.Scalars(name)]
        kept = [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in trainer.state.log_history[:3]]
        assert values == kept


def test_a_run_of_trackio(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its database, and its page in a browser: the same names as everywhere, in a section of their own."""
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from gradent import EntanglementCallback
from tests.conftest import make_tokenizer
from tests.trainer.runs import llama, make_trainer
import json
trainer = make_trainer("dpo", llama(), make_tokenizer(), Path({str(tmp_path / "run")!r}),
                       [EntanglementCallback(every=1)], report_to="trackio", max_steps=3, project="gradent-test")
trainer.train()
print("HISTORY", json.dumps(trainer.state.log_history))
import trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("gradent-test")
print("ROWS", json.dumps(SQLiteStorage.get_logs("gradent-test", run), default=str))
import contextlib, io, re
from tests.report.browser import CHROMIUM, document_at
if CHROMIUM:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        trackio.show(project="gradent-test", open_browser=False, block_thread=False)
    address = re.search("http://127[.]0[.]0[.]1:[0-9]+", said.getvalue())[0]
    print("PAGE", json.dumps(document_at(address + "/?project=gradent-test", Path({str(tmp_path / "profile")!r}))))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(
        line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("HISTORY ", "ROWS ", "PAGE "))
    )
    kept, rows = json.loads(found["HISTORY"]), json.loads(found["ROWS"])
    measured = [row for row in rows if "gradent/cosine" in row]
    assert len(measured) == 3
    for row, entry in zip(measured, kept, strict=False):
        assert {name for name in row if "gradent" in name} - {"gradent/case/reversed"} == SHOWN
        assert {name: row[name] for name in SHOWN} == {name: pytest.approx(entry[name]) for name in SHOWN}
    if "PAGE" in found:
        assert re.search(r"gradent \((7|8)\)", json.loads(found["PAGE"])), "its section of 7 charts, 8 with a reversal"


def test_the_account_in_a_run_of_wandb(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read back from the run's files: bars with a gap at Adam's first step, and who pushed whom."""
    callback = EntanglementCallback(every=1, realised=True, on_error="raise")
    wandb_run(callback, tiny_tokenizer, tmp_path, monkeypatch, optim="adamw_torch", learning_rate=1e-4, max_steps=3)
    first, *records = callback.records
    assert first.attribution is None
    last = by_step(history(tmp_path))[3]

    def content(key: str) -> Any:
        (path,) = tmp_path.rglob(Path(last[f"{key}.path"]).name)
        return json.loads(path.read_text())

    for side, half in (("chosen", slice(0, 4)), ("rejected", slice(4, 8))):
        bars = content(f"gradent/moved_{side}")["data"]
        assert [trace["name"].replace(" ", "_") for trace in bars] == list(MOVED_SOURCES)
        for trace, source in zip(bars, MOVED_SOURCES, strict=True):
            means = [float(record.attribution.moved[source][half].mean()) for record in records]
            assert trace["x"] == [1, 2, 3] and trace["y"] == [None, *(pytest.approx(mean, rel=1e-4) for mean in means)]
    changes = content("gradent/changes")
    assert changes["layout"]["title"]["text"].startswith("Account of the step and realised changes: ")
    for line, half in zip(changes["data"], (slice(0, 4), slice(4, 8)), strict=True):
        assert line["x"] == pytest.approx(torch.cat([r.attribution.total[half] for r in records]).tolist(), rel=1e-4)
        assert line["y"] == pytest.approx(torch.cat([r.attribution.realised[half] for r in records]).tolist(), rel=1e-4)
    table = content("gradent/pushes")
    assert table["columns"] == ["step", "moved", "change", "by", "push", "text", "by_text"]
    others = ~torch.eye(8, dtype=torch.bool)
    each = [record.attribution.pushes[others].abs().sort(descending=True).values[:5] for record in records]
    largest = torch.cat(each).sort(descending=True).values[:8]
    assert [abs(row[4]) for row in table["data"]] == pytest.approx(largest.tolist())


class Mine(TrainerCallback):
    """A user's own curve, with a step of the user's own."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):
            wandb.log({"mine": state.global_step**2}, step=state.global_step)


@pytest.mark.parametrize("by", ["trainer", "nobody"])
@pytest.mark.parametrize("every", [1, 2])
def test_own_steps_of_wandb_are_kept(
    every: int, by: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    if by == "nobody":
        wandb.init(project="own", dir=str(tmp_path))
    callback = EntanglementCallback(every=every)
    trainer = make_trainer(
        "dpo", llama(), tiny_tokenizer, tmp_path / "run", [callback, Mine()],
        report_to="wandb" if by == "trainer" else "none", max_steps=6,
    )  # fmt: skip
    trainer.train()
    wandb.finish()
    wandb.teardown()
    rows = history(tmp_path)
    assert [row["mine"] for row in rows if "mine" in row] == [1, 4, 9, 16, 25, 36]
    measured = {1, 2, 4, 6} if every == 2 else set(range(1, 7))
    found = [row for row in rows if "gradent/cosine" in row and any(key.startswith("gradent/cases") for key in row)]
    assert [row["train/global_step"] for row in found] == sorted(measured)


def test_no_panels_no_wandb(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A run without wandb does not import it."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
sys.modules["wandb"] = None  # an import fails from here on
import os
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import Trainer, TrainingArguments
from gradent import EntanglementCallback
from tests.trainer.test_trainers import Preferring, collate
from tests.trainer.runs import llama
callback = EntanglementCallback(every=1, on_error="raise")
args = TrainingArguments({str(tmp_path)!r}, max_steps=1, per_device_train_batch_size=2, use_cpu=True, logging_steps=1,
                         report_to="none", save_strategy="no", remove_unused_columns=False, disable_tqdm=True)
Preferring(llama(), args, train_dataset=[([5, 6], [7, 8], [9]), ([5], [9, 8], [10, 11])], data_collator=collate,
           callbacks=[callback]).train()
print(len(callback.records), sys.modules["wandb"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["1", "None"]
