"""Sparsity-regularised token masking, the paper's Section 5.2, as a TRL trainer: `TokenMaskedDPOTrainer`.

A head on the policy's last hidden states gives every response token a score u; the loss (`losses.token_masked`) sums
the log-ratios `log π - log π_ref` of both responses over kept tokens only, by the soft mask `σ(k(u - r))`, and pays η
for the mean mask. TRL's own loss runs on the masked log-probs: masks apart, a run is what it is with `DPOTrainer`.

Where the paper is silent: k grows over the run, `mask_k_start` to `mask_k_end`; all masks start at `mask_init`; hard
masks are for evaluation; scores of chosen and rejected come of one head; and the log-probs that are logged stay those
of whole responses.

Letters: B pairs, N = 2B rows of a batch, chosen first; K predicted tokens a row; u scores, m masks, r the threshold.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer.dpo_trainer import DPOTrainer

from gradent.errors import InputError
from gradent.losses.token_masked import sparsity
from gradent.trainer.common.trl_requirements import make_config, reference_in_batch, require_unsharded
from gradent.trainer.token_masking.config import METHOD, TokenMaskedDPOConfig
from gradent.trainer.token_masking.export import mask_batches, write_mask_table
from gradent.trainer.token_masking.head import HeadUpdate, MaskHead, load_head, reduce_gradients, save_head
from gradent.trainer.token_masking.policy import MaskedPolicy, TokenMasks, read_masks

__all__ = ["TokenMaskedDPOConfig", "TokenMaskedDPOTrainer"]


class TokenMaskedDPOTrainer(DPOTrainer):
    """`DPOTrainer` with learned token masks (Section 5.2); see the head of this file.

    Used as `DPOTrainer` is, with a `TokenMaskedDPOConfig`. `mask_head` is the head; every checkpoint holds its weights
    as `mask_head.safetensors` beside a model that is loaded as any other. Beside TRL's metrics, of which `rewards/*`
    are over kept tokens and `logps/*` over all, these are logged:

    - `mask/kept_chosen`, `mask/kept_rejected`: share of response tokens with `u >= r`.
    - `mask/mean_chosen`, `mask/mean_rejected`: mean of the masks that the loss was made of.
    - `mask/entropy`: mean entropy of the soft masks, in nats; near 0 where they have become hard.
    - `mask/score`: mean of u.
    - `mask/sparsity_loss`: the sparsity term, η times the mean mask of a response.
    - `mask/k`: the sharpness.

    Raises:
        InputError: args of another kind, or a run that cannot work (sharded parameters, images, a scheduler that is
            made already).
    """

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        config = make_config(args, TokenMaskedDPOConfig, METHOD)
        if (kwargs.get("optimizers") or (None, None))[1] is not None:
            raise InputError(
                "optimizers=(..., scheduler): the head's parameters join the optimizer when training starts, too late "
                "for a scheduler that is made of it. Pass (optimizer, None), and set lr_scheduler_type in the config."
            )
        self._masking = config
        super().__init__(model, ref_model, config, **kwargs)
        require_unsharded(self, f"{METHOD} needs whole rows and parameters", f"for which {METHOD} is not made")
        width = self._causal_model().get_output_embeddings().weight.shape[-1]
        head = MaskHead(width, hidden=config.mask_hidden, start=config.start_score, seed=config.seed)
        self.mask_head = head.to(self.accelerator.device).requires_grad_(not config.mask_freeze)
        self.add_callback(HeadUpdate(self.mask_head, self.accelerator))

    @property
    def _policy(self) -> nn.Module:
        assert self.model is not None
        return self.model

    @property
    def mask_k(self) -> float:
        """The sharpness k of the soft masks now."""
        return self._masking.k_at(self.state.global_step, self.state.max_steps)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's optimizer, with the head's parameters as its last group."""
        optimizer = super().create_optimizer(*args, **kwargs)
        parameters = list(self.mask_head.parameters())
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if id(parameters[0]) not in known:
            rate = self._masking.mask_learning_rate
            rate = self.args.learning_rate if rate is None else rate
            optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's step; on the last micro-batch, the head's gradients are averaged over the ranks."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self.accelerator.sync_gradients:
            reduce_gradients(self.mask_head, self.accelerator)
        return loss

    def _compute_loss(self, model: nn.Module, inputs: Mapping[str, Any], return_outputs: bool) -> Any:
        training, config = self._policy.training, self._masking
        masked = MaskedPolicy(
            read=lambda kwargs: self._read(model, kwargs), plain=model, reference=self._reference_logps,
            batch=dict(inputs), is_hard=config.mask_hard_eval and not training,
        )  # fmt: skip
        with reference_in_batch(self):  # where `masked` puts it
            result = super()._compute_loss(masked, masked.batch, return_outputs)  # type: ignore[no-untyped-call]
        loss, outputs = result if return_outputs else (result, None)
        penalty = config.mask_eta * sparsity(masked.mask, masked.masks.tokens.to(masked.mask.device)).mean()
        if config.mask_eta:
            loss = loss + penalty.to(loss.device)
        self._log_masks(masked, penalty.detach(), "train" if training else "eval")
        return (loss, outputs) if return_outputs else loss

    def _read(self, model: Any, kwargs: Mapping[str, Any]) -> tuple[Any, TokenMasks]:
        backbone = self._causal_model().base_model
        return read_masks(model, backbone, self.mask_head, self._masking, self.mask_k, kwargs)

    def _causal_model(self) -> Any:
        """The policy without wrappers and adapters."""
        inner = self.accelerator.unwrap_model(self.model)
        return inner.get_base_model() if hasattr(inner, "peft_config") else inner

    def _reference_logps(self, batch: Mapping[str, Any]) -> Tensor:
        """`log π_ref` of every token, `[N, K]`, by TRL's own reference pass."""
        model: Any = self.model if self.ref_model is None else self.ref_model
        outputs = []

        def reference(**kwargs: Any) -> Any:
            outputs.append(model(**kwargs))
            return outputs[-1]

        self.compute_ref_log_probs(reference, batch)  # type: ignore[no-untyped-call]
        logps: Tensor = outputs[-1].log_probs
        return logps

    def _log_masks(self, masked: MaskedPolicy, penalty: Tensor, mode: str) -> None:
        """Add to TRL's metrics means over the tokens of all ranks, and make its `logps/*` those of all tokens again."""
        masks, soft = masked.masks, masked.masks.soft.detach()
        entropy = torch.special.entr(soft) + torch.special.entr(1 - soft)
        columns = [masks.kept, masked.mask.detach(), entropy, masks.scores.detach(), torch.ones_like(soft)]
        sums = [torch.where(masks.tokens, column.to(masks.tokens.device).double(), 0.0).sum(1) for column in columns]
        sides = torch.stack([torch.stack(column.chunk(2)).sum(1) for column in sums]).float()  # [5, 2]
        flat = torch.cat([sides.flatten(), penalty.to(sides).reshape(1), torch.ones(1).to(sides)])
        total = self.accelerator.gather(flat[None].to(self.accelerator.device)).double().sum(0).tolist()
        kept_w, kept_l, mean_w, mean_l, entropy_w, entropy_l, u_w, u_l, n_w, n_l, paid, ranks = total
        means = {
            "kept_chosen": (kept_w, n_w), "kept_rejected": (kept_l, n_l), "mean_chosen": (mean_w, n_w),
            "mean_rejected": (mean_l, n_l), "entropy": (entropy_w + entropy_l, n_w + n_l),
            "score": (u_w + u_l, n_w + n_l), "sparsity_loss": (paid, ranks), "k": (self.mask_k, 1.0),
        }  # fmt: skip
        metrics = self._metrics[mode]
        for name, (value, count) in means.items():
            if count:
                metrics[f"mask/{name}"].append(value / count)
        for name, side in zip(("chosen", "rejected"), masked.logps.chunk(2), strict=True):
            metrics[f"logps/{name}"][-1] = self.accelerator.gather(side).mean().item()

    def export_masks(self, data: Any, path: str | os.PathLike[str]) -> Path:
        """Write every response token's score and mask, a row a token (`gradent.record.masks`).

        Args:
            data: preference data as the trainer takes it (a `Dataset`, or a list of its rows), or one batch of the
                trainer's data loader, whose pairs are then counted from 0.
            path: the parquet file.

        Returns:
            The file. On several ranks all must call this; the first one reads the masks and writes them.

        Raises:
            InputError: data of another kind, or without rows.
        """
        batches = mask_batches(data, self)
        if self.accelerator.is_main_process:
            training = self._policy.training
            self._policy.eval()
            try:
                write_mask_table(path, batches, read=self._masks_of, tokenizer=self.processing_class)
            finally:
                self._policy.train(training)
        self.accelerator.wait_for_everyone()
        return Path(path)

    def _masks_of(self, batch: Mapping[str, Any]) -> TokenMasks:
        """The masks of a batch, by a forward on this rank alone."""
        names = ("input_ids", "attention_mask", "completion_mask")
        ids, attention, marks = (batch[name].to(self.accelerator.device) for name in names)
        kwargs = {
            "input_ids": ids, "attention_mask": attention, "labels": ids.masked_fill(marks == 0, -100),
            "fused_lm_head": True, "use_cache": False,
        }  # fmt: skip
        with torch.no_grad(), self.accelerator.autocast():
            return self._read(self.accelerator.unwrap_model(self.model), kwargs)[1]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            facts = {"threshold": repr(self._masking.mask_threshold), "k": repr(self.mask_k)}
            save_head(self.mask_head, output_dir or str(self.args.output_dir), facts)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_head(self.mask_head, resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        load_head(self.mask_head, str(self.state.best_model_checkpoint))
