"""One rank of a run with an adaptive likelihood term under DDP, started by test_adaptive_nll.py."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch

from gradent.trainer.adaptive_nll.trainer import AdaptiveNLLDPOConfig, AdaptiveNLLDPOTrainer
from tests.trainer.rank_ddp import leave, tokenizer
from tests.trainer.runs import llama, with_lora
from tests.trainer.test_pairwise_runs import entangled

STEPS = 4


def main(out: Path, kind: str, batch: int) -> None:
    torch.set_num_threads(1)
    model = llama(vocab_size=97)
    reference = deepcopy(model) if kind == "full" else None
    model = model if kind == "full" else with_lora(model)
    start = torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
    trainer = AdaptiveNLLDPOTrainer(
        model=model,
        ref_model=reference,
        args=AdaptiveNLLDPOConfig(
            output_dir=str(out / "run"), max_steps=STEPS, per_device_train_batch_size=batch, logging_steps=1,
            report_to="none", use_cpu=True, bf16=False, learning_rate=0.02, optim="sgd", max_grad_norm=0.0,
            lr_scheduler_type="constant", save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=entangled(),
        processing_class=tokenizer(),
    )  # fmt: skip
    trainer.train()
    named = {name: parameter for name, parameter in model.named_parameters() if ".ref." not in name}
    moved = torch.cat([parameter.detach().flatten() for parameter in named.values()]) - start
    weights = [entry["nll_weight"] for entry in trainer.state.log_history if "nll_weight" in entry]
    seen = {"moved": moved.tolist(), "weights": weights, "last": trainer.nll_weight}
    leave(out, trainer.args.process_index, seen)
