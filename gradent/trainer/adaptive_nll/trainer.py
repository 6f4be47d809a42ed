"""An experiment: DPO with a likelihood term that is as large as it has to be, as a TRL trainer.

Margin losses are kept from lowering chosen by a term `λ · NLL`, the mean of `−log π` over the batch's chosen tokens
(RPO, "sft" in TRL's `loss_type`), with λ by guess. The account of a step (docs/account.md) tells what the step's
gradient does to chosen of a pair that is not in the batch, `D_t`, and what the term at weight 1 would add to that,
`G_t`; both are first-order changes in nats, in the optimizer's metric. The next step takes

    λ = max(0, −Σ_s ρ^(t−s) D_s / Σ_s ρ^(t−s) G_s) + I_t,    at most `nll_max_weight`,

with `D_s` of the loss without the term. The first part is the least weight under which the gradients of the last steps
would not have lowered such a chosen. Momentum is left out of it, since it is nothing but the gradients of steps before.
Adam's first steps are of another scale than later ones and rest on few gradients, so both figures are in units of what
the term adds to the batch's own chosen, and no step asks for more than `nll_max_weight`.

First order is not all that happens. `I_t` answers for what has really become of chosen: it is the multiplier of the
constraint that chosen's mean log-prob is `nll_target` above the reference's, `I ← max(0, I − nll_rate · (mean(log
π/π_ref) − nll_target))` over the batch's chosen before their step, which in the first epoch no step has seen. A target
of 0 is met from below, so that chosen ends a little under the reference; 0.25 nats, the default, was settled on a seed
that no report has. With a target of 0, λ is 0 where chosen does not fall, and the run is DPO's.

It judges by pairs that are not in the batch because a batch's own rows are lifted by their own gradients, whatever
becomes of the others (docs/cures.md has what this did in real runs).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn
from trl.trainer.dpo_trainer import DPOTrainer

from gradent.attribution.likelihood import estimate_nll
from gradent.attribution.update_rule import is_diagonal
from gradent.errors import InputError
from gradent.model.preconditioner import describe_optimizer
from gradent.record.atomic import write_whole
from gradent.trainer.adaptive_nll.config import METHOD, AdaptiveNLLDPOConfig
from gradent.trainer.callback.callback import EntanglementCallback
from gradent.trainer.common.trl_requirements import make_config, require_unsharded
from gradent.trainer.records.step import StepRecord

__all__ = ["AdaptiveNLLDPOConfig", "AdaptiveNLLDPOTrainer"]

STATE_FILE = "nll_weight.json"
"""What a checkpoint holds of the weight."""

PATIENCE = 10
"""Steps in a row without an account after which that is said."""


class AdaptiveNLLDPOTrainer(DPOTrainer):
    """`DPOTrainer` with a likelihood term whose weight follows the account of every step; see the head of this file.

    Used as `DPOTrainer` is, with an `AdaptiveNLLDPOConfig`. `nll_weight` is the weight of the next step; it is logged
    under that name, and every checkpoint holds it as `nll_weight.json`. Evaluation is of the loss without the term. A
    step costs what `EntanglementCallback(every=1)` makes it cost.

    Raises:
        InputError: args of another kind, a run whose steps have no account (sharded parameters, images, an optimizer
            that is no SGD, Adam or AdamW of torch), or a checkpoint of another trainer.
    """

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        config = make_config(args, AdaptiveNLLDPOConfig, METHOD)
        super().__init__(model, ref_model, config, **kwargs)
        require_unsharded(self, f"{METHOD} needs every parameter whole", "whose rows have no account")
        self.nll_weight = 0.0
        self.loss_types = [*self.loss_types, "sft"]
        self.loss_weights = [*self.loss_weights, 0.0]
        self._follower = NLLFollower(self, config)
        self.add_callback(self._follower)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's loss; in training, with the likelihood term at its present weight."""
        self.loss_weights[-1] = self.nll_weight if model.training else 0.0
        if model.training:
            self._metrics["train"]["nll_weight"].append(self.nll_weight)
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[no-untyped-call]

    def chosen_level(self) -> float:
        """Mean of `log π − log π_ref` of the last step's chosen responses before the step, nats; 0 without a look."""
        looks = self._metrics["train"]["rewards/chosen"][-self.args.gradient_accumulation_steps :]
        return sum(looks) / len(looks) / self.beta if looks else 0.0

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            state = json.dumps({"nll_weight": self.nll_weight, **self._follower.state()}).encode()
            write_whole(Path(output_dir or str(self.args.output_dir)) / STATE_FILE, lambda file: file.write(state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint) / STATE_FILE
        if not path.is_file():
            raise InputError(
                f"{resume_from_checkpoint}: no {STATE_FILE} in this checkpoint, so it is of another trainer. Resume "
                "from a checkpoint of AdaptiveNLLDPOTrainer, or start anew with this one as the model."
            )
        state = json.loads(path.read_text("utf-8"))
        self.nll_weight = state["nll_weight"]
        self._follower.load(state)
        super()._load_from_checkpoint(resume_from_checkpoint, model)


class NLLFollower(EntanglementCallback):
    """Sets the weight of a trainer's likelihood term after every step."""

    def __init__(self, trainer: AdaptiveNLLDPOTrainer, config: AdaptiveNLLDPOConfig) -> None:
        super().__init__(every=1, alert=None, panels=False, on_error="raise", memory_budget=config.memory_budget)
        self._trainer, self._smoothing, self._largest = trainer, config.nll_smoothing, config.nll_max_weight
        self._change = self._gain = 0.0  # sums over the last steps
        self._rate, self._multiplier = config.nll_rate, 0.0  # of chosen's fall
        self._target = config.nll_target
        self._missing = 0

    def state(self) -> dict[str, float]:
        """The sums."""
        return {"change": self._change, "multiplier": self._multiplier, "gain": self._gain}

    def load(self, state: dict[str, float]) -> None:
        """Take up the sums of a checkpoint."""
        self._change, self._multiplier, self._gain = state["change"], state["multiplier"], state["gain"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse an optimizer whose steps have no account, before its first step."""
        optimizer = kwargs.get("optimizer")
        if optimizer is not None and not is_diagonal(optimizer):
            raise InputError(
                f"{describe_optimizer(optimizer)}: a step of it is not split into its sources, so that {METHOD} cannot "
                "be told; accepted are torch.optim.SGD, Adam and AdamW (optim='adamw_torch')."
            )
        super().on_step_begin(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take in the step's account; all ranks go on with the first one's weight."""
        super().on_step_end(args, state, control, **kwargs)
        record = self.records[-1] if self.records else None
        if isinstance(record, StepRecord) and record.step == state.global_step:
            self._take(record)
        sums = [self._trainer.nll_weight, self._change, self._multiplier, self._gain]
        if args.world_size > 1:
            broadcast_object_list(sums)
        self._trainer.nll_weight, self._change, self._multiplier, self._gain = sums

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Log nothing of its own: the trainer logs the weight."""
        self._window, self._scalars = [], {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave without a word."""
        self.leave()

    def _take(self, record: StepRecord) -> None:
        account, trainer = record.attribution, self._trainer
        effect = None
        if account is not None and not record.inactive:
            effect = estimate_nll(account, record.verdict.d_w, record.gram.chosen_len)
        self._missing = 0 if effect is not None else self._missing + 1
        if self._missing == PATIENCE:
            self.notices.once(
                f"{METHOD} stays at nll_weight = {trainer.nll_weight:g}: {PATIENCE} steps in a row had no account of "
                "the whole step, of two pairs or more that the loss moves. Give each device two pairs or more, or a "
                "larger memory_budget."
            )
        if effect is None:
            return
        # In units of what the term adds to the batch's own pairs, and no step asks for more than the largest weight:
        # of Adam, the first steps are of another scale, and rest on a preconditioner of few gradients.
        unit = float(effect.gain[0, 0])
        if unit <= 0:
            return
        gain = float(effect.gain[1, 0]) / unit
        change, most = float(effect.fresh[1, 0]) / unit - trainer.nll_weight * gain, self._largest * abs(gain)
        self._change = self._smoothing * self._change + min(most, max(-most, change))
        self._gain = self._smoothing * self._gain + gain
        above = trainer.chosen_level() - self._target
        self._multiplier = min(self._largest, max(0.0, self._multiplier - self._rate * above))
        if self._gain > 0:
            asked = max(0.0, -self._change / self._gain)
            trainer.nll_weight = min(self._largest, asked + self._multiplier)
