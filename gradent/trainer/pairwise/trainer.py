"""Pairwise normalized gradient descent, the paper's Section 5.1, as a TRL trainer: `PairwiseNormalizedDPOTrainer`.

DPO steps along `d_w g_w - d_l g_l`, with `g_w = ∇_θ log π(y_w|x)` and `g_l = ∇_θ log π(y_l|x)`. Where the two gradients
point the same way, the longer one decides for both, and both log-probs fall (or rise). This trainer steps along

    C_i (g_w/‖g_w‖ - g_l/‖g_l‖)

instead, norms over all trainable parameters, for each pair i. To first order its own pair's chosen then rises by
`C_i ‖g_w‖(1 - cos)` and rejected falls by `C_i ‖g_l‖(1 - cos)`: Condition 2 holds whatever the cosine.

`C_i` by default is the one at which this is nearest to the loss's own step: of all multiples of
`v = g_w/‖g_w‖ - g_l/‖g_l‖`, the least-squares best approximation of `u = d_w g_w - d_l g_l` is `⟨u,v⟩/‖v‖² v`, where
`⟨u,v⟩ = (d_w‖g_w‖ + d_l‖g_l‖)(1 - cos)` and `‖v‖² = 2(1 - cos)`, so that

    C_i = (d_w‖g_w‖ + d_l‖g_l‖) / 2,

the mean length of the loss's two parts. The cosine has dropped out: `C_i` never blows up. The step is the loss's own
where the parts are equally long, scales with the loss, and descends on it, since `⟨u, C_i v⟩ = ‖C_i v‖²`.

What this promises is a pair's own step, small, by plain gradient descent. Other pairs of the batch move its log-probs
as well, Adam rescales the step parameter by parameter, and a large step leaves the first order: chosen can still fall
then, in what was tried mostly, but not always, by less than under DPO.

Letters: B pairs of a batch; n_w, n_l = ‖g_w‖, ‖g_l‖; N = 2B rows, K predicted tokens a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.dpo_trainer import DPOTrainer

from gradent import losses
from gradent.errors import InputError, ModelError, NonFiniteError
from gradent.hooks.piggyback.coefficients import FusedReadout
from gradent.hooks.piggyback.config import WatchConfig
from gradent.kernels.common.budget import DEFAULT_BUDGET, parse_budget
from gradent.losses.designs import counting, normalized_weights
from gradent.model.parameters import trainable
from gradent.notices import Notices, warn
from gradent.trainer.common.trl_requirements import make_config, reference_in_batch, require_unsharded
from gradent.trainer.pairwise.config import METHOD, PairwiseNormalizedDPOConfig
from gradent.trainer.pairwise.row_norms import RowNorms, WatchedModel

__all__ = ["PairwiseNormalizedDPOConfig", "PairwiseNormalizedDPOTrainer"]


class PairwiseNormalizedDPOTrainer(DPOTrainer):
    """`DPOTrainer` with the paper's pairwise normalized gradient (Section 5.1); see the head of this file.

    Used as `DPOTrainer` is, with a `PairwiseNormalizedDPOConfig`. One backward through the activations measures the
    norms, on the forward that TRL makes anyway; a second one, re-weighted, is the training step. The loss and the
    metrics that are logged (and all of evaluation) stay those of TRL's loss, beside these:

    - `pairwise/chosen_norm`, `pairwise/rejected_norm`, `pairwise/cosine`: `‖g_w‖`, `‖g_l‖`, their cosine.
    - `pairwise/weight_ratio`: `‖g_l‖/‖g_w‖`, which is `d_w/d_l` of the step that is taken.
    - `pairwise/zero_norm`: share of responses without a gradient, or with a millionth of the other's norm. They get
      weight 0; the other response of the pair then takes the loss's own step.
    - `pairwise/reversed`: share of pairs with `C_i < 0`: the loss itself wants the margin smaller (IPO, SPPO, past
      their target), and the step is the other way round.
    - `pairwise/preference_loss`: mean of the `preference_loss`, where there is one.

    Raises:
        InputError: args of another kind, or a run that cannot be exact (sharded parameters, images).
    """

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        config = make_config(args, PairwiseNormalizedDPOConfig, METHOD)
        self._notices = Notices(warn)
        self._pairwise = config
        self._preference = config.make_loss()
        super().__init__(model, ref_model, config, **kwargs)
        images = "whose patches cannot be told apart by response"
        require_unsharded(self, f"{METHOD} needs every parameter whole", images)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss; in training, with the pairwise normalized gradient.

        Args:
            model: the policy, as the trainer wraps it.
            inputs: TRL's batch.
            return_outputs: only without gradients.
            num_items_in_batch: as TRL takes it.

        Returns:
            The loss, whose value is TRL's and whose gradient is `-Σ_i C_i (g_w/‖g_w‖ - g_l/‖g_l‖) / B`.

        Raises:
            InputError: reentrant checkpointing, or DDP with a static graph.
            ModelError: the loss weighs the tokens of one response differently.
            NonFiniteError: a nan or inf in a norm or in the loss's weights.
        """
        compute_loss = super().compute_loss
        if not (model.training and torch.is_grad_enabled()):
            return compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        if getattr(model, "static_graph", False):
            raise InputError(
                "DDP with static_graph=True allows one backward a forward, and there are two; leave it out."
            )
        inner, budget = self.accelerator.unwrap_model(model), parse_budget(self._pairwise.memory_budget)
        config = WatchConfig(
            model=inner, parameters=self.measured(inner), budget=budget or DEFAULT_BUDGET, is_trusted=True
        )
        with closing(WatchedModel(model, config)) as watched:
            batch = self._with_reference(dict(inputs))
            with reference_in_batch(self, "ref_chosen_logps" in batch):
                loss = compute_loss(watched, batch, False, num_items_in_batch)  # type: ignore[no-untyped-call]
            d_w, d_l = self._weights(watched, batch, loss)
            norms = watched.measure(self._notices)
        c_w, c_l, scales = self.reweigh(norms, d_w, d_l)
        self._log_pairwise(norms, scales)
        rows = torch.cat([-c_w, c_l]) / len(c_w)
        tokens = rows.to(watched.root.device)[:, None] * watched.mask
        weights = tokens.to(watched.root.dtype)
        result = _Reweighted.apply(loss.detach(), watched.root, weights)  # type: ignore[no-untyped-call]
        if watched.aux_loss is not None and self.aux_loss_enabled:  # of the routers: no part of the pairs' step
            result = result + self.router_aux_loss_coef * (watched.aux_loss - watched.aux_loss.detach())
        return result

    def measured(self, model: nn.Module) -> Any:
        """Which parameters the norms are taken over: all that are trained. A trainer with another rule overrides it."""
        return trainable(model)

    def reweigh(self, norms: RowNorms, d_w: Tensor, d_l: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The weights of `g_w` and `-g_l` in the step, and C_i. A trainer with another rule overrides it.

        Args:
            norms: of the batch's B pairs.
            d_w: the loss's own weight of `g_w`, float64 `[B]`.
            d_l: its own weight of `-g_l`, float64 `[B]`.

        Returns:
            Float64 `[B]` each.
        """
        return normalized_weights(
            norms.chosen, norms.rejected, d_w, d_l, scale=self._pairwise.scale, factor=self._pairwise.C
        )

    def _with_reference(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch, with the reference's log-probs where `preference_loss` needs them (TRL then takes them too)."""
        if self._preference is None or not self._preference.needs_reference or "ref_chosen_logps" in batch:
            return batch
        reference = self.model if self.ref_model is None else self.ref_model
        chosen, rejected = self.compute_ref_log_probs(reference, batch)  # type: ignore[no-untyped-call]
        return {**batch, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _weights(self, watched: WatchedModel, batch: Mapping[str, Any], loss: Tensor) -> tuple[Tensor, Tensor]:
        """`d_w` and `d_l` of every pair, float64 `[B]` on the CPU."""
        if self._preference is not None:
            return self._weights_of(self._preference, watched, batch)
        (grad,) = torch.autograd.grad(loss, watched.leaf, retain_graph=True)
        coefficients = FusedReadout(watched.leaf, watched.mask, batch["input_ids"].shape[1]).read(grad)
        if not bool(coefficients.c.isfinite().all()):
            raise NonFiniteError(
                "the gradient of the loss by a log-prob is nan or inf; look for a log-prob that is not finite."
            )
        if not coefficients.is_constant:
            raise ModelError(
                f"the loss weighs the tokens of a response differently (by up to {coefficients.spread:.1e} of their "
                "mean weight), so that it is no function of log π(y|x). Use a loss of whole responses' log-probs."
            )
        c_w, c_l = coefficients.c.chunk(2)
        return -c_w * len(c_w), c_l * len(c_l)

    def _weights_of(
        self, preference: losses.Loss, watched: WatchedModel, batch: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """`d_w` and `d_l` of a loss of `gradent.losses`."""
        logps = (watched.leaf.detach().double() * watched.mask).sum(1).chunk(2)
        lengths = watched.mask.sum(1).chunk(2)
        operands: dict[str, Any] = {}
        for name, logp, length in zip(("chosen", "rejected"), logps, lengths, strict=True):
            operands |= {
                f"{name}_logp": logp, f"{name}_len": length, f"ref_{name}_logp": batch.get(f"ref_{name}_logps"),
            }  # fmt: skip
        value = preference.value(**operands).mean()
        self._metrics["train"]["pairwise/preference_loss"].append(self.accelerator.gather(value).mean().item())
        d_w, d_l = preference.weights(**operands)
        return d_w.cpu(), d_l.cpu()

    def _log_pairwise(self, norms: RowNorms, scales: Tensor) -> None:
        """Add to TRL's metrics: means over the pairs of all ranks, of those where they are defined."""
        counts = torch.stack(counting(norms.chosen, norms.rejected))
        both = counts.all(0)
        ones = torch.ones_like(both)
        columns = {
            "chosen_norm": (norms.chosen, ones), "rejected_norm": (norms.rejected, ones),
            "cosine": (norms.cosine, both), "weight_ratio": (norms.rejected / norms.chosen, both),
            "zero_norm": ((~counts).double().mean(0), ones), "reversed": ((scales < 0).double(), ones),
        }  # fmt: skip
        sums = [[float(values[defined].sum()), float(defined.sum())] for values, defined in columns.values()]
        gathered = self.accelerator.gather(torch.tensor([sums], device=self.accelerator.device)).double().sum(0)
        for name, (total, count) in zip(columns, gathered.tolist(), strict=True):
            if count:
                self._metrics["train"][f"pairwise/{name}"].append(total / count)


class _Reweighted(torch.autograd.Function):
    """A loss's value, with given weights as its gradient by the log-probs."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, log_probs: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(weights)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (weights,) = ctx.saved_tensors
        return None, weights * grad.to(weights.dtype), None
