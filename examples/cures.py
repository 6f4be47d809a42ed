"""Do the cures help? DPO with likelihood terms, CPO, SimPO and both designs of Section 5 on one task, seed by seed.

    python examples/cures.py --out docs
    python examples/cures.py --out docs --tweets tweets.jsonl

A model is fine-tuned (SFT), and from there every method trains on the same pairs in the same order: the demo's four
styles of response, with SGD and with AdamW. The held-out pairs are measured every few steps. The learning rates are
chosen as cures_parts/tuning.py says: every method ends with DPO's gain of the margin.

The first command takes generated statements, the second real tweets (a JSON object a line, with `text` and `label`,
"positive" or "negative"); `--model DIR` fine-tunes that model on them, in place of one of the demo's size. Each writes
`cures-measured.md`, a figure an optimizer in `img/`, and every number in `data/cures.csv`; what another wrote there
stays, and the page is about all. `--redraw` makes page and figures from the numbers alone. `--small` shows in half a
minute that it runs: what it finds means nothing.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from cures_parts import figure, page, records
from cures_parts.methods import METHODS, Run, train
from cures_parts.plan import GENERATED, PRETRAINED, SMALL, TWEETS, Optimizer, Plan
from cures_parts.probe import Probe, Watch
from cures_parts.starts import Generated, Start, Tweets
from cures_parts.tuning import choose_masks, choose_rate

from gradent.demo.train import one_thread
from gradent.record.atomic import make_directory

Row = dict[str, Any]


class Experiment:
    """Runs, and the rows that they give.

    Args:
        plan: what is run.
        data: gives a seed's start.
        methods: names of `METHODS`; all by default. DPO is run on the tuning seed in any case.
        check: is given the rows of tuning, and raises where the rest is not worth running.
    """

    def __init__(
        self, plan: Plan, data: Generated | Tweets, methods: Sequence[str] = (),
        check: Callable[[list[Row]], object] | None = None,
    ) -> None:  # fmt: skip
        self.rows: list[Row] = []
        self._plan, self._data, self._check = plan, data, check
        self._methods = [name for name in METHODS if name in methods or not methods]

    def run_all(self) -> None:
        """Tune on the tuning seed, then run every method on the others."""
        plan = self._plan
        start = self._data.start(plan.tuning_seed)
        chosen = {name: self._tune(start, optimizer) for name, optimizer in plan.optimizers.items()}
        if self._check is not None:
            self._check(self.rows)
        for seed in plan.seeds:
            start = self._data.start(seed)
            for name, optimizer in plan.optimizers.items():
                rates, masks = chosen[name]
                for (method, style), rate in rates.items():
                    self._run(start, optimizer, "run", method, style, seed, rate, masks)

    def _tune(self, start: Start, optimizer: Optimizer) -> tuple[dict[tuple[str, str], float], dict[str, float]]:
        plan, seed = self._plan, self._plan.tuning_seed

        def gain(phase: str, method: str, style: str, rate: float, masks: dict[str, float]) -> tuple[float, float]:
            watch = self._run(start, optimizer, phase, method, style, seed, rate, masks)
            first, *_, last = watch.looks.values()
            return last["chosen"] - first["chosen"], watch.margin_gain

        wanted = {style: gain("rate", "DPO", style, optimizer.rate, {})[1] for style in plan.styles}
        masks: dict[str, float] = {}
        if "masked" in self._methods:
            masks, _ = choose_masks(
                lambda setting: gain("masks", "masked", plan.masks_style, optimizer.rate, setting),
                optimizer.masks, wanted[plan.masks_style],
            )  # fmt: skip
        rates: dict[tuple[str, str], float] = {}
        for style in plan.styles:
            for method in self._methods:
                if method == "DPO":
                    rates[method, style] = optimizer.rate
                    continue
                rates[method, style], _ = choose_rate(
                    lambda rate, method=method, style=style: gain("rate", method, style, rate, masks)[1],
                    optimizer.rate * optimizer.first.get(method, 1.0), wanted[style], moves=plan.moves,
                )  # fmt: skip
        return rates, masks

    def _run(
        self, start: Start, optimizer: Optimizer, phase: str, method: str, style: str, seed: int, rate: float,
        masks: dict[str, float],
    ) -> Watch:  # fmt: skip
        """One run, its rows, and a line about it."""
        plan, since = self._plan, time.monotonic()
        probe = Probe(start.tokenizer, start.task, style, seed)
        watch = Watch(probe, plan.every if phase == "run" else 0)
        masks = masks if method == "masked" else {}
        run = Run(
            method=method, style=style, optimizer=optimizer.name, rate=rate, steps=plan.steps, batch=plan.batch,
            seed=seed, masks=masks,
        )  # fmt: skip
        trainer = train(run, start.model, start.tokenizer, start.task, watch)
        common = {
            "data": plan.data, "optimizer": optimizer.label, "phase": phase, "method": method, "style": style,
            "seed": seed, "rate": rate, **masks,
        }  # fmt: skip
        mine: list[Row] = [{**common, "step": step, **look} for step, look in watch.looks.items()]
        if method == "masked":
            mine[-1] |= probe.kept(trainer)
        mine[-1]["seconds"] = time.monotonic() - since
        self.rows += mine
        change = mine[-1]["chosen"] - mine[0]["chosen"]
        print(
            f"{plan.data}, {optimizer.label}, {phase}, seed {seed}, {style}, {method} at {rate:g} {masks or ''}: "
            f"chosen {change:+.2f}, margin {watch.margin_gain:+.2f} ({mine[-1]['seconds']:.0f} s)",
            flush=True,
        )
        return watch


def publish(out: Path, rows: list[Row], about: dict[str, Any]) -> None:
    """Write the figures and the page.

    Args:
        out: where to.
        rows: all that there are.
        about: settings by data.

    Raises:
        BadParameter: there are none.
    """
    if not rows:
        raise typer.BadParameter(f"{out}: no data/cures.csv in it to draw from. Leave --redraw out.")
    for data, optimizer in page.parts(rows):
        shown = [row for row in rows if (row["data"], row["optimizer"], row["phase"]) == (data, optimizer, "run")]
        figure.draw(out / "img" / page.image(data, optimizer), shown, page.caption(data, optimizer, about[data]))
    (out / "cures-measured.md").write_text(page.write(rows, about), encoding="utf-8")
    print(f"Wrote {out / 'cures-measured.md'}, and img/ beside it.")


def choose_plan(small: bool, tweets: Path | None, model: Path | None) -> tuple[Plan, Generated | Tweets]:
    """What is to be run.

    Args:
        small: little of everything.
        tweets: file of statements.
        model: directory of a model for them.

    Returns:
        The plan, and the data.

    Raises:
        BadParameter: a model without statements.
    """
    if tweets is None:
        if model is not None:
            raise typer.BadParameter("--model DIR is for the statements of --tweets FILE: give both.")
        plan = SMALL if small else GENERATED
        return plan, Generated(plan)
    plan = TWEETS if model is None else replace(PRETRAINED, data=f"tweets, {model.name}", model=model.name)
    if small:
        plan = replace(SMALL, data=plan.data, model=plan.model, file=plan.file)
    return plan, Tweets(plan, tweets, model)


def main(
    out: Annotated[Path, typer.Option(help="Where cures-measured.md, img/ and data/ go.")],
    tweets: Annotated[Path | None, typer.Option(help="JSONL of statements, in place of generated ones.")] = None,
    model: Annotated[Path | None, typer.Option(help="Directory of a model to fine-tune on --tweets.")] = None,
    redraw: Annotated[bool, typer.Option("--redraw", help="Run nothing; page and figures from data/ alone.")] = False,
    methods: Annotated[str, typer.Option(help="These alone, with commas; the rows of others stay.")] = "",
    small: Annotated[bool, typer.Option("--small", help="A minute's worth; the figures mean nothing.")] = False,
) -> None:
    """Train, measure, write."""
    if redraw:
        publish(out, *records.read(out))
        return
    since = time.monotonic()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL's experimental trainers announce themselves
    plan, data = choose_plan(small, tweets, model)
    for folder in (out, out / "img", out / "data"):
        make_directory(folder)  # before the work that would be lost without it
    names = [name.strip() for name in methods.split(",") if name.strip()]
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise typer.BadParameter(f"--methods {unknown[0]!r}: unknown; accepted are {', '.join(METHODS)}.")
    experiment = Experiment(plan, data, names, partial(records.require_equal_runs, out) if names else None)
    settings = {**plan.to_record(), "machine": records.machine()}
    if names:
        records.require_same(out, plan.data, settings)
    with one_thread():
        experiment.run_all()
    seconds = round(time.monotonic() - since)
    about = {plan.data: {**settings, "seconds": seconds}}
    publish(out, *records.write(out, experiment.rows, about, names))


if __name__ == "__main__":
    typer.run(main)
