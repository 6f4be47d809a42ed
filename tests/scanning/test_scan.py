"""`scan` from end to end: its rows hold what `proxies`, `measure` and `verdict` say of the same pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from gradent import PairBatch, losses, measure, proxies, scan, verdict
from gradent.cli.app import app
from gradent.errors import DataFileError, InputError, NonFiniteError
from gradent.measurement import measure_rows, sequence_logps
from gradent.record.scans import SCAN_COLUMNS, read_scan, read_scan_record
from gradent.report import write_report
from gradent.scanning.api import ScanResult
from gradent.scanning.batches import scan_batches
from tests.auditing.made import FORMATS, KINDS, PAIRS, save_lora, tokenized, write_jsonl

ROWS = [
    {"prompt": f"{row['prompt']} {number}", "chosen": row["chosen"], "rejected": row["rejected"]}
    for number in range(2)
    for row in PAIRS
]


def run(model: Path, rows: list[Any] = ROWS, **options: Any) -> ScanResult:
    data = write_jsonl(model.parent / "pairs.jsonl", rows)
    return scan(model, data, **{"out": model.parent / "out", "quiet": True, "report": False, "exact": 4, **options})


def columns_of(result: ScanResult) -> dict[str, Any]:
    table = read_scan(result.scan_path)
    return {name: np.array(table[name].to_pylist()) for name in table.column_names}


def by_hand(model: Path, rows: list[Any] = ROWS) -> tuple[Any, PairBatch]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    batch = PairBatch.from_text(
        tokenizer, *([row[key] for row in rows] for key in ("prompt", "chosen", "rejected")), max_length=128,
        add_eos=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(model).eval(), batch


def assert_close(found: Any, true: torch.Tensor, rtol: float = 2e-5) -> None:
    torch.testing.assert_close(torch.tensor(np.array(found, dtype=float)), true.double(), rtol=rtol, atol=1e-6)


def test_every_pair_has_its_stand_ins_and_the_sample_its_exact_values(local_model):
    result = run(local_model, exact=None)
    columns, (model, batch) = columns_of(result), by_hand(local_model)
    assert list(columns) == [*SCAN_COLUMNS]
    assert columns["pair"].tolist() == [*range(len(ROWS))]
    found = proxies.measure_proxies(model, batch)
    for name in ("ches", "ches_normalized", "chosen_logp", "rejected_logp", "chosen_len"):
        assert_close(columns[name], getattr(found, name))
    assert_close(columns["head_inner"], found.head.inner)
    assert_close(columns["head_cosine"], found.head.cosine)
    loss, gram = losses.get("dpo"), measure(model, batch)
    reference = (gram.chosen_logp, gram.rejected_logp)
    assert_close(columns["head_change"], verdict(found.head, loss, *reference).chosen_change)
    true = verdict(gram, loss, *reference)
    for name, value in {"inner": gram.inner, "cosine": gram.cosine, "chosen_change": true.chosen_change}.items():
        assert_close(columns[name], value)
    # A step on the mean loss, by all products of all rows.
    products = measure_rows(model, batch, "all").products
    pull = torch.cat([true.d_w, -true.d_l]) / len(batch)
    moved = products @ pull
    scale = float(moved.abs().max())
    assert_close(columns["chosen_sample_change"] / scale, moved[: len(batch)] / scale, 1e-4)
    assert_close(columns["rejected_sample_change"] / scale, moved[len(batch) :] / scale, 1e-4)
    effects = np.load(local_model.parent / "out/effects.npy")
    by_pair = (products * pull)[: len(batch)]
    assert_close(effects[0] / scale, (by_pair[:, : len(batch)] + by_pair[:, len(batch) :]) / scale, 1e-4)
    assert result.record["exact"]["is_exact"] and result.record["exact"]["error"] < 1e-4
    assert columns["reward_margin"].tolist() == [None] * len(ROWS)  # the model is its own reference


def test_the_sample_is_drawn_and_the_rest_is_null(local_model):
    columns = columns_of(run(local_model, exact=4, head=False))
    assert int(columns["is_exact"].sum()) == 4
    for name in ("cosine", "chosen_change", "chosen_sample_change"):
        assert [value is not None for value in columns[name]] == columns["is_exact"].tolist()
    assert columns["head_cosine"].tolist() == [None] * len(ROWS)
    nothing = run(local_model, exact=0, out=local_model.parent / "none")
    assert not columns_of(nothing)["is_exact"].any() and nothing.record["exact"] is None
    assert not (local_model.parent / "none/effects.npy").exists()


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_implicit_rewards_come_with_a_reference(kind, local_model, tmp_path):
    model, batch = by_hand(local_model)
    if kind == "adapter":
        adapter = save_lora(tmp_path / "adapter", local_model)
        result = run(local_model, adapter=adapter, out=tmp_path / "scan", loss=losses.get("dpo", beta=0.3))
        assert result.record["reference"]["kind"] == "adapter_off"
        trained = PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()
        policy = sequence_logps(trained, batch)
        with trained.disable_adapter():
            reference = sequence_logps(trained, batch)
    else:
        other = tmp_path / "other"
        with torch.no_grad():
            policy = sequence_logps(model, batch)
            model.lm_head.weight.mul_(0.5)
            model.save_pretrained(other)
            AutoTokenizer.from_pretrained(local_model).save_pretrained(other)
        reference = sequence_logps(model, batch)
        result = run(local_model, reference=other, out=tmp_path / "scan", loss=losses.get("dpo", beta=0.3))
    columns = columns_of(result)
    chosen, rejected = (0.3 * (side - ref) for side, ref in zip(policy, reference, strict=True))
    assert_close(columns["chosen_reward"], chosen, 1e-3)
    assert_close(columns["reward_margin"], chosen - rejected, 1e-3)
    assert_close(columns["d_w"], 0.3 * torch.sigmoid(rejected - chosen), 1e-4)
    assert result.record["costs"]["reference"] > 0


def test_an_untrained_adapter_has_no_implicit_rewards(local_model, tmp_path):
    adapter = save_lora(tmp_path / "adapter", local_model, init_lora_weights=True)  # its second factor is zero
    columns = columns_of(run(local_model, adapter=adapter, out=tmp_path / "scan"))
    assert columns["reward_margin"].tolist() == [None] * len(ROWS)  # and not rounding, which would rank pairs too
    assert None not in columns["ref_chosen_logp"].tolist()


def test_the_grades_are_rank_correlations_turned_so_that_more_is_worse(local_model):
    result = run(local_model, exact=None, report=True)
    columns, grades = columns_of(result), {row["rung"]: row for row in result.record["grades"]}

    def rho(x, y):
        return pytest.approx(pandas.Series(x).rank().corr(pandas.Series(y).rank()))

    cosine, change = columns["cosine"].astype(float), columns["chosen_change"].astype(float)
    ches, head = columns["ches"].astype(float), columns["head_cosine"].astype(float)
    edit = columns["edit_distance"] / np.maximum(columns["chosen_len"], columns["rejected_len"])
    assert grades["ches"]["cosine"]["spearman"] == rho(ches, cosine)
    assert grades["ches"]["pair_change"]["spearman"] == rho(ches, -change)
    assert grades["head"]["cosine"]["spearman"] == rho(head, cosine)
    assert grades["edit_distance"]["cosine"]["spearman"] == rho(-edit, cosine)
    assert grades["exact"]["cosine"]["spearman"] is None  # it is that itself
    for row in grades.values():
        for goal in ("cosine", "pair_change", "sample_change"):
            grade = row[goal]
            assert grade["spearman"] is None or grade["low"] <= grade["spearman"] <= grade["high"]
    page = (local_model.parent / "out/report.html").read_text()
    assert "CHES, length-normalised" in page and "http" not in page.split("<body")[1].split("<script")[0]
    (again,) = write_report(local_model.parent / "out")
    assert again.read_text() == page


def test_what_is_there_is_not_done_again(local_model, monkeypatch):
    first = run(local_model)
    done: list[int] = []

    def counted(model, pairs, batches, **options):
        done.extend(range(len(batches)))
        return scan_batches(model, pairs, batches, **options)

    monkeypatch.setattr("gradent.scanning.stages.scan_batches", counted)
    before = first.scan_path.read_bytes()
    assert run(local_model).scan_path.read_bytes() == before and done == []
    more = run(local_model, exact=6)  # another sample: the scan itself stands
    assert done == [] and int(columns_of(more)["is_exact"].sum()) == 6
    assert columns_of(more)["d_w"][0] == pytest.approx(0.05)  # DPO's β σ(0)
    other = run(local_model, loss="ipo")
    assert done == [] and columns_of(other)["d_w"][0] == pytest.approx(10.0)  # IPO's 1/β
    run(local_model, rows=ROWS[:-1])
    assert done


@pytest.mark.parametrize("name", ["messages", "implicit prompt", "strings that end in EOS"])
def test_trls_formats(name, local_model):
    rows = FORMATS[name]
    assert run(local_model, rows, exact=0).record["data"]["scanned"] == len(rows)


@pytest.mark.parametrize("kind", ["pairs.parquet", "pairs.json", "saved"])
def test_files_of_every_kind_give_the_same_rows(kind, local_model, tmp_path):
    KINDS[kind](tmp_path / kind, ROWS)
    found = scan(local_model, tmp_path / kind, out=tmp_path / "scan", exact=0, quiet=True, report=False)
    plain = run(local_model, exact=0)
    assert found.record["data"]["digest"] == plain.record["data"]["digest"]
    assert columns_of(found)["ches"].tolist() == columns_of(plain)["ches"].tolist()


def test_bad_rows_stop_it_or_are_listed(local_model, monkeypatch):
    monkeypatch.setattr("gradent.scanning.material.PART", 3)  # a whole part may be bad
    rows = [*ROWS[:4], "{not json", {"prompt": "x", "chosen": "y"}, "{", *ROWS[4:]]
    with pytest.raises(DataFileError, match=r"pairs.jsonl:5: not valid JSON(.|\n)*2 other rows"):
        run(local_model, rows)
    result = run(local_model, rows, skip_bad_rows=True, exact=0)
    assert [bad["row"] for bad in result.record["data"]["skipped"]] == [4, 5, 6]
    assert columns_of(result)["pair"].tolist() == [0, 1, 2, 3, *range(7, len(rows))]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"exact": -1}, "exact is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"loss": "pairwise_normalized"}, "Scan with the loss under it"),
        ({"loss": 3}, "loss is a int"),
        ({"quantize": "nf4"}, "is a full model, and quantize='nf4' is for the base under an adapter"),
        ({"quantize": "nf5"}, "nf5"),
    ],
)
def test_refusals(options, said, local_model):
    with pytest.raises(InputError, match=said):
        run(local_model, **options)


def test_a_loss_without_a_reference(local_model):
    columns, (model, batch) = columns_of(run(local_model, loss="simpo", exact=None)), by_hand(local_model)
    gram = measure(model, batch)
    true = verdict(gram, losses.get("simpo"))
    assert_close(columns["chosen_change"], true.chosen_change)
    assert_close(columns["d_l"], true.d_l)


def test_the_command(local_model):
    data = write_jsonl(local_model.parent / "pairs.jsonl", ROWS)
    out = local_model.parent / "out"
    arguments = ["scan", str(local_model), "--data", str(data), "--out", str(out), "--exact", "all", "--beta", "0.2"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "14 of them measured exactly" in done.output and "ches_normalized" in done.output
    assert read_scan_record(out / "scan.json")["loss"]["beta"] == 0.2 and (out / "report.html").is_file()


def test_another_commands_directory_is_refused(local_model):
    out = local_model.parent / "out"
    out.mkdir()
    (out / "summary.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds summary\.json"):
        run(local_model)


def test_a_nan_names_its_row(local_model):
    model = AutoModelForCausalLM.from_pretrained(local_model)
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    pairs = [tokenized(row, [3, 4], [5 + row], [9]) for row in range(2)]
    blocks = scan_batches(model, pairs, [[0, 1]], head=True, adapter_off=False, memory_budget=None)
    with pytest.raises(NonFiniteError, match=r"pairs\.jsonl:1"):
        list(blocks)


def test_the_record_says_how_it_was_made(local_model):
    result = run(local_model)
    record = read_scan_record(result.record_path)
    assert record["settings"]["exact"] == 4 and record["settings"]["max_length"] == 128
    assert record["model"]["trainable_parameters"] == record["model"]["parameters"] > 0
    assert record["loss"] == {"name": "dpo", "beta": 0.1}
    assert set(record["costs"]) == {"text", "forward", "ches", "head", "reference", "exact", "sample"}
    assert json.loads(result.record_path.read_text())["data"]["scanned"] == len(ROWS)
