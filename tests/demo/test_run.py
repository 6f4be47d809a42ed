"""A demo from end to end at tiny settings, what it leaves behind, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gradent.demo import run as demo_run
from gradent.demo import run_demo
from gradent.demo.model import build_model, build_tokenizer
from gradent.demo.settings import EMBEDDED
from gradent.demo.task import STYLES, make_task
from gradent.demo.train import PairCollator, train_dpo
from gradent.errors import GradentError, InputError
from gradent.record import PAIR_COLUMNS, read_demo, read_pairs

TINY = replace(
    EMBEDDED, train=16, probe=4, sft_steps=3, sft_batch=4, dpo_steps=3, dpo_batch=4, measure_every=2, dpo_lr=1e-3
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Directory and terminal output of one tiny demo."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "EMBEDDED", TINY)
        assert run_demo(out=out / "new" / "place", seed=3) == 0
    return out / "new" / "place"


def test_records_hold_every_pair_at_every_measured_step(demo):
    table = read_pairs(demo / "pairs.parquet")
    assert table.column_names == list(PAIR_COLUMNS)
    rows = list(zip(*(table[name].to_pylist() for name in ("checkpoint", "step", "pair")), strict=True))
    assert rows == [(style, step, pair) for style in STYLES for step in (0, 2, 3) for pair in range(4)]


def test_every_style_starts_from_the_same_sft_model_which_is_the_reference(demo):
    columns = read_pairs(demo / "pairs.parquet").to_pydict()
    for logp, reference in zip(columns["chosen_logp"], columns["ref_chosen_logp"], strict=True):
        assert logp < 0
        assert reference < 0
    start = [number for number, step in enumerate(columns["step"]) if step == 0]
    assert all(columns["chosen_logp"][number] == columns["ref_chosen_logp"][number] for number in start)
    # beta / 2 where policy and reference are one
    assert [columns["d_w"][number] for number in start] == pytest.approx([0.05] * len(start))


def test_dpo_trained_something(demo):
    columns = read_pairs(demo / "pairs.parquet").to_pydict()
    first, last = columns["rejected_logp"][:4], columns["rejected_logp"][8:12]
    assert first != last


def test_the_record_says_how_it_was_made(demo):
    record = read_demo(demo / "demo.json")
    assert record["settings"]["seed"] == 3
    assert record["settings"]["dpo_steps"] == 3
    assert record["model"]["source"] is None
    assert [row["style"] for row in record["styles"]] == list(STYLES)
    assert len(record["findings"]) == 6


def test_a_seed_gives_one_result():
    settings = replace(TINY, dpo_steps=1)
    first, again = (demo_run.experiment(settings, seed=1, quiet=True)[0] for _ in range(2))
    assert first["inner"] == again["inner"]
    other = demo_run.experiment(settings, seed=2, quiet=True)[0]
    assert first["inner"] != other["inner"]


def test_the_table_says_plainly_what_does_not_appear(monkeypatch, capsys, tmp_path):
    columns, about = demo_run.experiment(TINY, seed=0, quiet=True)
    by_style = {"single token": -0.5}  # single token falls, everything else rises: nothing of the paper's first three
    columns["chosen_logp"] = [
        -1 + step * by_style.get(style, 0.1) for style, step in zip(columns["checkpoint"], columns["step"], strict=True)
    ]
    monkeypatch.setattr(demo_run, "experiment", lambda *args, **kwargs: (columns, about))
    assert run_demo(out=tmp_path) == 0
    shown = capsys.readouterr().out
    assert "does not appear" in shown
    assert "-1.500" in shown
    assert [finding["appears"] for finding in read_demo(tmp_path / "demo.json")["findings"]][:3] == [False] * 3
    assert "does not appear" in (tmp_path / "report.html").read_text("utf-8")


def test_trl_trains_on_the_ids_that_are_measured(monkeypatch):
    """No EOS, no re-tokenization: TRL's DPOTrainer sees gradent's own pairs."""
    seen = []
    original = PairCollator.__call__
    monkeypatch.setattr(PairCollator, "__call__", lambda self, rows: seen.append(original(self, rows)) or seen[-1])
    demo_run.experiment(replace(TINY, dpo_steps=1), seed=0, quiet=True)
    tokenizer = build_tokenizer()
    assert len(seen) >= len(STYLES)
    for batch in seen:
        assert not bool((batch["input_ids"] == tokenizer.eos_token_id).any())
    assert int(seen[0]["completion_mask"].sum(1).max()) == 1  # the single token is one


def test_any_causal_lm_with_the_words(tmp_path, monkeypatch):
    place = tmp_path / "my-model"
    tokenizer = build_tokenizer()
    build_model(len(tokenizer), 5).save_pretrained(place)
    tokenizer.save_pretrained(place)
    monkeypatch.setattr(demo_run, "PRETRAINED", replace(TINY, dpo_optimizer="adamw_torch", dpo_lr=1e-5))
    assert run_demo(out=tmp_path / "out", model=str(place), steps=2) == 0
    record = read_demo(tmp_path / "out" / "demo.json")
    assert record["model"]["source"] == str(place)
    assert record["settings"]["dpo_steps"] == 2


def test_a_model_without_the_words_is_refused(tmp_path, local_model):
    with pytest.raises(InputError, match="differ in one token"):
        run_demo(out=tmp_path / "out", model=str(local_model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is"),
        ({"model": "no-such-dir/with/parts"}, "no such directory"),
    ],
)
def test_what_is_refused(tmp_path, arguments, message):
    with pytest.raises(GradentError, match=message):
        run_demo(out=tmp_path, **arguments)


def test_an_out_that_is_a_file_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_run, "experiment", lambda *args, **kwargs: pytest.fail("worked before it looked"))
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="--out"):
        run_demo(out=tmp_path / "taken")


@pytest.mark.parametrize(("missing", "extra"), [("trl", "trl"), ("plotly", "audit")])
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, missing, extra):
    original = demo_run.find_spec
    monkeypatch.setattr(demo_run, "find_spec", lambda name: None if name == missing else original(name))
    with pytest.raises(InputError, match=rf"{missing}.*gradent\[{extra}\]"):
        run_demo(out=tmp_path)


def test_dpo_leaves_the_given_model_alone():
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), 0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    task = make_task(seed=0, train=16, probe=2, answers=4)
    measured = train_dpo(model, tokenizer, task, "single token", TINY, seed=0, advance=lambda step: None)
    assert [each.step for each in measured] == [0, 2, 3]
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
    assert "forward" not in vars(model)  # TRL's patch went onto a copy


def test_an_old_trl_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_run, "experiment", lambda *args, **kwargs: pytest.fail("worked before it looked"))
    monkeypatch.setattr(demo_run, "version", lambda name: "0.24.0")
    with pytest.raises(InputError, match=r"TRL 1.0 or newer, and 0.24.0"):
        run_demo(out=tmp_path, model=None, steps=None, seed=0)
