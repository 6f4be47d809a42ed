"""NTHR's rule for GRPO, what it is compared with, and a trainer that keeps what its steps do to the rollouts.

NTHR (Deng et al. 2025, "On the Effect of Negative Gradient in Group Relative Deep Reinforcement Optimization",
arXiv:2505.18830, Section 5): of each token of a negative rollout the score

    s = Σ_{positives of the group} Σ_{their tokens t'} ⟨e_y − π, e_y' − π'⟩ ⟨h, h'⟩,

the inner product of the two tokens' gradients by the head's weight, with hidden states held fixed. Tokens above τ, the
least mean score of a positive's tokens, have their negative advantage multiplied by a factor below 1.

Letters: B rollouts of a step, C tokens of the longest, G rollouts of a group, V vocabulary, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOTrainer

from gradent import PairBatch, RowBatch, token_effects

ARMS = ("GRPO", "NTHR", "random", "exact")
"""What is down-weighted: nothing; what NTHR's rule picks; as many tokens at random; as many with the highest exact."""

Batch = dict[str, Any]


def forward(model: Any, batch: Batch, **more: Any) -> Any:
    """The model's output for all rollouts, from the last token of the prompt on."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    return model(input_ids=ids, attention_mask=mask, logits_to_keep=batch["completion_ids"].shape[1] + 1, **more)


def token_logps(model: Any, batch: Batch) -> Tensor:
    """The log-prob of every token of the rollouts, 0 on padding, `[B, C]`."""
    logps = forward(model, batch).logits[:, :-1].log_softmax(-1)
    taken = logps.gather(-1, batch["completion_ids"][..., None])[..., 0]
    return taken * batch["completion_mask"]


def mixed_groups(batch: Batch, advantages: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The positives and the negatives of each group that has both, as numbers of rows."""
    for group in batch["group"].unique().tolist():
        mine = batch["group"] == group
        positives, negatives = ((mine & (sign * advantages > 0)).nonzero()[:, 0] for sign in (1, -1))
        if len(positives) and len(negatives):
            yield positives, negatives


@torch.no_grad()
def scores(model: Any, batch: Batch, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """NTHR's score of every token of a group with contrast, `[B, C]`, and τ of each row's group, `[B]`; else nan."""
    output = forward(model, batch, output_hidden_states=True)
    width = batch["completion_ids"].shape[1]
    hidden = output.hidden_states[-1][:, -width - 1 : -1].double()
    mask = batch["completion_mask"].double()
    values = torch.full(mask.shape, float("nan"), dtype=torch.float64, device=mask.device)
    threshold = torch.full(mask.shape[:1], float("nan"), dtype=torch.float64, device=mask.device)
    for positives, negatives in mixed_groups(batch, advantages):
        rows = torch.cat([positives, negatives])
        errors = -output.logits[rows, :-1].double().softmax(-1)
        errors.scatter_add_(-1, batch["completion_ids"][rows, :, None], torch.ones_like(errors[..., :1]))
        anchor = slice(len(positives))
        total = torch.einsum("bcv,bcd,bc->vd", errors[anchor], hidden[positives], mask[positives])
        values[rows] = ((errors @ total) * hidden[rows]).sum(-1)
        mean = (values[positives] * mask[positives]).sum(1) / mask[positives].sum(1)
        threshold[rows] = mean.min()
    return values, threshold


def positives_gradient(model: Any, batch: Batch, positives: Tensor, optimizer: Any = None) -> dict[str, Tensor]:
    """`Σ ∇log π` over the positives of a group, by parameter; times the optimizer's preconditioner where it has one."""
    named = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
    part = {name: batch[name][positives] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")}
    with torch.enable_grad():
        gradients = torch.autograd.grad(token_logps(model, part).sum(), [tensor for _, tensor in named])
    groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]} if optimizer else {}
    result = {}
    for (name, tensor), gradient in zip(named, gradients, strict=True):
        state = optimizer.state.get(tensor, {}) if optimizer else {}
        if state:
            group = groups[id(tensor)]
            second = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
            gradient = gradient / (second.sqrt() + group["eps"])
        result[name] = gradient
    return result


def row_of(batch: Batch, row: int) -> tuple[list[int], list[int]]:
    """Token ids of a rollout: the prompt's and its own."""
    prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
    return prompt.tolist(), batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()


def row_batch(batch: Batch) -> RowBatch:
    """All rollouts in their groups, in the order of the rows."""
    pairs = [row_of(batch, row) for row in range(len(batch["group"]))]
    rows = RowBatch.from_tokens([(prompt, [completion]) for prompt, completion in pairs])
    return RowBatch(rows.input_ids, rows.attention_mask, rows.completion_mask, batch["group"].cpu())


def exact_scores(model: Any, batch: Batch, advantages: Tensor, optimizer: Any = None) -> Tensor:
    """Of every negative's token `⟨∇log π(token), Σ_positives ∇log π⟩` over all parameters, `[B, C]`; else nan.

    This is what NTHR's score stands in for: by so much, times a step's size, does the token's penalty lower the
    positives of its group together. With an optimizer the product is Adam's, `Σ a_k b_k P_k`.

    Args:
        model: the model.
        batch: the rollouts.
        advantages: of each rollout, `[B]`.
        optimizer: Adam or AdamW; None for the plain product.

    Returns:
        The values, float64.
    """
    values = torch.full(batch["completion_mask"].shape, float("nan"), dtype=torch.float64)
    for positives, negatives in mixed_groups(batch, advantages):
        direction = positives_gradient(model, batch, positives, optimizer)
        _, other = row_of(batch, int(positives[0]))  # never equal to a negative: the reward differs
        for row in negatives.tolist():
            prompt, completion = row_of(batch, row)
            effects = token_effects(model, PairBatch.from_tokens([(prompt, completion, other)]), toward=direction)
            values[row, : len(completion)] = effects[: len(completion)]
    return values


def selections(
    model: Any, batch: Batch, advantages: Tensor, arms: tuple[str, ...], random: torch.Generator, optimizer: Any = None
) -> dict[str, Tensor]:
    """Which negative tokens each arm down-weights, bool `[B, C]`: of each group as many as NTHR's rule picks."""
    values, threshold = scores(model, batch, advantages)
    empty = torch.zeros(values.shape, dtype=torch.bool)
    chosen = {arm: empty.clone() for arm in arms}
    exact = exact_scores(model, batch, advantages, optimizer) if "exact" in arms else None
    for _, negatives in mixed_groups(batch, advantages):
        places = empty.clone()
        places[negatives] = batch["completion_mask"][negatives].bool()
        picked = places & (values > threshold[:, None])
        count, candidates = int(picked.sum()), places.nonzero()
        for arm in arms:
            if arm == "NTHR":
                chosen[arm] |= picked
            elif arm != "GRPO" and count:
                if exact is not None and arm == "exact":
                    order = exact[places].argsort(descending=True)
                else:
                    order = torch.randperm(len(candidates), generator=random)
                taken = candidates[order[:count]]
                chosen[arm][taken[:, 0], taken[:, 1]] = True
    return chosen


class Steps(TrainerCallback):
    """The log-prob of every rollout before and after each step of the optimizer."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.changes: list[dict[str, Tensor]] = []
        self._before = torch.empty(0)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Before the step."""
        with torch.no_grad():
            self._before = token_logps(self.trainer.model, self.trainer.batch).sum(1)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """After the step."""
        batch = self.trainer.batch
        with torch.no_grad():
            change = token_logps(self.trainer.model, batch).sum(1) - self._before
        self.changes.append({"change": change, "advantage": batch["row_advantages"], "group": batch["group"]})


class ArmTrainer(GRPOTrainer):
    """GRPO whose negative tokens are down-weighted by one of `ARMS`."""

    arm = "GRPO"
    factor = 0.0

    def __init__(self, *args: Any, arm: str = "GRPO", factor: float = 0.0, **more: Any) -> None:
        super().__init__(*args, **more)
        self.arm, self.factor, self.batch = arm, factor, {}
        self.selected, self.negative, self.rewards = 0, 0, []
        self._random = torch.Generator().manual_seed(self.args.seed)
        self.steps = Steps()
        self.steps.trainer = self
        self.add_callback(self.steps)

    def _generate_and_score_completions(self, inputs: Any) -> Batch:
        """TRL's batch, with an advantage for each token."""
        batch = super()._generate_and_score_completions(inputs)
        advantages = batch["advantages"]
        batch["group"] = torch.arange(len(advantages)) // self.num_generations
        batch["row_advantages"] = advantages
        optimizer = inner(self.optimizer) if self.optimizer is not None else None
        picked = selections(self.model, batch, advantages, (self.arm,), self._random, optimizer)[self.arm]
        batch["advantages"] = per_token(batch, picked, self.factor)
        self.selected += int(picked.sum())
        self.negative += int(batch["completion_mask"][advantages < 0].sum())
        return batch

    def _calculate_rewards(self, *args: Any, **more: Any) -> Tensor:
        """TRL's rewards, and their mean kept."""
        rewards = super()._calculate_rewards(*args, **more)
        self.rewards.append(float(rewards.mean()))
        return rewards

    def _compute_loss(self, model: Any, inputs: Batch) -> Tensor:
        """TRL's loss of a batch that is kept until the next."""
        self.batch = inputs
        return super()._compute_loss(model, inputs)


def per_token(batch: Batch, selected: Tensor, factor: float) -> Tensor:
    """Advantages `[B, C]`, those of the selected tokens multiplied by the factor."""
    return batch["row_advantages"][:, None] * torch.where(selected, factor, 1.0)


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that accelerate wraps."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def ahead(trainer: ArmTrainer) -> torch.optim.Optimizer:
    """The metric of the coming step: an optimizer whose second moments have its gradient, too."""
    optimizer = inner(trainer.optimizer)
    again = type(optimizer)([dict(group) for group in optimizer.param_groups])
    for group in optimizer.param_groups:
        beta = group["betas"][1]
        for tensor in group["params"]:
            state = optimizer.state[tensor]
            second = beta * state["exp_avg_sq"] + (1 - beta) * tensor.grad.square()
            again.state[tensor] = {"step": state["step"] + 1, "exp_avg": state["exp_avg"], "exp_avg_sq": second}
    return again


def step_apart(trainer: ArmTrainer, selected: Tensor, factor: float) -> Tensor:
    """By how many nats the trainer's next step would move each rollout with these tokens down-weighted, `[B]`.

    A copy of the model takes the step, with a copy of the optimizer's state; the run is left as it was.

    Args:
        trainer: just before a step.
        selected: the tokens, bool `[B, C]`.
        factor: of their advantage.

    Returns:
        The changes.
    """
    batch, original, optimizer = trainer.batch, trainer.model, inner(trainer.optimizer)
    model = copy.deepcopy(original)
    model.__dict__.pop("forward", None)  # accelerate's wrapper would still call the original's
    model.zero_grad()
    place = {id(old): new for old, new in zip(original.parameters(), model.parameters(), strict=True)}
    groups = [{**group, "params": [place[id(old)] for old in group["params"]]} for group in optimizer.param_groups]
    again = type(optimizer)(groups)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    weights = per_token(batch, selected, factor) * batch["completion_mask"] / batch["num_items_in_batch"]
    logps = token_logps(model, batch)
    (-(weights * logps).sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
    again.step()
    with torch.no_grad():
        return token_logps(model, batch).sum(1) - logps.detach().sum(1)
