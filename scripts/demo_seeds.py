"""Write docs/demo.md: which of the paper's findings `gradent demo` shows, seed by seed, and what they hang on.

    python -m scripts.demo_seeds

Takes about 20 minutes on two CPU cores. Each run is the demo's own; the variants change one thing each.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import transformers
import trl
from rich.progress import track

from gradent.demo.findings import Finding, judge
from gradent.demo.run import experiment
from gradent.demo.settings import EMBEDDED, DemoSettings
from gradent.demo.task import STYLES, USUAL_IF_RIGHT
from gradent.record.curves import read_curves

TARGET = Path(__file__).resolve().parents[1] / "docs" / "demo.md"
JOBS = 2

VARIANTS: dict[str, tuple[DemoSettings, Sequence[int]]] = {
    "The demo": (EMBEDDED, range(6)),
    "Without Theorem 3's assumption": (replace(EMBEDDED, usual_if_wrong=USUAL_IF_RIGHT), range(3)),
    "AdamW at 1e-4": (replace(EMBEDDED, dpo_optimizer="adamw_torch", dpo_lr=1e-4), range(3)),
}

EXPLAINED = {
    "The demo": "What `gradent demo --seed N` runs.",
    "Without Theorem 3's assumption": (
        "SFT words an answer with the wrong label as it words one with the right label, so the policy is as sure of a\n"
        "suffix after either. Everything else is the demo's."
    ),
    "AdamW at 1e-4": (
        "DPO with TRL's default optimizer at a rate that pushes far in the same number of steps. Everything else is\n"
        "the demo's."
    ),
}

HEAD = """# The demo, seed by seed

Which findings of the paper's Section 4.3 show in `gradent demo`, and what they hang on. Written by
`python -m scripts.demo_seeds`: every number is measured, each line is one run with its own data, weights and order of
pairs. A finding appears if every mean over the {probe} held-out pairs has the sign that it names by more than two
standard errors.

The set-up helps the effect along, and two of its choices matter:

- **SFT teaches what Theorem 3 assumes.** Its answers with the right label mostly use the styles' own words, those with
  the wrong label mostly others, so that the policy is surer of a suffix after the chosen label than after the rejected
  one. The second table is without this.
- **DPO takes small steps of plain gradient descent**, which is what the paper's conditions are about. The third table
  is with AdamW, pushed further.

Columns: change of the mean log-prob of chosen (rejected) from step 0 to step {steps}, nats; mean gradient cosine over
the measured steps. Made on a CPU with Python {python}, torch {torch}, transformers {transformers}, TRL {trl}.
"""


@dataclass(frozen=True)
class Run:
    """One run: by style, the changes of both log-probs and the mean cosine; and its findings."""

    numbers: dict[str, tuple[float, float, float]]
    findings: list[Finding]


def run(variant: str, seed: int) -> Run:
    """One run of a variant, in a process of its own.

    Args:
        variant: a key of `VARIANTS`.
        seed: of the run.

    Returns:
        What was measured.
    """
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    columns, _ = experiment(VARIANTS[variant][0], seed=seed, quiet=True)
    curves = [read_curves(columns, name) for name in ("chosen_logp", "rejected_logp", "cosine")]
    numbers = {
        style: (
            float(curves[0][style].change.mean()),
            float(curves[1][style].change.mean()),
            float(curves[2][style].over_steps.mean()),
        )
        for style in STYLES
    }
    return Run(numbers, judge(columns))


def write_variant(variant: str, runs: dict[int, Run]) -> str:
    """The section of a variant.

    Args:
        variant: a key of `VARIANTS`.
        runs: its runs by seed.

    Returns:
        Markdown.
    """
    lines = [f"\n## {variant}\n", EXPLAINED[variant], "", f"| seed | {' | '.join(STYLES)} |", "|---" * 5 + "|"]
    for seed, each in runs.items():
        cells = [
            f"{chosen:+.2f} ({rejected:+.2f}), {cosine:+.2f}" for chosen, rejected, cosine in each.numbers.values()
        ]
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    lines += ["", "| finding | appears in |", "|---|---|"]
    for number, finding in enumerate(next(iter(runs.values())).findings):
        seeds = [seed for seed, each in runs.items() if each.findings[number].appears]
        lines.append(f"| {finding.claim} | {len(seeds)} of {len(runs)} seeds |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run everything and write the page."""
    jobs = [(variant, seed) for variant, (_, seeds) in VARIANTS.items() for seed in seeds]
    with ProcessPoolExecutor(JOBS, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run, *job) for job in jobs]
        results = {job: future.result() for job, future in track(list(zip(jobs, futures, strict=True)), "runs")}
    head = HEAD.format(
        probe=EMBEDDED.probe,
        steps=EMBEDDED.dpo_steps,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        trl=trl.__version__,
    )
    sections = [
        write_variant(variant, {seed: results[variant, seed] for seed in seeds})
        for variant, (_, seeds) in VARIANTS.items()
    ]
    TARGET.write_text(head + "".join(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
