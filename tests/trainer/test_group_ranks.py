"""Two CPU ranks that share a group of rollouts: one record, in which the group is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gradent.record import GROUP_SOURCES
from gradent.record.stream import read_row_stream
from tests.processes import launch
from tests.trainer import rank_rollouts
from tests.trainer.rank_rollouts import STEPS
from tests.trainer.runs import llama


def seen(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{rank}.json").read_text())


@pytest.mark.slow
def test_a_group_that_is_split_over_ranks(tmp_path: Path) -> None:
    for name in ("watched", "bare"):
        (tmp_path / name).mkdir()
        launch(rank_rollouts.main, 2, tmp_path / name, name == "watched", 2)
    two = seen(tmp_path / "watched")
    assert two["weights"] == seen(tmp_path / "watched", 1)["weights"] == seen(tmp_path / "bare")["weights"]
    assert seen(tmp_path / "watched", 1)["steps"] == [] and len(two["steps"]) == STEPS
    for step in two["steps"]:
        assert step["group"] == [0, 0, 0, 0] and step["counts"] == [1, 0, 0]
        assert len({tuple(ids[: marks.index(1)]) for ids, marks in zip(step["ids"], step["marks"], strict=True)}) == 1
        assert step["whole"] and step["explained"] > 0.999
        assert list(step["moved"]) == list(GROUP_SOURCES)
    check_first(two["steps"][0])
    columns = read_row_stream(tmp_path / "watched" / "records" / "rows.jsonl")
    assert columns["step"] == [step for step in range(1, STEPS + 1) for _ in range(4)]
    assert columns["weight"] == pytest.approx([weight for step in two["steps"] for weight in step["weight"]])


def check_first(step: dict[str, Any]) -> None:
    """The account of the first step, against the gradients of both ranks' rows."""
    model, rows = llama().double(), []
    for ids, marks in zip(step["ids"], step["marks"], strict=True):
        tokens, keep = torch.tensor(ids), torch.tensor(marks)
        logits = model(input_ids=tokens[None]).logits[0, :-1] / 0.7
        logp = (logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0] * keep[1:]).sum()
        rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(logp, list(model.parameters()))]))
    grads, weight = torch.stack(rows), torch.tensor(step["weight"], dtype=torch.float64)
    norms, want = grads.norm(dim=1), grads @ grads.T
    got = torch.tensor(step["products"], dtype=torch.float64)
    rank = torch.tensor([0, 0, 1, 1])
    together = rank[:, None] == rank
    assert bool(got[~together].isnan().all()), "rows of two ranks have no product where their gradients are kept"
    assert float(((got - want).abs() / torch.outer(norms, norms))[together].max()) < 1e-5
    total = 0.001 * want @ weight
    scale = float(total.abs().max())
    assert float((torch.tensor(step["total"]).double() - total).abs().max()) < 1e-4 * scale
    # What the other rank's rows do is in one source.
    elsewhere = torch.tensor(step["moved"]["earlier_batches"], dtype=torch.float64)
    assert float((elsewhere - 0.001 * want.where(~together, 0.0) @ weight).abs().max()) < 1e-4 * scale
