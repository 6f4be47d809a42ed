"""What a step of GRPO does to the positives of its groups, by exact values, and how NTHR's score ranks tokens.

Letters: N rollouts of a step, C tokens of the longest.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.nthr_arms import (
    ARMS,
    ArmTrainer,
    ahead,
    exact_scores,
    inner,
    mixed_groups,
    row_batch,
    scores,
    selections,
    step_apart,
)
from gradent import measure_rows

SOURCES = ("own", "positives", "negatives", "other_groups", "momentum")
"""What moves a rollout in a step: itself, its group's others by sign, the other groups, earlier steps."""
SAME_STEP = (*ARMS, "no negatives")
"""Whose steps from one state on one batch are compared; the last penalizes no token at all."""


class Sums:
    """Ratios of sums over all that was seen: shares and means."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, arm: str, figure: str, values: Tensor, over: float | None = None) -> None:
        """Values of a mean; or a sum's addends and what is added to the denominator."""
        total = self._sums[arm, figure]
        total[0] += float(values.double().sum())
        total[1] += values.numel() if over is None else over

    def figures(self) -> dict[tuple[str, str], float]:
        """(Arm, figure) to its value; nan where nothing was seen."""
        return {key: total / over if over else float("nan") for key, (total, over) in self._sums.items()}


class Batches(TrainerCallback):
    """Looks at every n-th batch of a plain run just before its step, and leaves the run as it was."""

    def __init__(self, trainer: ArmTrainer, every: int, factor: float) -> None:
        self._trainer, self._every, self._factor = trainer, every, factor
        self._random = torch.Generator().manual_seed(1000 + trainer.args.seed)
        self.sums = Sums()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the step, which has its `.grad`."""
        advantages = self._trainer.batch["row_advantages"]
        positive = [positives for positives, _ in mixed_groups(self._trainer.batch, advantages)]
        if state.global_step == 0 or state.global_step % self._every or not positive:
            return
        mine = torch.cat(positive)
        moved = sources(self._trainer)
        self._add_rows(moved, mine)
        self._add_tokens(advantages)
        self._add_steps(advantages, mine, sum(moved.values()))

    def _add_rows(self, moved: dict[str, Tensor], mine: Tensor) -> None:
        """What moves the positives, in nats by source."""
        for source, nats in moved.items():
            self.sums.add("", f"moved_{source}", nats[mine])
        group = moved["own"] + moved["positives"] + moved["negatives"]
        self.sums.add("", "size_of_negatives", moved["negatives"][mine].abs())
        self.sums.add("", "negatives_lower", moved["negatives"][mine] < 0)
        self.sums.add("", "lowered_by_group", group[mine] < 0)
        self.sums.add("", "lowered_but_for_negatives", (group - moved["negatives"])[mine] < 0)
        self.sums.add("", "lowered_by_batch", (group + moved["other_groups"])[mine] < 0)
        self.sums.add("", "lowered_by_step", sum(moved.values())[mine] < 0)

    def _add_tokens(self, advantages: Tensor) -> None:
        """How NTHR's score agrees with the exact value, in both metrics, over the tokens of a group's negatives."""
        trainer = self._trainer
        values, threshold = scores(trainer.model, trainer.batch, advantages)
        for metric, optimizer in (("plain", None), ("Adam", ahead(trainer))):
            exact = exact_scores(trainer.model, trainer.batch, advantages, optimizer)
            for _, negatives in mixed_groups(trainer.batch, advantages):
                places = trainer.batch["completion_mask"][negatives].bool()
                score, truth = values[negatives][places], exact[negatives][places]
                picked = score > threshold[negatives[0]]
                self.sums.add(metric, "rank_correlation", spearman(score, truth)[None])
                self.sums.add(metric, "picked", picked)
                self.sums.add(metric, "tokens_that_lower", truth > 0)
                self.sums.add(metric, "picked_that_lower", truth[picked] > 0)
                harm = float(truth.clamp(min=0).sum())
                self.sums.add(metric, "harm_picked", truth[picked], harm)
                self.sums.add(metric, "harm_of_as_many_at_random", truth * picked.double().mean(), harm)
                self.sums.add(metric, "harm_of_as_many_at_most", truth.topk(int(picked.sum())).values, harm)

    def _add_steps(self, advantages: Tensor, mine: Tensor, total: Tensor) -> None:
        """What the step of each arm, from this state on this batch, really does."""
        trainer, batch = self._trainer, self._trainer.batch
        chosen = selections(trainer.model, batch, advantages, ARMS, self._random, ahead(trainer))
        chosen["no negatives"] = (batch["completion_mask"].bool()) & (advantages < 0)[:, None]
        others = torch.cat([negatives for _, negatives in mixed_groups(batch, advantages)])
        for arm in SAME_STEP:
            change = step_apart(trainer, chosen[arm], self._factor)
            self.sums.add(arm, "positives_fell", change[mine] < 0)
            self.sums.add(arm, "positive_change", change[mine])
            self.sums.add(arm, "negative_change", change[others])
            if arm == "GRPO":
                error = (change - total)[mine].double().square().sum()
                self.sums.add("", "unexplained", error, float(change[mine].double().square().sum()))


def sources(trainer: ArmTrainer) -> dict[str, Tensor]:
    """The first-order change of each rollout in the coming step of AdamW, in nats by source, float64 `[N]`.

    With the preconditioner that the step will have. Clipping counts: the gradient's norm follows from the plain
    products.

    Args:
        trainer: just before a step that is not the first.

    Returns:
        Source to changes.
    """
    optimizer, batch = inner(trainer.optimizer), trainer.batch
    state = {name: optimizer.state[tensor] for name, tensor in trainer.model.named_parameters()}
    beta = optimizer.param_groups[0]["betas"][0]
    taken = float(next(iter(state.values()))["step"]) + 1
    rows, rate = row_batch(batch), optimizer.param_groups[0]["lr"]
    weight = (batch["row_advantages"] / batch["num_items_in_batch"]).double()
    plain = measure_rows(trainer.model, rows, among="all").products
    momentum = {name: one["exp_avg"] for name, one in state.items()}
    gram = measure_rows(trainer.model, rows, among="all", metric=ahead(trainer), directions=[momentum])
    clip = min(1.0, trainer.args.max_grad_norm / (float(weight @ plain @ weight) ** 0.5 + 1e-6))
    pushes = rate * clip * (1 - beta) / (1 - beta**taken) * gram.products * weight[None]
    same = batch["group"][:, None] == batch["group"][None]
    own = torch.eye(len(weight), dtype=torch.bool)
    masks = {
        "own": own,
        "positives": same & ~own & (weight > 0)[None],
        "negatives": same & ~own & (weight < 0)[None],
        "other_groups": ~same,
    }
    moved = {source: (pushes * mask).sum(1) for source, mask in masks.items()}
    return {**moved, "momentum": -rate * beta / (1 - beta**taken) * gram.along[:, 0]}


def spearman(one: Tensor, two: Tensor) -> Tensor:
    """The correlation of ranks of two `[T]`."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, two)])
    return torch.corrcoef(ranks)[0, 1]
