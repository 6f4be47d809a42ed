"""The pairs and adapters that stand-ins are graded on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["make_adapter", "read_pairs", "write_lines"]


def read_pairs(path: Path, count: int, letters: int, seed: int = 0) -> list[dict[str, str]]:
    """Some pairs of a file, in its order: prompt, chosen and rejected, or a text and its sentiment.

    Args:
        path: JSON lines with prompt, chosen and rejected; or with text and label (positive or negative).
        count: how many are drawn.
        letters: most characters of prompt and one response.
        seed: of the draw.

    Returns:
        The pairs.
    """
    rows = []
    for line in path.read_text("utf-8").splitlines():
        row = _pair(json.loads(line))
        longest = max(len(row["chosen"]), len(row["rejected"]))
        is_whole = row["chosen"].strip() and row["rejected"].strip() and row["chosen"] != row["rejected"]
        if is_whole and len(row["prompt"]) + longest <= letters:
            rows.append(row)
    drawn = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    return [rows[number] for number in drawn]


def _pair(row: dict[str, Any]) -> dict[str, str]:
    if "label" not in row:
        return {key: row[key] for key in ("prompt", "chosen", "rejected")}
    other = "negative" if row["label"] == "positive" else "positive"
    prompt = f"Text: {row['text'].strip()}\nThe sentiment of this text is"
    return {"prompt": prompt, "chosen": f" {row['label']}.", "rejected": f" {other}."}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines.

    Args:
        path: the file.
        rows: its rows.

    Returns:
        The file.
    """
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def make_adapter(model: Path, folder: Path) -> Path:
    """A LoRA adapter as training starts with it: rank 8 on queries and values, its second factor zero.

    Args:
        model: directory of the base.
        folder: where it is saved.

    Returns:
        The folder.
    """
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(model)
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder
