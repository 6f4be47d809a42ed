"""Make the README's pictures: trains a short DPO run, audits it, takes one pair apart, and photographs both pages.

python -m scripts.pictures MODEL PAIRS.jsonl    (a small causal LM and preference pairs; needs chromium)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from datasets import load_dataset
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from gradent import audit
from gradent.auditing.pair_tokens import audit_tokens
from gradent.auditing.state.config import TokenConfig

TARGET = Path(__file__).resolve().parents[1] / "docs" / "img"
WIDTH = 1100


def train(model: str, pairs: str, out: Path, *, steps: int, rate: float, rows: int) -> None:
    """A full DPO run with a checkpoint every eighth of it."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = load_dataset("json", data_files=pairs, split=f"train[:{rows}]")
    arguments = DPOConfig(
        str(out), max_steps=steps, save_steps=max(1, steps // 8), per_device_train_batch_size=8, learning_rate=rate,
        max_length=192, logging_steps=5, report_to="none", bf16=False, use_cpu=True, gradient_checkpointing=False,
        lr_scheduler_type="constant", save_only_model=True, disable_tqdm=True,
    )  # fmt: skip
    DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"), args=arguments, train_dataset=data,
        processing_class=tokenizer,
    ).train()  # fmt: skip


def photograph(page: Path, target: Path, *, height: int, section: int | None = None) -> None:
    """A page from its beginning, or one section of it."""
    if section is not None:
        hidden = (
            f"header, footer, nav, .readout, main > section:not(:nth-of-type({section})) {{ display: none; }}</style>"
        )
        text = page.read_text("utf-8").replace("</style>", hidden, 1)
        page = page.with_name("section.html")
        page.write_text(text, "utf-8")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise typer.BadParameter("needs chromium (apt-get install chromium)")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run([
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}",
            f"--window-size={WIDTH},{height}", "--virtual-time-budget=8000", f"--screenshot={target}",
            page.as_uri(),
        ], check=True, capture_output=True, timeout=120)  # fmt: skip
    with Image.open(target) as picture:
        picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(target, optimize=True)


def main(
    model: str,
    pairs: str,
    steps: Annotated[int, typer.Option(help="Of training.")] = 80,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-4,
    rows: Annotated[int, typer.Option(help="Pairs that are trained on and measured.")] = 128,
    pair: Annotated[int, typer.Option(help="Row of the data that is taken apart.")] = 3,
) -> None:
    """Write docs/img/audit.png and docs/img/pair.png."""
    text, model = Path(pairs).read_text("utf-8"), str(Path(model).resolve())
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        os.chdir(place)  # the pages name what they were made from
        run, data = Path("my-run"), Path("pairs.jsonl")
        data.write_text("".join(text.splitlines(keepends=True)[:rows]), "utf-8")
        train(model, str(data), run, steps=steps, rate=rate, rows=rows)
        found = audit(run, data, base=model, out="my-audit", max_length=192, quiet=True)
        assert found.report_path is not None
        photograph(found.report_path.resolve(), TARGET / "audit.png", height=1080)
        last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
        audit_tokens(
            TokenConfig(model=str(last), data=str(data), pair=pair, out=place / "tokens", max_length=192, quiet=True)
        )
        photograph(place / "tokens" / "tokens.html", TARGET / "pair.png", height=455, section=2)


if __name__ == "__main__":
    typer.run(main)
