"""`examples/cures.py`: a small run from end to end, the rules that it chooses by, and the committed figures."""

from __future__ import annotations

import csv
import json
import math
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from gradent.demo.model import build_model, build_tokenizer
from gradent.demo.statements import read_statements
from gradent.demo.task import make_task, tokenize_style
from gradent.trainer.pairwise.row_norms import RowNorms
from tests.pages import ROOT
from tests.processes import call

EXAMPLE = ROOT / "examples" / "cures.py"
METHODS = [
    "DPO", "RPO 0.1", "RPO", "adaptive", "CPO", "SimPO", "calibrated", "calibrated head", "pairwise", "masked"
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def on_the_path() -> Iterator[None]:
    """As `python examples/cures.py` has it."""
    sys.path.insert(0, str(EXAMPLE.parent))
    yield
    sys.path.remove(str(EXAMPLE.parent))


def example(arguments: list[str]) -> None:
    """`python -W ignore examples/cures.py ARGUMENTS`, in a process."""
    warnings.simplefilter("ignore")
    sys.argv = [str(EXAMPLE), *arguments]
    sys.path.insert(0, str(EXAMPLE.parent))
    runpy.run_path(str(EXAMPLE), run_name="__main__")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return call(example, list(map(str, arguments)), here=ROOT)


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / "data" / "cures.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cures")
    done = run("--out", out, "--small")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def tweets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statements in a file, as tweets come."""
    path = tmp_path_factory.mktemp("data") / "tweets.jsonl"
    task = make_task(seed=5, train=200, probe=40, answers=1)
    path.write_text(
        "".join(
            json.dumps({"text": one.text, "label": "positive" if one.positive else "negative"}) + "\n"
            for one in (*task.train, *task.probe)
        )
    )
    return path


def test_a_small_run_measures_every_method(small: Path) -> None:
    rows = [row for row in rows_of(small) if row["phase"] == "run"]
    for style in ("single token", "long suffix"):
        for method in METHODS:
            mine = [row for row in rows if (row["style"], row["method"]) == (style, method)]
            assert [row["step"] for row in mine] == ["0", "2", "4"]
            assert all(math.isfinite(float(row[name])) for row in mine for name in ("chosen", "cosine", "answers"))
            assert mine[0]["chosen"] != mine[-1]["chosen"], "it did not train"
            assert all(0 <= float(row[name]) <= 1 for row in mine for name in ("preferred", "label_right"))
    starts = {(row["style"], row["chosen"]) for row in rows if row["step"] == "0"}
    assert len(starts) == 2, "all methods start from one model"


def test_the_masked_trainer_s_kept_tokens_are_recorded(small: Path) -> None:
    last = [row for row in rows_of(small) if row["phase"] == "run" and row["step"] == "4"]
    for row in last:
        assert bool(row["kept_label"]) is (row["method"] == "masked")
        assert bool(row["kept_shared"]) is (row["method"] == "masked" and row["style"] == "long suffix")


def test_the_page_and_the_figure_are_of_the_records(small: Path) -> None:
    page = (small / "cures-measured.md").read_text("utf-8")
    assert "](img/cures-generated-sgd.png)" in page
    assert (small / "img" / "cures-generated-sgd.png").read_bytes().startswith(b"\x89PNG")
    runs = [row for row in rows_of(small) if row["phase"] == "run"]
    first, last = (
        next(
            float(row["chosen"]) for row in runs if (row["style"], row["method"], row["step"]) == ("long suffix", *key)
        )
        for key in (("CPO", "0"), ("CPO", "4"))
    )
    assert f"| long suffix | CPO | {last - first:+.2f} [" in page


@pytest.mark.nightly
@pytest.mark.slow
def test_one_method_alone_comes_beside_the_others(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    shutil.copytree(small, out)
    done = run("--out", out, "--small", "--methods", "adaptive")
    assert done.returncode == 0, done.stderr

    def without_times(place: Path) -> list[tuple[str, ...]]:
        return sorted(tuple(value for name, value in row.items() if name != "seconds") for row in rows_of(place))

    assert without_times(out) == without_times(small), "the same run once more"
    rows = [{**row, "rejected": "-9"} if row["phase"] == "rate" else row for row in rows_of(out)]
    with (out / "data" / "cures.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    refused = run("--out", out, "--small", "--methods", "adaptive")
    assert refused.returncode == 2 and "run all methods anew" in " ".join(refused.stderr.split())
    assert run("--out", tmp_path / "new", "--small", "--methods", "adaptive").returncode == 2
    assert "accepted are DPO, RPO 0.1" in " ".join(run("--out", out, "--methods", "adptive").stderr.split())


@pytest.mark.nightly
@pytest.mark.slow
def test_other_data_stays_in_the_records(small: Path, tweets: Path, tmp_path: Path) -> None:
    model = tmp_path / "my-model"
    tokenizer = build_tokenizer()
    build_model(len(tokenizer), 0).save_pretrained(model)
    tokenizer.save_pretrained(model)
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    for name in ("cures.csv", "cures.json"):
        (out / "data" / name).write_bytes((small / "data" / name).read_bytes())
    before = [row for row in rows_of(out) if row["data"] == "generated"]
    done = run("--out", out, "--small", "--tweets", tweets, "--model", model)
    assert done.returncode == 0, done.stderr
    assert "the rows of generated stay" in done.stdout
    rows = rows_of(out)
    assert [row for row in rows if row["data"] == "generated"] == before
    assert {row["data"] for row in rows} == {"generated", "tweets, my-model"}
    page = (out / "cures-measured.md").read_text("utf-8")
    assert all(name in page for name in ("img/cures-tweets-my-model-sgd.png", "img/cures-generated-sgd.png"))


def test_a_model_without_statements_is_refused(tmp_path: Path) -> None:
    done = run("--out", tmp_path, "--model", tmp_path)
    assert done.returncode == 2
    assert "--model DIR is for the statements of" in " ".join(done.stderr.split())


def test_statements_of_a_file_are_held_out_by_seed(tweets: Path) -> None:
    from cures_parts.plan import SMALL  # noqa: PLC0415
    from cures_parts.starts import Tweets, word_tokenizer  # noqa: PLC0415

    data = Tweets(replace(SMALL, seeds=(0, 1), sft=replace(SMALL.sft, sft_steps=1)), tweets, None)
    starts = [data.start(seed) for seed in (100, 0, 1)]
    probes = [set(start.task.probe) for start in starts]
    assert [len(probe) for probe in probes] == [8, 8, 8]
    assert not (probes[0] & probes[1] or probes[1] & probes[2] or probes[0] & probes[2])
    assert not set.union(*probes) & {one for start in starts for one in start.task.train}
    assert starts[1].task.train != starts[2].task.train
    assert starts[0].model is starts[1].model
    tokenizer = word_tokenizer(read_statements(tweets))
    assert (
        tokenizer.unk_token_id not in tokenizer("The film was wonderful\nAnswer with one word: positive")["input_ids"]
    )
    assert tokenizer("zyzzyva")["input_ids"] == [tokenizer.unk_token_id]


@pytest.fixture
def probe_parts() -> tuple[Any, Any, Any]:
    from cures_parts.probe import Probe  # noqa: PLC0415

    tokenizer = build_tokenizer()
    task = make_task(seed=0, train=8, probe=6, answers=1)
    return build_model(len(tokenizer), 0), Probe(tokenizer, task, "prefix+suffix", 0), (tokenizer, task)


def test_the_probe_finds_the_label(probe_parts: tuple[Any, Any, Any]) -> None:
    model, probe, (tokenizer, task) = probe_parts
    look = probe.look(model)
    pairs = tokenize_style(tokenizer, task.probe, "prefix+suffix", task.label_words)
    logps = []
    for prompt, chosen, rejected in pairs:
        place = next(number for number, (one, two) in enumerate(zip(chosen, rejected, strict=True)) if one != two)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + chosen])).logits[0].double().log_softmax(-1)
        logps.append(float(logits[len(prompt) + place - 1, chosen[place]]))
    assert look["label"] == pytest.approx(sum(logps) / len(logps), rel=1e-5)
    glance = probe.glance(model)
    assert glance == pytest.approx({name: look[name] for name in ("chosen", "rejected")}, rel=1e-6)


def test_accuracy_is_that_of_a_model_that_knows(probe_parts: tuple[Any, Any, Any]) -> None:
    model, probe, (tokenizer, task) = probe_parts
    right = {
        True: tokenizer.convert_tokens_to_ids(task.label_words[0]),
        False: tokenizer.convert_tokens_to_ids("negative"),
    }
    answers = torch.tensor([right[one.positive] for one in task.probe] * 2)
    forward = model.forward

    def knowing(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if len(output.logits) == len(task.probe):
            output.logits[torch.arange(len(task.probe)), :, answers[: len(task.probe)]] += 100
        return output

    model.forward = knowing
    assert probe._label(model)["label_right"] == 1  # noqa: SLF001
    answers = answers.flip(0)  # positive and negative come by turns: now all are wrong
    assert probe._label(model)["label_right"] == 0  # noqa: SLF001


def test_cpo_s_batches_are_the_others_in_its_layout() -> None:
    from gradent.demo.train import PairCollator, SplitCollator  # noqa: PLC0415

    pairs = [([5, 6], [7, 8], [9]), ([5], [7], [8, 9, 10])]
    both, split = (kind(pairs)([{"pair": 1}, {"pair": 0}]) for kind in (PairCollator, SplitCollator))
    for number, side in enumerate(("chosen", "rejected")):
        ids, labels = split[f"{side}_input_ids"], split[f"{side}_labels"]
        assert ids.equal(both["input_ids"].chunk(2)[number])
        marks = both["completion_mask"].chunk(2)[number] == 1
        assert labels[marks].equal(ids[marks])
        assert bool((labels[~marks] == -100).all())


def test_the_rate_is_the_nearest_on_the_grid() -> None:
    from cures_parts.tuning import choose_rate  # noqa: PLC0415

    rate, gains = choose_rate(lambda rate: 10 * rate, 1.0, 70.0)
    assert (rate, list(gains)) == (8.0, [1, 2, 4, 8])
    rate, gains = choose_rate(lambda rate: 10 * rate, 1.0, 3.0)
    assert (rate, list(gains)) == (0.25, [1, 0.5, 0.25])
    rate, gains = choose_rate(lambda rate: 10 * rate if rate < 4 else math.nan, 1.0, 70.0)
    assert (rate, list(gains)) == (2.0, [1, 2, 4])
    rate, gains = choose_rate(lambda rate: 1.0, 1.0, 70.0, moves=3)
    assert len(gains) == 3


def test_masks_that_train_nothing_are_not_chosen() -> None:
    from cures_parts.tuning import choose_masks  # noqa: PLC0415

    outcomes = {0.0: (-2.0, 10.0), 0.1: (-1.0, 8.0), 1.0: (-0.01, 0.1)}
    grid = {"mask_eta": list(outcomes)}
    best, tried = choose_masks(lambda setting: outcomes[setting["mask_eta"]], grid, 10.0)
    assert best == {"mask_eta": 0.1}
    assert len(tried) == 3
    assert choose_masks(lambda setting: outcomes[setting["mask_eta"]], grid, 100.0)[0] == {"mask_eta": 0.0}


def made_rows(ends: dict[str, list[tuple[float, float, float]]]) -> list[dict[str, Any]]:
    """Runs of one style: by method, a seed's chosen, rejected and right labels at the end (from 0, 0 and 1)."""
    common = {"data": "made", "optimizer": "SGD", "style": "long suffix", "rate": 1.0, "mask_eta": 0.0}
    common |= {"mask_learning_rate": 1.0, "cosine": 0.5, "label": 0.0, "preferred": 1.0, "answers": 0.0}
    common |= {f"kept_{name}": 0.5 for name in ("label", "shared", "chosen", "rejected")}
    rows = []
    for method, seeds in ends.items():
        for seed, (chosen, rejected, right) in enumerate(seeds):
            for step, values in ((0, (0.0, 0.0, 1.0)), (4, (chosen, rejected, right))):
                named = dict(zip(("chosen", "rejected", "label_right"), values, strict=True))
                rows.append(
                    {**common, "phase": "run", "method": method, "seed": float(seed), "step": float(step)} | named
                )
    return rows


@pytest.mark.parametrize(("processor", "chosen", "fits"), [
    ("here", -2.0, True), ("here", -2.001, False), ("there", -2.001, True), ("there", -2.03, False),
])  # fmt: skip
def test_runs_elsewhere_have_to_be_the_same_to_rounding(
    processor: str, chosen: float, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cures_parts import records  # noqa: PLC0415

    row = {"data": "made", "optimizer": "SGD", "phase": "rate", "method": "DPO", "style": "s", "seed": 100.0}
    row |= {"rate": 0.1, "step": 60.0, "chosen": -2.0, "rejected": -9.0}
    machine = {**records.machine(), "processor": "here"}
    records.write(tmp_path, [row], {"made": {"steps": 60, "machine": machine, "seconds": 1}})
    monkeypatch.setattr(records, "machine", lambda: {**machine, "processor": processor})
    records.require_same(tmp_path, "made", {"steps": 60, "machine": records.machine()})
    again = [{**row, "chosen": chosen}]
    if not fits:
        with pytest.raises(typer.BadParameter, match="run all methods anew"):
            records.require_equal_runs(tmp_path, again)
        return
    records.require_equal_runs(tmp_path, again)
    new = [{**row, "phase": "run", "method": "adaptive"}]
    rows, about = records.write(
        tmp_path, [*again, *new], {"made": {"machine": records.machine(), "seconds": 2}}, ["adaptive"]
    )
    assert [(each["method"], each["chosen"]) for each in rows] == [("DPO", -2.0), ("adaptive", -2.0)]
    assert about["made"]["machine"] == machine and about["made"]["seconds"] == 3
    assert about["made"]["elsewhere"] == ({} if processor == "here" else {"adaptive": "there"})


def test_calibration_balances_the_batch_and_remembers_earlier_ones() -> None:
    from cures_parts.calibration import RewardCalibratedDPOTrainer  # noqa: PLC0415

    trainer = object.__new__(RewardCalibratedDPOTrainer)
    ones = torch.ones(2, dtype=torch.float64)
    norms = RowNorms(torch.tensor([1.0, 2.0]).double(), torch.tensor([4.0, 2.0]).double(), 0 * ones)
    d_w, d_l = 0.05 * ones, torch.tensor([0.05, 0.1]).double()
    first, rest, mean = trainer.reweigh(norms, d_w, d_l)
    torch.testing.assert_close(first / rest, 2.0 * ones)  # the geometric mean of 4 and 1, whatever the loss's ratio
    torch.testing.assert_close(first * rest, d_w * d_l)  # α times and divided by
    torch.testing.assert_close(mean, (first + rest) / 2)
    halved = RowNorms(norms.chosen, torch.tensor([0.5, 0.0]).double(), 0 * ones)  # a gradient of zero does not count
    first, rest, _ = trainer.reweigh(halved, d_w, d_l)
    wanted = (0.98 * math.log(2.0) + math.log(0.5)) / 1.98
    torch.testing.assert_close(first / rest, math.exp(wanted) * ones)


def test_sentences_say_where_a_cure_does_not_help_and_costs() -> None:
    from cures_parts.findings import Group  # noqa: PLC0415

    rows = made_rows(
        {
            "DPO": [(-2, -12, 0.95), (-1, -11, 0.95)],
            "pairwise": [(1, -9, 1.0), (-0.5, -10, 0.5)],
            "masked": [(-2.04, -6, 1.0), (-4, -6, 1.0)],
            "CPO": [(1, -9, 0.92), (1, -10, 0.92)],
        }
    )
    text = "\n".join(Group(rows, "made", "SGD", probe=48).sentences())
    assert "**DPO's chosen falls** in 2 of 2 runs" in text
    assert "chosen rises in 1 of 2 runs, falls by less in 1, by as much in 0, by more in 0." in text
    assert "**It does not help** chosen, on average over the seeds, in long suffix (-3.02, DPO -1.50)" in text
    assert "chosen rises in 0 of 2 runs, falls by less in 0, by as much in 1, by more in 1." in text
    cpo = next(line for line in text.splitlines() if line.startswith("**CPO**"))
    assert "ends below DPO's, by less than two standard errors of DPO's, in long suffix (92%" in cpo
    assert "costs accuracy" not in cpo
    assert "It gains accuracy (right labels)" in next(line for line in text.splitlines() if line.startswith("**masked"))
    assert "**Right labels** are at 100.0% before the first step, and at 75.0 to 100.0% at the end" in text
    assert "cannot show a gain" in text
    assert "against DPO, by more than two standard errors of DPO's, in long suffix (75%; DPO 95%, start 100%)" in text
    assert "masked in long suffix (0.30 of DPO's)" in text
    assert "pairwise in long suffix" not in text.split("**Not at the same separation**")[1]


COMMITTED = ROOT / "docs" / "data" / "cures.csv"


@pytest.mark.skipif(not COMMITTED.is_file(), reason="docs/data/cures.csv is not here")
def test_the_committed_page_is_made_of_the_committed_figures() -> None:
    from cures_parts import page, records  # noqa: PLC0415

    rows, about = records.read(ROOT / "docs")
    assert (ROOT / "docs" / "cures-measured.md").read_text("utf-8") == page.write(rows, about)
    for data, optimizer in page.parts(rows):
        assert (ROOT / "docs" / "img" / page.image(data, optimizer)).is_file()
