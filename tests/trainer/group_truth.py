"""GRPO and RLOO trainers whose rollouts are drawn by a seed, and the truth of their steps by float64 autograd."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tests.attribution.brute_force import Frozen, flat
from tests.trainer.runs import llama, with_lora

PROMPTS = ("ab", "the sea", "who?", "a red door and")
LONGEST = 12


def count_even(completions: Any, completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> list[float]:
    """A reward that differs within groups: the share of even ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def count_none(completions: Any, **kwargs: Any) -> list[float]:
    """A reward without contrast."""
    return [1.0] * len(completions)


class Step:
    """One optimizer step as it really was: tokens, weights of each token, and the model and optimizer before it."""

    def __init__(self, model: nn.Module, optimizer: Any, clip: float, twin: nn.Module) -> None:
        """`twin` is such a model, whose forward no trainer has replaced."""
        has_stepped = not isinstance(optimizer, torch.optim.Adam) or bool(optimizer.state)
        known = optimizer if has_stepped else torch.optim.SGD(model.parameters(), lr=1.0)
        self.frozen, self._clip = Frozen(model, known, twin), clip
        states = [optimizer.state.get(part, {}) for part in model.parameters() if part.requires_grad]
        self._has_state = all("exp_avg_sq" in state for state in states)
        self._second = flat([state["exp_avg_sq"] for state in states]) if self._has_state else torch.zeros(0)
        self._eps = float(optimizer.param_groups[0].get("eps", 0.0))
        self._steps = float(states[0]["step"]) if self._has_state else 0.0
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []  # ids, marks and weights `∂L/∂log π(y_t)` of each row

    def add(self, inputs: dict[str, Tensor], weights: Tensor) -> None:
        """A micro-batch, with the loss's gradient at its completions' log-probs."""
        prompts, completions = inputs["prompt_ids"], inputs["completion_ids"]
        masks = inputs["prompt_mask"].bool(), inputs["completion_mask"].bool()
        for row in range(len(prompts)):
            prompt, completion = prompts[row][masks[0][row]], completions[row][masks[1][row]]
            ids = torch.cat([prompt, completion])
            weight = torch.zeros(len(ids), dtype=torch.float64)
            weight[len(prompt) :] = weights[row][masks[1][row]].double()
            self.rows.append((ids, torch.arange(len(ids)) >= len(prompt), weight))

    @cached_property
    def active(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Rows that the loss moves."""
        return [row for row in self.rows if bool(row[2].any())]

    @cached_property
    def weight(self) -> Tensor:
        """Minus the mean weight of each active row's tokens, `[N]`."""
        return torch.stack([-weight[marks].mean() for _, marks, weight in self.active])

    @cached_property
    def group(self) -> Tensor:
        """Numbers of the prompts of the active rows, as they appear."""
        prompts: dict[tuple[int, ...], int] = {}
        keys = [tuple(ids[~marks].tolist()) for ids, marks, _ in self.active]
        return torch.tensor([prompts.setdefault(key, len(prompts)) for key in keys])

    def gradients(self, temperature: float) -> tuple[Tensor, Tensor]:
        """`g_i` and `h_j` of the active rows, `[N, parameters]` each."""
        parts = dict(self.frozen.model.named_parameters())
        tensors, found = [parts[name] for name in self.frozen.names], []
        for ids, marks, weight in self.active:
            logits = self.frozen.model(input_ids=ids[None]).logits[0, :-1].double() / temperature
            logps = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            for weights in (marks, weight):
                grads = torch.autograd.grad((logps * weights[1:]).sum(), tensors, retain_graph=True)
                found.append(flat(grads))
        return torch.stack(found[::2]), torch.stack(found[1::2])

    def account(self, g: Tensor, h: Tensor, *, is_new: bool) -> dict[str, Tensor]:
        """What moves each active row, by source, with P as it is before the step or of the step itself."""
        frozen, total = self.frozen, h.sum(0)
        kept = min(1.0, self._clip / (float(total.norm()) + 1e-6)) if self._clip else 1.0
        metric = frozen.metric
        if frozen.is_adam and is_new:
            second = 0.999 * self._second + 0.001 * (kept * total).square()
            metric = 1 / ((second / (1 - 0.999 ** (self._steps + 1))).sqrt() + self._eps)
        pushes = -((g * (frozen.lr * metric * frozen.fresh * kept)) @ h.T)
        same = self.group[:, None] == self.group
        own, raised = torch.eye(len(g), dtype=torch.bool), (self.weight > 0).expand_as(same)
        parts = {
            "own": own, "positives": same & ~own & raised, "negatives": same & ~own & ~raised, "other_groups": ~same,
        }  # fmt: skip
        moved = {source: (pushes * part).sum(1) for source, part in parts.items()}
        moved["earlier_batches"] = torch.zeros(len(g), dtype=torch.float64)
        moved["momentum"] = -g @ (frozen.lr * metric * frozen.carried * frozen.moment)
        shrinking = torch.ones_like(frozen.lr) if frozen.is_decoupled else metric * frozen.fresh
        moved["weight_decay"] = -g @ (frozen.lr * shrinking * frozen.decay * frozen.theta)
        return moved


def _watched(base: Any) -> Any:
    """A trainer of a class, with drawn rollouts, that notes its steps."""

    class Watched(base):  # type: ignore[misc]
        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            draws = self.__dict__.setdefault("draws", random.Random(5))
            rows = []
            for _ in prompt_ids:
                length, has_end = draws.randrange(1, LONGEST - 1), draws.random() < 0.8
                ids = [draws.randrange(5, 259) for _ in range(length if has_end else LONGEST)]
                rows.append([*ids, self.processing_class.eos_token_id] if has_end else ids)
            return rows if base is RLOOTrainer else (rows, None)

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            steps: dict[int, Step] = self.__dict__.setdefault("noted", {})
            number = self.state.global_step + 1
            if number not in steps:
                optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
                twin = with_lora(llama()) if hasattr(self.model, "peft_config") else llama()
                for adapter in set(getattr(self.model, "peft_config", ())) - {"default"}:  # RLOO's reference
                    twin.add_adapter(adapter, twin.peft_config["default"])
                steps[number] = Step(self.accelerator.unwrap_model(model), optimizer, self.args.max_grad_norm, twin)
            read, leaves = self._get_per_token_logps_and_entropies, []

            def as_leaf(*args: Any, **kwargs: Any) -> Any:
                with torch.no_grad():
                    logps, *rest = read(*args, **kwargs)
                leaves.append(logps.detach().requires_grad_())
                return leaves[0], *rest

            self._get_per_token_logps_and_entropies = as_leaf
            try:
                loss = super()._compute_loss(model, inputs)
            finally:
                del self._get_per_token_logps_and_entropies
            # A loss that is masked out whole has no gradient.
            weights = torch.autograd.grad(loss, leaves)[0] if loss.requires_grad else torch.zeros_like(leaves[0])
            # RLOO leaves the division by the number of micro-batches to transformers' Trainer.
            steps[number].add(inputs, weights / (self.args.gradient_accumulation_steps if base is RLOOTrainer else 1))
            return super()._compute_loss(model, inputs)

    return Watched


TRAINERS = {"grpo": (_watched(GRPOTrainer), GRPOConfig), "rloo": (_watched(RLOOTrainer), RLOOConfig)}


def make(
    name: str, model: nn.Module, tokenizer: PreTrainedTokenizerFast, out: Path, callbacks: Sequence[Any], **options: Any
) -> Any:
    """A trainer of three steps of eight rollouts, two groups of four."""
    trainer, config = TRAINERS[name]
    reward = options.pop("reward", count_even)
    if options.get("beta"):  # the reference is loaded
        model.save_pretrained(out / "model")
        model.config._name_or_path = str(out / "model")  # noqa: SLF001  (where TRL looks for it)
    settings = {
        "output_dir": str(out), "max_steps": 3, "per_device_train_batch_size": 8, "num_generations": 4,
        "max_completion_length": LONGEST, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1,
        "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no",
        "disable_tqdm": True, "seed": 7, "optim": "sgd", "optim_args": "momentum=0.9", "max_grad_norm": 0.05,
        "shuffle_dataset": False, "beta": 0.0, **options,
    }  # fmt: skip
    return trainer(
        model=model, args=config(**settings), train_dataset=Dataset.from_dict({"prompt": list(PROMPTS) * 8}),
        processing_class=tokenizer, callbacks=list(callbacks), reward_funcs=reward,
    )  # fmt: skip
