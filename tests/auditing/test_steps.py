"""An audit's steps against float64 autograd: one on the whole sample, and the run's own between two checkpoints."""

from __future__ import annotations

import itertools
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradent import PairBatch, PairGram, audit, losses, verdict
from gradent.auditing.api import AuditResult
from gradent.auditing.measuring import steps, sweep
from gradent.errors import ModelError
from gradent.model.parameters import trainable
from gradent.record import STEP_COLUMNS, read_pairs, read_sample, read_steps
from tests.auditing.trained import Trained, train_run, word_pairs

ROWS = 10
LOSS = losses.get("dpo", beta=0.3)
SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module", params=["full", "adapter"])
def trained(request, tmp_path_factory) -> Trained:
    return train_run(tmp_path_factory.mktemp(request.param), lora=request.param == "adapter", data_rows=ROWS)


def run(trained: Trained, out: Path, **options: Any) -> AuditResult:
    settings = {"base": trained.base, "loss": LOSS, "report": False, "quiet": True, "batch_size": 3, **options}
    return audit(trained.run, trained.pairs, out=out, **settings)


@pytest.fixture(scope="module")
def audited(trained, tmp_path_factory) -> AuditResult:
    """The run's audit at the settings of `run`, for all that only read it."""
    return run(trained, tmp_path_factory.mktemp("audited"))


def is_adapter(trained: Trained) -> bool:
    return (trained.run / "checkpoint-2" / "adapter_config.json").is_file()


@cache
def references(base: Path) -> tuple[PairBatch, torch.Tensor]:
    """The sample, and the reference's log-probs of its rows `[2P]`."""
    model, batch, refs = AutoModelForCausalLM.from_pretrained(base).double().eval(), made_batch(base), []
    with torch.no_grad():
        for row in range(2 * ROWS):
            ids, marks = batch.row(row)
            logits = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            refs.append((logits.gather(-1, ids[1:, None])[:, 0] * marks[1:]).sum())
    return batch, torch.stack(refs)


@cache
def by_hand(run_: Path, base: Path, step: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], list[str]]:
    """Every row's gradient `[2P, n]`, log-probs `[2P]`, parameters by name and the name of each element; float64."""
    place = run_ / f"checkpoint-{step}" if step else base
    if (place / "adapter_config.json").is_file():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place, is_trainable=True)
    else:
        model = AutoModelForCausalLM.from_pretrained(place)
    model = model.double().eval()
    batch = made_batch(base)
    parameters = trainable(model)
    grads, logps = [], []
    for row in range(len(batch.input_ids)):
        ids, marks = batch.row(row)
        logits = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        logp = (logits.gather(-1, ids[1:, None])[:, 0] * marks[1:]).sum()
        parts = torch.autograd.grad(logp, list(parameters.values()), allow_unused=True)
        dense = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), parts, strict=True)]
        grads.append(torch.cat([part.flatten() for part in dense]))
        logps.append(logp.detach())
    names = [name for name, part in parameters.items() for _ in range(part.numel())]
    return torch.stack(grads), torch.stack(logps), {name: p.detach() for name, p in parameters.items()}, names


def made_batch(base: Path) -> PairBatch:
    rows = word_pairs(ROWS)
    texts = [[row[key] for row in rows] for key in ("prompt", "chosen", "rejected")]
    return PairBatch.from_text(AutoTokenizer.from_pretrained(base), *texts, max_length=64, add_eos=True)


def weights(trained: Trained, grads: torch.Tensor, logps: torch.Tensor, loss: losses.Loss = LOSS) -> torch.Tensor:
    """`∂L/∂log π` of every row in the mean loss, `[2P]`."""
    batch, refs = references(trained.base)
    gram = PairGram(
        chosen_sq=grads[:ROWS].square().sum(1), rejected_sq=grads[ROWS:].square().sum(1),
        inner=(grads[:ROWS] * grads[ROWS:]).sum(1), chosen_logp=logps[:ROWS], rejected_logp=logps[ROWS:],
        chosen_len=batch.chosen_len, rejected_len=batch.rejected_len,
    )  # fmt: skip
    judged = verdict(gram, loss, refs[:ROWS], refs[ROWS:])
    return torch.cat([-judged.d_w, judged.d_l]) / ROWS


def test_a_step_on_the_sample_is_split_as_autograd_says(trained, audited) -> None:
    assert audited.steps_path is not None
    table = read_steps(audited.steps_path)
    assert table.column_names == [*STEP_COLUMNS]
    columns = table.to_pydict()
    found = sorted(set(columns["step"]))
    assert found == ([2, 4, 6] if is_adapter(trained) else [0, 2, 4, 6])
    for step in found:
        grads, logps, _, _ = by_hand(trained.run, trained.base, step)
        c, gram = weights(trained, grads, logps), grads @ grads.T
        pushes = -gram * c
        half = torch.arange(2 * ROWS).roll(ROWS)
        own, partner = pushes.diagonal(), pushes[torch.arange(2 * ROWS), half]
        truth = {"own": own, "partner": partner, "others": pushes.sum(1) - own - partner}
        scale = float((gram.diagonal().sqrt().outer(gram.diagonal().sqrt()) * c.abs()).sum(1).max())
        rows = [place for place, value in enumerate(columns["step"]) if value == step]
        for part, values in truth.items():
            for side, expected in zip(SIDES, values.view(2, -1), strict=True):
                got = torch.tensor([columns[f"{side}_{part}"][row] for row in rows])
                assert float((got - expected).abs().max()) <= 1e-5 * scale, (step, part, side)
        (described,) = [row for row in audited.summary["steps"]["sample"] if row["step"] == step]
        moved = pushes.sum(1).view(2, -1)
        assert described["cases"]["ideal"] == pytest.approx(float(((moved[0] > 0) & (moved[1] < 0)).double().mean()))
        alone = torch.stack([own[:ROWS] + partner[:ROWS], own[ROWS:] + partner[ROWS:]])
        assert described["chosen_differs"] == pytest.approx(float((moved[0] * alone[0] < 0).double().mean()))


def test_the_step_between_checkpoints_is_taken_apart_by_module(trained, audited) -> None:
    columns = read_steps(audited.steps_path).to_pydict()
    intervals = audited.summary["steps"]["intervals"]
    found = sorted(set(columns["step"]))
    assert [(interval["from"], interval["to"]) for interval in intervals] == list(itertools.pairwise(found))
    assert all(
        columns["chosen_arrived"][place] is None for place, step in enumerate(columns["step"]) if step == found[0]
    )
    for interval in intervals:
        ends = [by_hand(trained.run, trained.base, interval[name]) for name in ("from", "to")]
        step = torch.cat([(ends[1][2][name] - part).flatten() for name, part in ends[0][2].items()])
        along = (ends[0][0] + ends[1][0]) / 2 @ step
        real = ends[1][1] - ends[0][1]
        scale = float(ends[0][0].norm(dim=1).max() * step.norm())
        foretold = -(ends[0][0] @ (ends[0][0].T @ weights(trained, ends[0][0], ends[0][1]))).view(2, -1)
        agree = (foretold.sign() == real.view(2, -1).sign()).double().mean(1)
        assert [interval[f"{side}_sample_sign"] for side in SIDES] == pytest.approx(agree.tolist())
        rows = [place for place, value in enumerate(columns["step"]) if value == interval["to"]]
        for place, side in enumerate(SIDES):
            got = torch.tensor([columns[f"{side}_arrived"][row] for row in rows])
            assert float((got - along.view(2, -1)[place]).abs().max()) <= 1e-5 * scale
            assert interval[f"{side}_realised"] == pytest.approx(float(real.view(2, -1)[place].mean()), abs=1e-4)
            assert interval[f"{side}_first_order"] == pytest.approx(
                sum(part[place] for part in interval["modules"].values()), abs=1e-5 * scale
            )
        assert interval["explained"] == pytest.approx(
            1 - float((real - along).square().sum() / real.square().sum()), abs=1e-3
        )
        assert interval["explained"] > 0.9  # two steps lie between
        module, parts = next(iter(interval["modules"].items()))
        mine = torch.tensor([name.startswith(f"{module}.") for name in ends[0][3]])
        expected = ((ends[0][0] + ends[1][0]) / 2)[:, mine] @ step[mine]
        assert parts == pytest.approx(expected.view(2, -1).mean(1).tolist(), abs=1e-5 * scale)


@pytest.mark.parametrize("budget", [None, "40KiB"])
def test_other_losses_are_judged_by_a_step_on_the_sample(trained, audited, tmp_path, budget) -> None:
    result = audited if budget is None else run(trained, tmp_path, memory_budget=budget)
    grads, logps, _, _ = by_hand(trained.run, trained.base, 6)
    kept = result.summary["steps"]["what_if"]
    is_exact = grads.shape[1] * 4 * 2 * ROWS <= (256 * 2**20 if budget is None else 40 * 1024)
    assert kept["is_exact"] is is_exact
    assert is_exact or not is_adapter(trained)
    assert kept["error"] == 0 if is_exact else 0 < kept["error"] < 0.3
    for row in result.summary["what_if"]:
        if row["group"] not in {"run", "paper"}:
            continue
        settings = dict(row["hyperparameters"].items())
        c = weights(trained, grads, logps, losses.get(row["loss"], **settings))
        moved = -(grads @ (grads.T @ c)).view(2, -1)
        ideal = float(((moved[0] > 0) & (moved[1] < 0)).double().mean())
        assert row["sample"]["cases"]["ideal"] == pytest.approx(ideal, abs=1e-9 if is_exact else 0.35), row["label"]
    if is_exact:
        check_pushed(result, grads, weights(trained, grads, logps))
    recommendation = result.summary["recommendation"]
    assert recommendation["step"] == "sample"
    assert "a step on the whole sample" in recommendation["text"]
    run_row = next(row for row in result.summary["what_if"] if row["group"] == "run")
    assert recommendation["run_ideal"] == run_row["sample"]["cases"]["ideal"]
    assert recommendation["alone_ideal"] == run_row["cases"]["ideal"]


def check_pushed(result: AuditResult, grads: torch.Tensor, c: torch.Tensor) -> None:
    """Who moves whom, against the Gram matrix."""
    pushes = -(grads @ grads.T) * c
    place = {row["pair"]: number for number, row in enumerate(read_sample(result.sample_path).to_pylist())}
    rows = result.summary["steps"]["pushed"]
    assert len(rows) == 12 and len(rows[0]["by"]) == 3
    for row in rows:
        at, half = place[row["pair"]], ROWS if row["side"] == "rejected" else 0
        mine = pushes[half + at].clone()
        mine[[at, at + ROWS]] = 0
        assert row["others"] == pytest.approx(float(mine.sum()), rel=1e-3, abs=1e-5)
        for rank, by in enumerate(row["by"]):
            number = place[by["pair"]] + (ROWS if by["side"] == "rejected" else 0)
            assert by["moved"] == pytest.approx(float(mine[number]), rel=1e-3, abs=1e-6)
            assert abs(by["moved"]) == pytest.approx(float(mine.abs().sort().values[-1 - rank]), rel=1e-3, abs=1e-6)
    sizes = [abs(row["others"]) for row in rows]
    assert sizes == sorted(sizes, reverse=True)


def test_a_sketch_is_exact_of_own_and_partner(trained, tmp_path) -> None:
    """What others do is estimated; a row's own part and its partner's are known."""
    result = run(trained, tmp_path, memory_budget="40KiB", checkpoints="last", max_pairs=1)
    row = next(row for row in result.summary["what_if"] if row["group"] == "run")
    assert row["sample"]["cases"] == pytest.approx(
        dict(row["cases"].items())
    )  # one pair: a step on the sample is one on the pair
    assert result.summary["steps"]["pushed"] == []  # there is nobody else
    assert set(read_steps(result.steps_path).to_pydict()["chosen_others"]) == {0.0}


def test_a_pair_that_its_loss_does_not_move_is_not_said_to_go_the_other_way(trained, tmp_path) -> None:
    pairs = read_pairs(run(trained, tmp_path, checkpoints="last").pairs_path).to_pydict()
    margins = np.array(pairs["chosen_logp"]) - np.array(pairs["rejected_logp"])
    hinge = losses.get("slic", delta=float(np.median(margins)), lam=0.0)
    result = run(trained, tmp_path, loss=hinge, checkpoints="last")
    cases = next(row for row in result.summary["what_if"] if row["group"] == "run")["cases"]
    assert 0 < cases["inactive"] < 1
    columns = read_steps(result.steps_path).to_pydict()
    count = 0
    for own, partner, others in zip(*(columns[f"chosen_{part}"] for part in ("own", "partner", "others")), strict=True):
        count += (own + partner) * (own + partner + others) < 0
    (described,) = result.summary["steps"]["sample"]
    assert described["chosen_differs"] == pytest.approx(count / ROWS)


def test_arrays_that_have_gone_are_measured_anew(trained, tmp_path) -> None:
    first = run(trained, tmp_path, checkpoints="last")
    arrays = sorted((tmp_path / "journal").glob("*.npy"))
    before = arrays[1].read_bytes()
    arrays[1].unlink()
    second = run(trained, tmp_path, checkpoints="last")
    assert arrays[1].read_bytes() == before
    assert {**first.summary, "seconds": 0} == {**second.summary, "seconds": 0}


def test_nothing_is_measured_twice_and_without_attribution_nothing_is_said(
    trained, audited, tmp_path, monkeypatch
) -> None:
    shutil.copytree(audited.summary_path.parent, tmp_path, dirs_exist_ok=True)
    opened = []
    monkeypatch.setattr(sweep, "open_model", lambda *args, **options: opened.append(args) or pytest.fail("opened"))
    second = run(trained, tmp_path)
    assert not opened
    assert {**audited.summary, "seconds": 0} == {**second.summary, "seconds": 0}
    without = run(trained, tmp_path, attribution=False)
    assert without.summary["steps"] is None
    assert without.steps_path is None
    assert not (tmp_path / "steps.parquet").exists()
    assert without.summary["recommendation"]["step"] == "pair"
    assert without.summary["settings"]["attribution"] is False


def test_a_checkpoint_whose_steps_fail_is_told_of_and_the_rest_stays(trained, tmp_path, monkeypatch) -> None:
    whole = steps.measure_along

    def failing(model: Any, *args: Any, **options: Any) -> Any:
        if not hasattr(failing, "seen"):
            failing.seen = True
            raise ModelError("no step today")
        return whole(model, *args, **options)

    monkeypatch.setattr(sweep, "measure_along", failing)
    result = run(trained, tmp_path)
    (left,) = result.summary["left_out"]
    assert left["reason"] == "Its steps alone: no step today"
    found = sorted(set(read_steps(result.steps_path).to_pydict()["step"]))
    assert found == ([4, 6] if is_adapter(trained) else [2, 4, 6])
    json.dumps(result.summary, allow_nan=False)
    assert np.isfinite(result.summary["steps"]["intervals"][-1]["explained"])


@pytest.mark.parametrize("name", ["measure_along", "measure_vectors"])
def test_stopped_amid_the_steps_and_gone_on_the_records_are_those_of_one_run(
    trained, tmp_path, monkeypatch, name
) -> None:
    whole = run(trained, tmp_path / "whole")
    measuring = getattr(steps, name)

    def stopped(*args: Any, **options: Any) -> Any:
        for number, found in enumerate(measuring(*args, **options)):
            if number == 2:
                raise KeyboardInterrupt
            yield found

    with monkeypatch.context() as patch:
        patch.setattr(sweep, name, stopped)
        with pytest.raises(KeyboardInterrupt):
            run(trained, tmp_path / "stopped")
    partial = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert partial["complete"] is False
    found = run(trained, tmp_path / "stopped")
    assert {**found.summary, "seconds": 0} == {**whole.summary, "seconds": 0}
    assert found.steps_path.read_bytes() == whole.steps_path.read_bytes()
