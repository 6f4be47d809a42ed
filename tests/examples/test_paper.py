"""`examples/paper`: its trainer, what every command writes, rules that can fail, and the committed page."""

from __future__ import annotations

import csv
import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from datasets import Dataset
from typer.testing import CliRunner

from examples.paper import cases, cli, comparisons, formulas, page, sentiment, starts, styles
from examples.paper.claims import judge_error, judge_share, judge_signs
from examples.paper.lab import Lab, Outcome
from examples.paper.registry import NAMES, TRAINERS, trained_loss
from examples.paper.settings import PAPER, SMALL, Lora
from examples.paper.starts import Start, make_start
from gradent import losses
from gradent.auditing.analysis.loss_grid import label_loss
from gradent.demo.model import build_model, build_tokenizer
from gradent.demo.statements import Statement, draw_statements
from gradent.demo.task import STYLES
from gradent.demo.train import one_thread
from gradent.pairs.batch import PairBatch
from tests.pages import ROOT

RUNNER = CliRunner()
TINY = replace(
    SMALL, train=48, probe=6, batch=8, tokens=2, seeds=(0,), steps=2, every=1,
    demo=replace(SMALL.demo, train=48, probe=6, dpo_batch=8, sft_steps=20, dpo_steps=2, measure_every=1),
)  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--small` is smaller still."""
    monkeypatch.setattr(cli, "SMALL", TINY)


@pytest.fixture(scope="module", autouse=True)
def thread() -> Iterator[None]:
    """More threads do not help models this small."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def start() -> Start:
    return make_start(TINY, "llama", 0)


def test_every_loss_of_the_table_has_a_trainer() -> None:
    assert list(TRAINERS) == list(NAMES) == list(formulas.PRINTED) == losses.available()


# The rules.


def test_a_claim_of_signs_holds_only_in_every_seed() -> None:
    def claim(*values: float) -> bool:
        return judge_signs("x", "x", paper="x", rule="x", evidence={"chosen": (-1, values)}).holds

    assert claim(-1.0, -0.1)
    for failing in ((-1.0, 0.1), (0.0,), (-1.0, math.nan)):
        assert not claim(*failing)
    shown = judge_signs("x", "x", paper="x", rule="x", evidence={"chosen": (-1, [-1.0, 0.5])})
    assert shown.verdict == "does not hold" and "(1 of 2)" in shown.ours


def test_claims_of_errors_and_counts_can_fail() -> None:
    for error, holds in ((1e-12, True), (1e-3, False), (math.nan, False)):
        assert judge_error("x", "x", paper="x", what="x", error=error, bound=1e-9).holds is holds
    for good, of, holds in ((3, 3, True), (2, 3, False), (0, 0, False)):
        assert judge_share("x", "x", paper="x", what="x", good=good, of=of).holds is holds


def row(loss: str, seed: int, step: int, chosen: float, rejected: float) -> dict[str, Any]:
    return {"loss": loss, "seed": seed, "step": step, "chosen": chosen, "rejected": rejected,
            "chosen_mean": chosen / 3, "rejected_mean": rejected / 3}  # fmt: skip


def runs(**wrong: float) -> dict[str, list[dict[str, Any]]]:
    """Runs in which every claim holds but that of the losses in `wrong`, whose chosen changes by the given number."""
    falls = {"DPO", "R-DPO", "SimPO", "IPO", "KTO (paired)"}
    found = {}
    for loss in NAMES.values():
        change = wrong.get(loss.replace("-", ""), -1.0 if loss in falls else +1.0)
        other = -3.0 if loss in falls or loss == "SPPO" else 0.5
        found[loss] = [
            row(loss, seed, step, -5 + step * change, -6 + step * other) for seed in (0, 1) for step in (0, 1)
        ]
    return found


def test_claims_of_the_ten_losses_follow_the_numbers() -> None:
    failing = [claim.claim for claim in comparisons.claims_of("Figure 2", runs()) if not claim.holds]
    assert failing == []
    failing = [claim.claim for claim in comparisons.claims_of("Figure 2", runs(DPO=+1.0, CPO=-0.1)) if not claim.holds]
    assert [each.split(":")[0] for each in failing[:2]] == ["DPO", "CPO"]


# What the commands write.


def invoke(*words: object, code: int = 0) -> str:
    done = RUNNER.invoke(cli.app, list(map(str, words)))
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("paper")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "SMALL", TINY)
        invoke("all", "--small", "--out", out)
    return out


PICTURED = [name for name in cli.COMMANDS if not name.startswith(("theorem", "corollary", "table2"))]


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_a_command_writes_its_numbers_and_its_picture(name: str, everything: Path) -> None:
    with (everything / "data" / f"paper-{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and all(cell is not None for each in rows for cell in each.values())
    picture = everything / "img" / f"paper-{name}.png"
    assert picture.is_file() == (name in PICTURED)
    if name in PICTURED:
        assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 5000


def test_the_page_of_all_reports_what_fails(everything: Path) -> None:
    text = (everything / "reproduction.md").read_text("utf-8")
    assert text.count("\n## ") >= len(cli.COMMANDS)
    assert "‖∇log π_w‖² = ‖∇log π_l‖² (Corollary 2) | equal | 0 of 202" in text
    failing, holding = text.count("| **does not hold** |"), text.count("| holds |")
    counts = [list(map(int, each)) for each in re.findall(r"\*\*(\d+) of (\d+) \w+", text)]
    assert len(counts) == 3 and sum(good for good, _ in counts) == holding
    assert sum(of for _, of in counts) == holding + failing
    assert str(everything.parent) not in text
    for link in re.findall(r"\]\(((?:img|data)/[^)]+)\)", text):
        assert (everything / link).is_file(), link


def test_every_seed_and_loss_is_in_the_numbers(everything: Path) -> None:
    with (everything / "data" / "paper-figure2.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(each["loss"], each["seed"], each["step"]) for each in rows} == {
        (loss, seed, step) for loss in NAMES.values() for seed in "0" for step in "012"
    }
    rates = {each["loss"]: float(each["rate"]) for each in rows if each["seed"] == "0"}
    assert rates["DPO"] == TINY.rate and rates["SLiC-HF"] < rates["DPO"] < rates["KTO (paired)"]


def test_a_single_command(tmp_path: Path) -> None:
    said = invoke("theorem3", "--small", "--out", tmp_path)
    assert "does not hold" in said and (tmp_path / "data" / "paper-theorem3.csv").is_file()
    assert not (tmp_path / "reproduction.md").exists()


# A model and pairs of one's own: the path of the paper's models and data.


def comparisons_file(path: Path, columns: tuple[str, str, str] = ("prompt", "chosen", "rejected")) -> Path:
    rows = [(f"text {number}\nTL;DR:", f"short {number}", f" a longer one {number}") for number in range(12)]
    rows.append(("text", "same", "same "))
    path.write_text(
        "".join(json.dumps(dict(zip(columns, each, strict=True))) + "\n" for each in rows), encoding="utf-8"
    )
    return path


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of full scale, for a CPU: LoRA, AdamW."""
    monkeypatch.setattr(
        cli, "PAPER",
        replace(PAPER, train=8, probe=3, steps=2, batch=4, every=1, bf16=False, checkpointing=False, lora=Lora(rank=4),
                rate=1e-3, max_length=96),
    )  # fmt: skip


def test_the_papers_path_on_a_local_model_and_pairs(tmp_path: Path, local_model: Path, paper: None) -> None:
    pairs = comparisons_file(tmp_path / "pairs.jsonl")
    invoke("figure2", "--model", local_model, "--pairs", pairs, "--out", tmp_path / "out")
    with (tmp_path / "out" / "data" / "paper-figure2.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {each["loss"] for each in rows} == set(NAMES.values())
    assert {each["model"] for each in rows} == {"my-model"} and {float(each["rate"]) for each in rows} == {1e-3}
    for loss in NAMES.values():
        mine = [each for each in rows if each["loss"] == loss]
        assert [each["step"] for each in mine] == ["0", "1", "2"]
        assert len({each["chosen"] for each in mine}) > 1, loss  # it was trained


def test_a_model_of_ones_own_with_small(tmp_path: Path, local_model: Path) -> None:
    said = invoke("figure2", "--small", "--model", local_model, "--out", tmp_path / "out", code=2)
    assert "--small" in said and "--pairs" in said
    pairs = comparisons_file(tmp_path / "pairs.jsonl", ("prompt", "better", "rejected"))
    said = invoke("figure2", "--small", "--model", local_model, "--pairs", pairs, "--out", tmp_path / "out", code=2)
    assert "no column chosen" in said


@pytest.mark.parametrize("option", ["--pairs", "--tweets"])
def test_the_demos_model_takes_no_text_of_ones_own(option: str, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text("{}\n", encoding="utf-8")
    for source in (path, "someone/data"):
        said = invoke("figure1", "--small", option, source, "--out", tmp_path / "out", code=2)
        assert f"{option} is" in said and "--model" in " ".join(said.split())


@pytest.mark.parametrize("option", ["--pairs", "--tweets"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(option: str, tmp_path: Path) -> None:
    said = invoke("theorem1", "--small", option, tmp_path / "nothing.jsonl", "--out", tmp_path, code=2)
    assert option in said and "no file" in said


def test_a_hub_id_takes_the_place_of_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Lab] = []
    monkeypatch.setattr(cli, "Lab", lambda *given, **named: seen.append(Lab(*given, **named)) or seen[-1])
    invoke("theorem1", "--data", "someone/pairs", "--tweets", "someone/tweets", "--out", tmp_path)
    assert (seen[0].settings.comparisons, seen[0].settings.tweets) == ("someone/pairs", "someone/tweets")
    assert seen[0].data is None and seen[0].tweets is None


def test_a_count_below_one_is_refused(tmp_path: Path) -> None:
    invoke("theorem1", "--small", "--steps", 0, "--out", tmp_path, code=2)


def test_long_comparisons_are_cut_and_useless_ones_announced(tmp_path: Path, local_model: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "p" * 300, "chosen": f"a{n}", "rejected": "b"} for n in range(4)]  # nothing is left of these
    rows += [{"prompt": "p", "chosen": f"{n}" + "a" * 300, "rejected": "b"} for n in range(8)]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    with pytest.warns(UserWarning, match="are left out"):
        start = starts.load_start(TINY, str(local_model), 0, path)
    assert len(start.train) + len(start.probe) == 8
    assert {len(prompt + chosen) for prompt, chosen, _ in start.pairs} == {128}


@pytest.fixture
def demo_directory(tmp_path: Path) -> Path:
    """The demo's model, as if it had been pretrained."""
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), 0)
    for each in (model, tokenizer):
        each.save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


def statements(count: int) -> list[Statement]:
    return draw_statements(random.Random(3), count)


def test_the_papers_path_of_the_sentiment_task(
    tmp_path: Path, demo_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "PAPER", replace(PAPER, demo=replace(TINY.demo, dpo_optimizer="adamw_torch", dpo_lr=1e-3)))
    path = tmp_path / "tweets.jsonl"
    labels = {True: "positive", False: "negative"}
    path.write_text(
        "".join(json.dumps({"text": each.text, "label": labels[each.positive]}) + "\n" for each in statements(60)),
        encoding="utf-8",
    )
    invoke("figure3", "--model", demo_directory, "--tweets", path, "--out", tmp_path / "out")
    with (tmp_path / "out" / "data" / "paper-figure3.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {each["style"] for each in rows} == set(STYLES)
    for style in STYLES:
        assert len({each["chosen"] for each in rows if each["style"] == style}) == 3


def test_what_the_hub_has_is_read(demo_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the columns that the hub's two data sets have."""
    asked = []

    def tweets(name: str, *, split: str) -> Dataset:
        asked.append((name, split))
        rows = [{"id": "1", "text": f" {each.text} ", "label": 2, "label_text": labels[each.positive]}
                for each in statements(60)]  # fmt: skip
        both = [{"id": "2", "text": "so so", "label": 0, "label_text": each} for each in labels.values()]
        return Dataset.from_list([*rows, *both, {"id": "3", "text": "neither", "label": 1, "label_text": "neutral"}])

    def summaries(name: str, *, split: str) -> Dataset:
        asked.append((name, split))
        return Dataset.from_list(
            [{"prompt": f"SUBREDDIT: r/{split}\nTL;DR:\n", "chosen": f"good {n}", "rejected": "TL;DR: bad"}
             for n in range(30)]
        )  # fmt: skip

    labels = {True: "positive", False: "negative"}
    monkeypatch.setattr(sentiment, "load_dataset", tweets)
    monkeypatch.setattr(starts, "load_dataset", summaries)
    tiny = replace(PAPER, train=8, probe=3, lora=None, bf16=False, sentiment_model=str(demo_directory), demo=TINY.demo)
    begun = sentiment.load_sentiment(tiny, 0, None)
    assert {each.text for each in begun.task.train + begun.task.probe} <= {each.text for each in statements(60)}
    train, probe = starts.load_examples(tiny, 0, None)
    assert (len(train), len(probe)) == (8, 3)
    assert train[0].prompt == "SUBREDDIT: r/train\nTL;DR:" and probe[0].prompt == "SUBREDDIT: r/test\nTL;DR:"
    assert train[0].chosen.startswith(" good") and train[0].rejected == " TL;DR: bad"
    assert asked == [(PAPER.tweets, "train"), (PAPER.comparisons, "train"), (PAPER.comparisons, "test")]


# Tables.


def test_a_printed_row_is_told_from_the_loss() -> None:
    s_w, s_l, letters = formulas.draw_letters(64)
    right = formulas.PRINTED["cpo"]
    given = {"chosen_logp": s_w, "rejected_logp": s_l}
    for d, wanted in zip(formulas.printed_weights(right, s_w, s_l, letters), right.named.weights(**given), strict=True):
        torch.testing.assert_close(d, wanted)
    wrong = replace(right, h_l=lambda a, k: 0.2 * a)
    assert not torch.allclose(formulas.printed_weights(wrong, s_w, s_l, letters)[1], right.named.weights(**given)[1])


def test_a_real_step_goes_the_way_of_the_case(start: Start) -> None:
    model, pairs = start.build(), start.held_out
    predicted, realised = cases.step_on_each(model, pairs + [(x, lost, won) for x, won, lost in pairs])
    assert predicted == realised and set(predicted) <= {1, 2, 3}
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), start.build().parameters(), strict=True))


def test_the_diagonal_of_a_token_matrix(start: Start) -> None:
    from gradent.tokens.matrix import measure_tokens  # noqa: PLC0415

    tokens = start.tokenizer(" it has a positive sentiment based")["input_ids"]
    other = start.tokenizer(" it has a negative sentiment based")["input_ids"]
    gram = measure_tokens(start.build(), PairBatch.from_tokens([([3, 4], tokens, other)]), progress=False)[0]
    look = styles.look_at_tokens(gram)
    assert len(look.before) == 3 and len(look.same) == 2 and look.label < 0.999
    assert look.before == pytest.approx([1, 1, 1], abs=1e-5)


# The committed page.

PAGE = ROOT / "docs" / "reproduction.md"


def committed(name: str) -> dict[str, list[dict[str, Any]]]:
    with (ROOT / "docs" / "data" / f"paper-{name}.csv").open(encoding="utf-8", newline="") as file:
        found: dict[str, list[dict[str, Any]]] = {}
        for each in csv.DictReader(file):
            values = {
                key: value if key in ("model", "loss", "trainer") else float(value) for key, value in each.items()
            }
            found.setdefault(each["loss"], []).append(values)
    return found


@pytest.mark.parametrize("number", ["2", "5"])
def test_the_committed_verdicts_are_those_of_the_committed_numbers(number: str) -> None:
    text = PAGE.read_text("utf-8")
    claims = comparisons.claims_of(f"Figure {number}", committed(f"figure{number}"))
    assert len(claims) > 10
    for claim in claims:
        verdict = "holds" if claim.holds else "**does not hold**"
        lines = [line for line in text.splitlines() if line.startswith(f"| {claim.claim} ({claim.where}) |")]
        assert len(lines) == 1 and lines[0].endswith(f"| {verdict} |"), claim


def test_the_committed_page_is_whole() -> None:
    text = PAGE.read_text("utf-8")
    for name in cli.COMMANDS:
        assert (ROOT / "docs" / "data" / f"paper-{name}.csv").is_file()
        assert f"data/paper-{name}.csv" in text
    for name in PICTURED:
        assert f"img/paper-{name}.png" in text and (ROOT / "docs" / "img" / f"paper-{name}.png").is_file()
    assert "python -m examples.paper all --small --out docs" in text
    for part in (page.SMALL_SCALE, page.UNJUDGED, page.STANDINS, page.TRAINED, page.FULL):
        assert part in text
    for loss, trained in TRAINERS.items():
        named = label_loss(trained_loss(loss, torch.ones(1)))
        assert f"| {named} | {trained.by} | " in text


def test_a_page_without_a_failing_claim_says_so(tmp_path: Path) -> None:
    claim = judge_share("Table 2", "a | b", paper="x", what="x", good=1, of=1)
    lab = Lab(TINY, tmp_path)
    path = page.write_page(lab, [Outcome("table2", [claim])], command="python -m examples.paper all", seconds=60)
    text = path.read_text("utf-8")
    assert "**1 of 1 formulas are right as the paper prints them.**" in text and "a \\| b" in text
    worse = replace(claim, holds=False)
    text = page.write_page(lab, [Outcome("table2", [worse])], command="x", seconds=1).read_text("utf-8")
    assert "- Table 2: a \\| b. Here: 1 of 1." in text and "**does not hold**" in text
