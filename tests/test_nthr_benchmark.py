"""benchmarks/nthr.py: its scores against autograd, the control's counts, a step against the real one, and the page."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from benchmarks.append import RESULTS
from benchmarks.nthr_arms import ARMS, ArmTrainer, exact_scores, row_batch, scores, selections, step_apart, token_logps
from benchmarks.nthr_batches import SOURCES, Sums, sources, spearman
from benchmarks.nthr_page import Estimate, write
from gradent import measure_rows
from tests.pages import ROOT


@pytest.fixture(scope="module", autouse=True)
def on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(ROOT / "examples"))
    yield
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture
def made() -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """A random model in float64, two groups of three rollouts (one of them without contrast), and advantages."""
    from tiny import make_model  # noqa: PLC0415

    torch.manual_seed(0)
    lengths = torch.tensor([4, 2, 3, 4, 1, 4])
    batch = {
        "prompt_ids": torch.randint(3, 20, (6, 3)),
        "prompt_mask": torch.tensor([[0, 1, 1]] * 3 + [[1, 1, 1]] * 3),
        "completion_ids": torch.randint(3, 6, (6, 4)),
        "completion_mask": (torch.arange(4)[None] < lengths[:, None]).long(),
        "group": torch.tensor([0, 0, 0, 1, 1, 1]),
    }
    batch["prompt_ids"][:3] = batch["prompt_ids"][0].clone()
    return make_model().double(), batch, torch.tensor([0.7, 0.7, -1.4, 0.0, 0.0, 0.0])


def token_gradients(model: Any, batch: dict[str, torch.Tensor], row: int, names: set[str]) -> torch.Tensor:
    """`[T, P]`, the plain way, for the named parameters."""
    tensors = [tensor for name, tensor in model.named_parameters() if name in names]
    logps = token_logps(model, {name: value[row : row + 1] for name, value in batch.items()})[0]
    logps = logps[batch["completion_mask"][row].bool()]
    rows = [torch.autograd.grad(logp, tensors, retain_graph=True) for logp in logps]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def test_the_scores_are_products_of_gradients(made: tuple[Any, dict[str, torch.Tensor], torch.Tensor]) -> None:
    model, batch, advantages = made
    names = {name for name, _ in model.named_parameters()}
    values, threshold = scores(model, batch, advantages)
    head = {row: token_gradients(model, batch, row, {"lm_head.weight"}) for row in (0, 1, 2)}
    total = head[0].sum(0) + head[1].sum(0)
    assert torch.allclose(values[2, :3], head[2] @ total)
    assert torch.allclose(threshold[2], min((head[row] @ total).mean() for row in (0, 1)))
    assert values[3:].isnan().all()

    exact = exact_scores(model, batch, advantages)
    whole = {row: token_gradients(model, batch, row, names) for row in (0, 1, 2)}
    assert torch.allclose(exact[2, :3], whole[2] @ (whole[0].sum(0) + whole[1].sum(0)))
    assert exact[[0, 1, 3, 4, 5]].isnan().all()
    products = measure_rows(model, row_batch(batch), among="groups").products
    assert torch.allclose(exact[2, :3].sum(), products[2, 0] + products[2, 1])


def test_every_arm_picks_as_many_negative_tokens(made: tuple[Any, dict[str, torch.Tensor], torch.Tensor]) -> None:
    model, batch, _ = made
    advantages = torch.tensor([1.4, -0.7, -0.7, -1.0, -1.0, 2.0])
    chosen = selections(model, batch, advantages, ARMS, torch.Generator().manual_seed(0))
    values, threshold = scores(model, batch, advantages)
    negative = batch["completion_mask"].bool() & (advantages < 0)[:, None]
    assert chosen["NTHR"].equal(negative & (values > threshold[:, None]))
    assert bool(chosen["NTHR"].any()) and not bool(chosen["GRPO"].any())
    for arm in ("random", "exact"):
        assert not bool((chosen[arm] & ~negative).any())
        for group in (0, 1):
            mine = batch["group"] == group
            assert int(chosen[arm][mine].sum()) == int(chosen["NTHR"][mine].sum())


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["GRPO", "NTHR"])
def test_a_step_apart_is_the_step_that_follows(arm: str, tmp_path: Path) -> None:
    from grpo import make_start, make_trainer  # noqa: PLC0415

    torch.manual_seed(0)
    trainer = make_trainer(
        make_start(steps=60), str(tmp_path), steps=4, tokens=8, rate=1e-6, trainer=ArmTrainer, arm=arm, factor=0.5
    )

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.selected = trainer.batch["advantages"] != trainer.batch["row_advantages"][:, None]
            if trainer.state.global_step:
                self.change, self.moved = step_apart(trainer, self.selected, 0.5), sources(trainer)

    look = Look()
    trainer.add_callback(look)
    trainer.train()
    assert (trainer.selected > 0) is (arm == "NTHR")
    assert torch.allclose(look.change, trainer.steps.changes[-1]["change"], atol=2e-5)
    if arm == "GRPO":  # the account is of a rollout's tokens weighed alike
        assert tuple(look.moved) == SOURCES
        change = look.change.double()
        assert float((change - sum(look.moved.values())).square().sum() / change.square().sum()) < 1e-3


def test_sums_and_ranks() -> None:
    sums = Sums()
    sums.add("a", "share", torch.tensor([True, False]))
    sums.add("a", "share", torch.tensor([True, True]))
    sums.add("a", "ratio", torch.tensor([3.0]), over=2.0)
    assert sums.figures() == {("a", "share"): 0.75, ("a", "ratio"): 1.5}
    values = torch.tensor([0.1, 5.0, 2.0])
    assert float(spearman(values, values.exp())) == pytest.approx(1)
    assert float(spearman(values, -values)) == pytest.approx(-1)


def test_an_interval_is_student_s() -> None:
    estimate = Estimate.of([1.0, 2.0, 3.0])
    assert (estimate.mean, estimate.half) == (2.0, pytest.approx(4.303 / 3**0.5))
    assert not estimate.is_told
    assert Estimate.of([1.0, 1.01, 1.02]).is_told


@pytest.mark.skipif(not (RESULTS / "nthr.csv").is_file(), reason="benchmarks/results/nthr.csv is not here")
def test_the_committed_page_is_made_of_the_committed_figures(tmp_path: Path) -> None:
    page, copy = ROOT / "docs" / "groups.md", tmp_path / "groups.md"
    copy.write_text(page.read_text("utf-8"), "utf-8")
    write(RESULTS / "nthr.csv", copy)
    assert copy.read_text("utf-8") == page.read_text("utf-8")
