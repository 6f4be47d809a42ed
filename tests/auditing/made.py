"""Files that audits are tried on: pairs in every format, data files in every kind, adapters and broken models."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from gradent.loading.preferences import AuditPair

PAIRS = [
    {"prompt": "The film was", "chosen": " a quiet joy.", "rejected": " a loud bore."},
    {"prompt": "The soup was", "chosen": " warm and worth the wait.", "rejected": " cold."},
    {"prompt": "So", "chosen": " good", "rejected": " bad, bad, bad, and never again"},
    {"prompt": "Is it true?", "chosen": " Yes.", "rejected": " No."},
    {"prompt": "A long question about many things at once,", "chosen": " answered", "rejected": " left open"},
    {"prompt": "x", "chosen": "y", "rejected": "z"},
    {"prompt": "Häuser", "chosen": " — größer", "rejected": " 屋"},
]


def tokenized(row: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> AuditPair:
    """A pair of a data file, without its texts."""
    return AuditPair(
        row=row,
        where=f"pairs.jsonl:{row + 1}",
        prompt_ids=prompt,
        chosen_ids=chosen,
        rejected_ids=rejected,
        chosen_text="",
        rejected_text="",
    )


def said(text: str, role: str = "assistant") -> list[dict[str, str]]:
    """One message."""
    return [{"role": role, "content": text}]


FORMATS: dict[str, list[dict[str, Any]]] = {
    "strings": PAIRS,
    "strings that end in EOS": [{**PAIRS[0], "chosen": " fine.<eos>"}, PAIRS[1]],
    "implicit prompt": [{side: pair["prompt"] + pair[side] for side in ("chosen", "rejected")} for pair in PAIRS[:5]],
    "implicit prompt, one response inside the other": [{"chosen": "It rains", "rejected": "It rains again"}],
    "messages": [
        {"prompt": said(pair["prompt"], "user"), **{side: said(pair[side]) for side in ("chosen", "rejected")}}
        for pair in PAIRS
    ],
    "messages, several turns": [
        {
            "prompt": [*said("Be brief.", "system"), *said("hi", "user"), *said("hello"), *said("bye", "user")],
            "chosen": [*said("so soon?"), *said("yes", "user"), *said("well")],
            "rejected": said("see you"),
        }
    ],
    "messages, implicit prompt": [
        {side: [*said(pair["prompt"], "user"), *said(pair[side])] for side in ("chosen", "rejected")} for pair in PAIRS
    ],
}


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """One object a line; a string is a line as it stands."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), "utf-8")
    return path


def _json(path: Path, rows: Sequence[Any]) -> None:
    path.write_text(json.dumps(rows, indent=2), "utf-8")


def _dataset_dict(path: Path, rows: Sequence[Any]) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(list(rows))}).save_to_disk(path)


def _folder(path: Path, rows: Sequence[Any]) -> None:
    path.mkdir()
    write_jsonl(path / "train.jsonl", rows)


KINDS: dict[str, Callable[[Path, Sequence[Any]], Any]] = {
    "pairs.jsonl": write_jsonl,
    "pairs.json": _json,
    "lines.json": write_jsonl,
    "pairs.parquet": lambda path, rows: datasets.Dataset.from_list(list(rows)).to_parquet(path),
    "saved": lambda path, rows: datasets.Dataset.from_list(list(rows)).save_to_disk(path),
    "saved-dict": _dataset_dict,
    "folder": _folder,
}
"""File name to what writes rows under it: every kind of data that an audit reads from disk."""


def save_lora(path: Path, base: Path, **fields: Any) -> Path:
    """An adapter for the model in `base`, none of its parameters zero."""
    model = AutoModelForCausalLM.from_pretrained(base)
    chosen = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "init_lora_weights": False, **fields}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **chosen))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(path)
    return path


def logp(model: torch.nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> float:
    """`log π(y|x)` of one row by itself, the plain way, in float64."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        scores = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return float(scores.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum())
