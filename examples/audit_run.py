"""Train with TRL, save checkpoints, audit the run: what `gradent audit` does, from Python.

python examples/audit_run.py
"""

import json
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig
from rich.console import Console
from tiny import make_model, make_pairs, make_tokenizer
from trl import DPOConfig, DPOTrainer

from gradent import audit, losses


def main() -> None:
    """Train a tiny LoRA, measure every checkpoint, and print what the page says."""
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(prefix="gradent-audit-"))
    base, run, data = folder / "base", folder / "run", folder / "pairs.jsonl"
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    pairs = make_pairs()
    data.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    trainer = DPOTrainer(
        model=str(base),
        args=DPOConfig(
            output_dir=str(run), max_steps=12, save_steps=4, per_device_train_batch_size=8, logging_steps=1,
            learning_rate=3e-3, report_to="none", use_cpu=not torch.cuda.is_available(), bf16=False, disable_tqdm=True,
        ),
        train_dataset=pairs,
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()

    result = audit(run, data, loss=losses.get("dpo", beta=0.1), out=folder / "audit", token_pairs=4, quiet=True)

    console = Console()
    for each in result.summary["checkpoints"]:
        cosine, down, logps = each["cosine"]["p50"], each["cases"]["both_down"]["share"], each["logps"]
        console.print(
            f"step {each['step']}: median cosine {cosine:+.3f}, both down {down:.0%}, mean log-probs "
            f"{logps['chosen_logp']:.1f} and {logps['rejected_logp']:.1f}"
        )
    console.print(result.summary["recommendation"]["text"])
    console.print(f"The page: {result.report_path}")


if __name__ == "__main__":
    main()
