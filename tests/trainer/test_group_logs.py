"""What a run on rollouts leaves behind: scalars, sentences, lines of a file, and panels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from gradent import EntanglementCallback
from gradent.record import GROUP_SOURCES
from gradent.record.stream import read_row_stream
from gradent.report.live.alerts import FIRST_TOLD, Alert
from gradent.report.live.group_alerts import GroupAlerter, describe_groups
from gradent.report.live.group_window import GroupWindow
from gradent.trainer.records.row_step import summarize_rows
from tests.conftest import make_tokenizer
from tests.trainer.rollouts import PROMPTS, make_rollouts, reward
from tests.trainer.row_truth import names_of, texts
from tests.trainer.runs import llama
from tests.trainer.test_logs import by_step, media_in
from tests.trainer.wandb_file import history

STEPS = 4
MOVED = {f"gradent/group/{side}_moved/{source}" for side in ("positive", "negative") for source in GROUP_SOURCES}
TOTALS = {f"gradent/group/{side}_moved/total" for side in ("positive", "negative")}
NAMES = MOVED | TOTALS | {
    "gradent/inactive", "gradent/coverage", "gradent/overhead_s", "gradent/explained", "gradent/group/without_contrast",
    "gradent/group/cosine", "gradent/group/cancellation", "gradent/group/top_share", "gradent/group/positive_norm",
    "gradent/group/negative_norm", "gradent/group/positive_lowered", "gradent/group/negative_raised",
}  # fmt: skip


def some_flat(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that tells no rollout of one prompt from another."""
    scores = reward(completion_ids)
    return [0.5 if prompt == PROMPTS[0] else score for prompt, score in zip(prompts, scores, strict=True)]


class Run:
    """A run beside wandb, and what it left."""

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.callback = EntanglementCallback(
            every=1, realised=True, out=folder / "records", on_error="raise", alert=Alert(positive_lowered=1e-9)
        )
        trainer = make_rollouts(
            (GRPOTrainer, GRPOConfig), llama(), tokenizer, folder / "run", [self.callback], max_steps=STEPS,
            logging_steps=2, report_to="wandb", learning_rate=0.01, options={"reward_funcs": some_flat},
        )  # fmt: skip
        trainer.train()
        wandb.finish()
        wandb.teardown()  # waits for the service, which may still be writing the file
        self.logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        self.records = list(self.callback.records)
        self.rows = history(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("rollouts")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("WANDB_DIR", str(folder)), ("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
            patch.setenv(name, value)
        return Run(make_tokenizer(), folder)


def test_names(run: Run) -> None:
    assert [names_of([entry]) for entry in run.logs] == [NAMES, NAMES]


def by_hand(records: list[Any]) -> dict[str, float]:
    """The scalars of a window, row by row and group by group."""
    columns: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        if not math.isnan(value):
            columns.setdefault(name, []).append(value)

    moved = realised = off = 0.0
    for record in records:
        rows, weight = record.rows, record.rows.weight.tolist()
        products, count = rows.products.tolist(), len(weight)
        norm = [products[row][row] ** 0.5 for row in range(count)]
        pull = [sum(products[row][by] * weight[by] for by in range(count)) for row in range(count)]
        total = sum(weight[row] * pull[row] for row in range(count))
        add("group/top_share", max(weight[row] * pull[row] / total for row in range(count)))
        for number in sorted(set(rows.group.tolist())):
            members = [row for row in range(count) if rows.group[row] == number]
            square = sum(weight[a] * weight[b] * products[a][b] for a in members for b in members)
            add("group/cancellation", square**0.5 / sum(abs(weight[row]) * norm[row] for row in members))
            cosines = [
                products[a][b] / norm[a] / norm[b] for a in members for b in members if weight[a] > 0 > weight[b]
            ]
            add("group/cosine", sum(cosines) / len(cosines) if cosines else float("nan"))
        for row in range(count):
            side, against = ("positive", "lowered") if weight[row] > 0 else ("negative", "raised")
            change = sum(float(values[row]) for values in rows.moved.values())
            add(f"group/{side}_norm", norm[row])
            add(f"group/{side}_{against}", float(change * weight[row] < 0))
            for source, values in rows.moved.items():
                add(f"group/{side}_moved/{source}", float(values[row]))
            moved += 1
            realised += float(rows.realised[row]) ** 2
            off += (float(rows.realised[row]) - change) ** 2
    found = {name: sum(values) / len(values) for name, values in columns.items()}
    active, inactive = sum(len(record.rows) for record in records), sum(record.inactive for record in records)
    found |= {"inactive": inactive / (active + inactive), "coverage": 1.0, "explained": 1 - off / realised}
    for side in ("positive", "negative"):
        found[f"group/{side}_moved/total"] = sum(
            value for name, value in found.items() if name.startswith(f"group/{side}_moved/")
        )
    found["overhead_s"] = sum(record.overhead_s for record in records) / len(records)
    flat, groups = (sum(getattr(record, name) for record in records) for name in ("flat_groups", "groups"))
    return {f"gradent/{name}": value for name, value in found.items()} | {
        "gradent/group/without_contrast": flat / (flat + groups)
    }


def test_scalars_are_those_of_the_window(run: Run) -> None:
    for number, entry in enumerate(run.logs):
        want = by_hand(run.records[2 * number : 2 * number + 2])
        assert set(want) == NAMES
        assert {name: entry[name] for name in NAMES} == {name: pytest.approx(want[name], rel=1e-9) for name in NAMES}
    assert any(entry["gradent/inactive"] > 0 for entry in run.logs), "a group without contrast is among them"
    assert summarize_rows(run.records) == {
        name: pytest.approx(value, rel=1e-9) for name, value in by_hand(run.records).items() if name not in TOTALS
    }


def test_lines_of_rows(run: Run, tmp_path: Path) -> None:
    columns = read_row_stream(run.folder / "records" / "rows.jsonl")
    at = 0
    for record in run.records:
        stop = at + len(record.rows)
        part = {name: values[at:stop] for name, values in columns.items()}
        assert part["step"] == [record.step] * len(record.rows) and part["row"] == list(range(len(record.rows)))
        assert part["group"] == record.rows.group.tolist() and part["length"] == record.rows.length.tolist()
        for name in ("weight", "logp", "realised"):
            assert part[name] == pytest.approx(getattr(record.rows, name).tolist())
        assert part["sq"] == pytest.approx(record.rows.products.diagonal().tolist())
        for source in GROUP_SOURCES:
            assert part[f"moved_{source}"] == pytest.approx(record.rows.moved[source].tolist())
        at = stop
    assert at == len(columns["step"])


def test_lines_go_on_where_a_run_is_resumed(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for steps in (1, 3):
        callback = EntanglementCallback(every=1, out=tmp_path / "records", on_error="raise", attribution=False)
        trainer = make_rollouts(
            (GRPOTrainer, GRPOConfig), llama(), tiny_tokenizer, tmp_path / "run", [callback], max_steps=steps,
            save_strategy="steps", save_steps=1, save_total_limit=1,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=steps > 1)
    columns = read_row_stream(tmp_path / "records" / "rows.jsonl")
    assert columns["step"] == [step for step in (1, 2, 3) for _ in range(8)]
    assert columns["moved_own"] == [None] * 24 and columns["realised"] == [None] * 24
    assert columns["weight"][8:] == pytest.approx(torch.cat([r.rows.weight for r in callback.records]).tolist())


SHOWN = {
    "gradent/group/positive_moved/total", "gradent/group/positive_lowered", "gradent/group/cosine",
    "gradent/group/top_share", "gradent/explained",
}  # fmt: skip


def test_panels_in_a_run_of_wandb(run: Run) -> None:
    own = list(by_step([row for row in run.rows if any("gradent" in name for name in row)]).values())
    assert [row["train/global_step"] for row in own] == [2, 4]
    for row, entry in zip(own, run.logs, strict=True):
        scalars = {name for name in row if name.startswith("gradent/") and "." not in name}
        assert scalars - {"gradent/inactive", "gradent/group/without_contrast"} == SHOWN
        assert {name: row[name] for name in scalars} == {name: pytest.approx(entry[name]) for name in scalars}
        assert media_in(row) == {"moved_positive", "moved_negative", "against", "rollouts", "pushes", "changes"}

    def content(key: str) -> Any:
        (path,) = run.folder.rglob(Path(own[-1][f"{key}.path"]).name)
        return json.loads(path.read_text())

    steps = list(range(1, STEPS + 1))
    for side, sign in (("positive", 1), ("negative", -1)):
        bars = content(f"gradent/moved_{side}")["data"]
        assert [trace["name"].replace(" ", "_") for trace in bars] == list(GROUP_SOURCES)
        for trace, source in zip(bars, GROUP_SOURCES, strict=True):
            means = [float(r.rows.moved[source][r.rows.weight * sign > 0].mean()) for r in run.records]
            assert trace["x"] == steps and trace["y"] == pytest.approx(means, rel=1e-4)
    lines = content("gradent/against")["data"]
    for line, sign in zip(lines, (1, -1), strict=True):
        shares = [float((r.rows.total * sign < 0)[r.rows.weight * sign > 0].double().mean()) for r in run.records]
        assert line["x"] == steps and line["y"] == pytest.approx(shares, rel=1e-4)
    (points,) = content("gradent/changes")["data"]
    assert points["x"] == pytest.approx(torch.cat([record.rows.total for record in run.records]).tolist(), rel=1e-4)
    realised = torch.cat([record.rows.realised for record in run.records])
    assert points["y"] == pytest.approx(realised.tolist(), rel=1e-4)
    check_tables(run, content("gradent/rollouts"), content("gradent/pushes"))


def check_tables(run: Run, rollouts: Any, pushes: Any) -> None:
    """Of the run: whose share of the gradient is largest, and who moved whom most."""
    assert rollouts["columns"] == ["step", "share", "weight", "prompt", "text"]
    want = []
    for record in run.records:
        row = int(record.rows.share.argmax())
        weight, text = float(record.rows.weight[row]), texts(record, run.tokenizer)[row]
        want.append([record.step, pytest.approx(float(record.rows.share[row])), pytest.approx(weight), *text])
    assert rollouts["data"] == sorted(want, key=lambda line: -line[1].expected)
    assert pushes["columns"] == ["step", "moved", "change", "by", "push", "text", "by_text"]
    sizes = [record.attribution.pushes[~torch.eye(len(record.rows), dtype=torch.bool)].abs() for record in run.records]
    windows = [torch.cat(sizes[start : start + 2]).sort(descending=True).values[:5] for start in (0, 2)]
    largest = torch.cat(windows).sort(descending=True).values[:8]
    assert [abs(line[4]) for line in pushes["data"]] == pytest.approx(largest.tolist())
    for line in pushes["data"]:
        record = next(record for record in run.records if record.step == line[0])
        rows = {}
        for row in range(len(record.rows)):
            side = "positive" if record.rows.weight[row] > 0 else "negative"
            rows[f"{side} row {row} of group {int(record.rows.group[row])}"] = row
        row, by = rows[line[1]], rows[line[3]]
        assert line[4] == pytest.approx(float(record.attribution.pushes[row, by]))
        assert line[2] == pytest.approx(float(record.rows.total[row]))
        responses = texts(record, run.tokenizer)
        assert (line[5], line[6]) == (responses[row][1], responses[by][1])


def window(**fields: Any) -> GroupWindow:
    """Of steps 5 to 7: a quarter of the positives fall, most of it by negatives."""
    return GroupWindow(**{
        "steps": [FIRST_TOLD, FIRST_TOLD + 1, FIRST_TOLD + 2], "positives": [4, 4, 8], "lowered": [1, 1, 2],
        "negatives": [4, 4, 4], "raised": [0, 0, 0], "lowering": {"own": 0.5, "negatives": -3.0, "momentum": -1.0},
        "explained": 0.934, **fields,
    })  # fmt: skip


ALERT = Alert(positive_lowered=0.2, pairs=5)


def test_what_is_said_of_a_window() -> None:
    assert describe_groups(window(), ALERT) == (
        "steps 5-7: 25% of 16 positives fall, 75% of it by negatives of their own group; 93% explained; published GRPO "
        "runs with such steps have collapsed later (docs/groups.md)"
    )
    other = window(steps=[9], positives=[5], lowered=[2], lowering={"momentum": -1.0}, explained=None)
    assert describe_groups(other, ALERT) == "step 9: 40% of 5 positives fall, 100% of it by momentum"
    assert describe_groups(window(lowering={}), ALERT) == "steps 5-7: 25% of 16 positives fall; 93% explained"


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": [1, 2, 3], "lowered": [4, 4, 8]},  # the first steps of a run
        {"is_whole": False},
        {"lowered": [0, 1, 2]},
        {"positives": [0, 0, 0], "lowered": [0, 0, 0]},
        {"positives": [1, 1, 2], "lowered": [1, 1, 2]},  # four rows tell too little
        {"explained": 0.49},
    ],
)
def test_what_is_not_said(fields: dict[str, Any]) -> None:
    assert FIRST_TOLD == 5
    assert describe_groups(window(**fields), ALERT) is None


def test_steps_before_the_fifth_do_not_count() -> None:
    text = describe_groups(window(steps=[3, 4, 5], lowered=[4, 4, 2]), ALERT)
    assert text is not None and text.startswith("step 5: 25% of 8 positives fall")


def test_the_same_is_said_now_and_then() -> None:
    alerter = GroupAlerter(Alert(positive_lowered=0.2, again=3, pairs=16))
    assert [alerter.check(window()) is not None for _ in range(7)] == [True, False, False, True, False, False, True]
