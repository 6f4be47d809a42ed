"""One rank of a token-masked run under DDP, started by test_masked_runs.py; writes how its weights moved."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import torch

from gradent.record.masks import read_masks
from gradent.trainer.token_masking.config import TokenMaskedDPOConfig
from gradent.trainer.token_masking.trainer import TokenMaskedDPOTrainer
from tests.trainer.rank_ddp import leave, pairs, tokenizer
from tests.trainer.runs import llama, with_lora

STEPS = 3


def flat(module: torch.nn.Module) -> torch.Tensor:
    named = {name: parameter for name, parameter in module.named_parameters() if ".ref." not in name}
    return torch.cat([parameter.detach().flatten().clone() for parameter in named.values()])


def main(out: Path, kind: str, batch: int) -> None:
    torch.set_num_threads(1)
    model = llama(vocab_size=97)
    reference = deepcopy(model) if kind == "full" else None
    if reference is not None:
        with torch.no_grad():
            for number, parameter in enumerate(reference.parameters()):
                draw = torch.Generator().manual_seed(number)
                parameter += 0.05 * torch.randn(parameter.shape, generator=draw)
    model = model if kind == "full" else with_lora(model)
    trainer = TokenMaskedDPOTrainer(
        model=model,
        ref_model=reference,
        args=TokenMaskedDPOConfig(
            output_dir=str(out / "run"), max_steps=STEPS, per_device_train_batch_size=batch,
            per_device_eval_batch_size=2 * batch, gradient_accumulation_steps=2, logging_steps=1, report_to="none",
            use_cpu=True, bf16=False, learning_rate=0.1, optim="sgd", max_grad_norm=0.5, lr_scheduler_type="constant",
            save_strategy="no", disable_tqdm=True, mask_learning_rate=0.5, mask_eta=0.3, mask_hidden=4,
        ),
        train_dataset=pairs(),
        eval_dataset=pairs(),
        processing_class=tokenizer(),
    )  # fmt: skip
    with torch.no_grad():  # the first rank's head is the one that counts
        draw = torch.Generator().manual_seed(1 + trainer.args.process_index)
        trainer.mask_head.outer.weight.normal_(0, 3, generator=draw)
        trainer.mask_head.outer.bias.zero_()
    start = flat(model)
    trainer.train()
    trainer.evaluate()
    path = trainer.export_masks(pairs(), out / "masks.parquet")
    logs = [
        {key: value for key, value in entry.items() if key.removeprefix("eval_").startswith(("mask/", "loss", "logps"))}
        for entry in trainer.state.log_history
    ]
    seen = {
        "model": (flat(model) - start).tolist(),
        "head": flat(trainer.mask_head).tolist(),
        "logs": [entry for entry in logs if entry],
        "rows": len(read_masks(path)),
    }
    leave(out, trainer.args.process_index, seen)
