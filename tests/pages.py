"""The repository's pages as programs: their fenced blocks, and a folder that holds what they speak of."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradent.hooks.rules import RULES
from tests.auditing.trained import train_run

ROOT = Path(__file__).resolve().parents[1]

# Python that is compiled and not run: (page, a line of the block) -> why.
NOT_RUN = {
    ("recipes.md", "from axolotl.integrations.base import BasePlugin"): "Axolotl is not installed",
    ("recipes.md", "from llamafactory.train.tuner import run_exp"): "LLaMA-Factory is not installed",
    ("recipes.md", "from swift.callbacks import callbacks_map"): "ms-swift is not installed",
    ("recipes.md", "from openrlhf.trainer import dpo_trainer"): "OpenRLHF is not installed",
    ("cures-measured.md", 'rows = load_dataset("mteb/tweet_sentiment_extraction", split="train")'): "it loads of a hub",
}

# Pages whose Python defines all that it uses. The others speak of names that a reader has: these.
WHOLE = {"computed.md", "extending.md", "losses.md", "quickstart.md", "recipes.md"}
GIVEN = """
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from gradent import PairBatch
tokenizer = AutoTokenizer.from_pretrained("my-model")
model = AutoModelForCausalLM.from_pretrained("my-model")
dataset = load_dataset("json", data_files="pairs.jsonl", split="train")
batch = PairBatch.from_text(tokenizer, dataset["prompt"][:2], dataset["chosen"][:2], dataset["rejected"][:2])
"""


def fences(text: str, language: str) -> list[str]:
    """Fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str, program: str) -> list[list[str]]:
    """Command lines of console blocks that start with `program`, split, without their comments."""
    lines = [line for block in fences(text, "console") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.split()[:1] == [program]]


def run_python(snippets: list[str], name: str) -> dict[str, object]:
    """Run snippets as one program in the current directory; its names afterwards."""
    names: dict[str, object] = {"__name__": "page"}
    exec(compile("\n".join(snippets), name, "exec", dont_inherit=True), names)
    return names


@contextmanager
def given_in(folder: Path, world: Path) -> Iterator[None]:
    """`folder` with what a page takes as given: my-model, my-run, pairs.jsonl. Rules that it adds are taken back."""
    for name in ("my-model", "my-run", "pairs.jsonl"):
        (folder / name).symlink_to(world / name)
    rules = dict(RULES)
    yield
    RULES.clear()
    RULES.update(rules)


def train_my_run(folder: Path) -> Path:
    """A finished LoRA run as `folder/my-run`, the pairs it was trained on, and as `folder/my-model` its base."""
    made = train_run(folder, lora=True, data_rows=12)
    made.run.rename(folder / "my-run")
    (folder / "my-model").symlink_to(made.base)
    return folder
