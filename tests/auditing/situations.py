"""Runs as people have them, made by TRL in small on the CPU, and log-probs by hand on the model that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from gradent import PairBatch, audit
from gradent.auditing.api import AuditResult
from gradent.record import read_pairs
from tests.auditing.made import logp, write_jsonl
from tests.auditing.trained import make_base, word_pairs
from tests.truth import TOLERANCE, Truth, truth

ROWS = word_pairs(8)
LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}
SPLIT = [[row[key] for row in ROWS] for key in ("prompt", "chosen", "rejected")]
ENTRIES = ("chosen_sq", "rejected_sq", "inner", "chosen_logp", "rejected_logp")
Logps = torch.Tensor


def base_of(directory: Path) -> Any:
    """The tiny base of a situation, made where it is not there yet."""
    if not (directory / "base").is_dir():
        make_base(directory / "base")
        model = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)
        with torch.no_grad():
            model.lm_head.weight *= 30  # or hidden states would hardly move a log-prob
        model.save_pretrained(directory / "base")
    return AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)


def tokenizer_of(directory: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(directory / "base")


def trained_adapter(model: Any, path: Path, seed: int = 1, **fields: Any) -> Path:
    """An adapter that does much, as one of supervised training would."""
    adapted = get_peft_model(model, LoraConfig(**{**LORA, "target_modules": ["v_proj", "down_proj"], **fields}))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    adapted.save_pretrained(path)
    return path


def train(
    model: Any, directory: Path, *, rows: list[dict[str, Any]] | None = None, tokenizer: Any = None,
    peft: dict[str, Any] | None = None, ref_model: Any = None, **config: Any,
) -> Path:  # fmt: skip
    """A DPO run of 4 steps with checkpoints of steps 2 and 4, at `directory/run`, on `directory/pairs.jsonl`."""
    rows = ROWS if rows is None else rows
    write_jsonl(directory / "pairs.jsonl", rows)
    arguments = {
        "max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "report_to": "none", "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    DPOTrainer(
        model=model, args=DPOConfig(output_dir=str(directory / "run"), **{**arguments, **config}), ref_model=ref_model,
        train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer or tokenizer_of(directory),
        peft_config=None if peft is None else LoraConfig(**peft),
    ).train()  # fmt: skip
    return directory / "run"


def audited(directory: Path, run: Path | None = None, **options: Any) -> AuditResult:
    """The audit of a run on the pairs that it was trained on."""
    options = {"out": directory / "out", "report": False, "quiet": True, "attribution": False, **options}
    return audit(run or directory / "run", directory / "pairs.jsonl", **options)


def measured(result: AuditResult, step: int, *, reference: bool = False) -> Logps:
    """Log-probs of chosen and rejected, `[2, P]`, as the audit recorded them."""
    table = read_pairs(result.pairs_path).to_pydict()
    names = [f"{'ref_' * reference}{side}_logp" for side in ("chosen", "rejected")]
    return torch.tensor([[v for v, s in zip(table[name], table["step"], strict=True) if s == step] for name in names])


def plain(model: Any, tokenizer: Any, rows: list[dict[str, Any]] | None = None) -> Logps:
    """The same by plain log-probs, one row at a time."""
    found = []
    for side in ("chosen", "rejected"):
        values = []
        for row in ROWS if rows is None else rows:
            prompt = tokenizer(row["prompt"])["input_ids"]
            whole = tokenizer(row["prompt"] + row[side])["input_ids"]
            values.append(logp(model.eval(), prompt, [*whole[len(prompt) :], tokenizer.eos_token_id]))
        found.append(values)
    return torch.tensor(found, dtype=torch.float64)


def adapted(model: Any, path: Path) -> Any:
    return PeftModel.from_pretrained(model, path)


def same(found: Logps, expected: Logps) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=2e-5)


def right(model: Any, tokenizer: Any) -> Truth:
    """The truth over all rows, by plain autograd."""
    return truth(model, PairBatch.from_text(tokenizer, *SPLIT, add_eos=True))


def entries(result: AuditResult, step: int) -> dict[str, torch.Tensor]:
    """What an audit recorded of a step, as tensors."""
    table = read_pairs(result.pairs_path).to_pydict()
    at = [number for number, value in enumerate(table["step"]) if value == step]
    return {name: torch.tensor([table[name][n] for n in at], dtype=torch.float64) for name in ENTRIES}


def assert_right(result: AuditResult, step: int, model: Any, tokenizer: Any) -> None:
    """An audit's entries of a step are those of plain autograd on a model."""
    true, found = right(model, tokenizer), entries(result, step)
    scale = (true.chosen_sq * true.rejected_sq).sqrt()
    assert float(((found["inner"] - true.inner) / scale).abs().max()) < TOLERANCE["float32"]
    for name in ("chosen_sq", "rejected_sq"):
        torch.testing.assert_close(found[name], getattr(true, name), rtol=TOLERANCE["float32"] * 2, atol=0)
    for name in ("chosen_logp", "rejected_logp"):
        torch.testing.assert_close(found[name], getattr(true, name), rtol=2e-5, atol=2e-5)
