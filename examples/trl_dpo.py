"""TRL's DPOTrainer with one line more: the callback.

python examples/trl_dpo.py
"""

import tempfile
from copy import deepcopy

import torch
from rich.console import Console
from tiny import make_model, make_pairs, make_tokenizer
from trl import DPOConfig, DPOTrainer

from gradent import EntanglementCallback


def main() -> None:
    """Train a few steps and show what was logged beside TRL's own metrics."""
    torch.manual_seed(0)
    callback = EntanglementCallback(every=2, by_module=True)
    with tempfile.TemporaryDirectory() as out:
        model = make_model()
        trainer = DPOTrainer(
            model=model,
            ref_model=deepcopy(model),
            args=DPOConfig(
                output_dir=out, max_steps=8, per_device_train_batch_size=8, logging_steps=4, learning_rate=1e-3,
                report_to="none", use_cpu=not torch.cuda.is_available(), bf16=False, disable_tqdm=True,
            ),
            train_dataset=make_pairs(),
            processing_class=make_tokenizer(),
            callbacks=[callback],
        )  # fmt: skip
        trainer.train()
    console = Console()
    for entry in trainer.state.log_history:
        logged = {key: round(value, 4) for key, value in entry.items() if key.startswith("gradent/")}
        if logged:
            console.print(f"step {entry['step']}:", logged)
    last = callback.records[-1]
    console.print(f"step {last.step}, read off by {last.source}: cosine of each pair", last.gram.cosine)


if __name__ == "__main__":
    main()
