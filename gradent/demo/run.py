"""`run_demo`: draw the task, train, measure, write the records and the report, print what was found.

What needs torch is imported by the call, so that `gradent --help` answers at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from gradent.demo.settings import EMBEDDED, PRETRAINED, DemoSettings
from gradent.errors import InputError
from gradent.record import PAIR_COLUMNS, write_demo, write_pairs
from gradent.record.atomic import make_directory
from gradent.report import write_demo_report

if TYPE_CHECKING:
    from gradent.demo.train import Measured

__all__ = ["run_demo"]

_NEEDED = {"trl": "trl", "datasets": "trl", "pyarrow": "audit", "plotly": "audit", "jinja2": "audit"}
_LARGEST_SEED = 2**32 - 1

Watch = Callable[[str], Callable[[int], None]]
"""Given what is trained, starts its bar and returns what moves it to a step."""


def run_demo(*, out: str | os.PathLike[str], model: str | None = None, steps: int | None = None, seed: int = 0) -> int:
    """Run the paper's sentiment experiment in miniature: SFT, then DPO once a style, measured every few steps."""
    started = time.monotonic()
    directory = make_directory(out, ("pairs.parquet", "demo.json", "report.html"))
    settings = _choose_settings(model, steps, seed)
    _require_packages()
    from gradent.demo.findings import judge  # noqa: PLC0415
    from gradent.report.terminal.demo import print_findings  # noqa: PLC0415

    columns, about = experiment(settings, model=model, seed=seed)
    findings = judge(columns)
    for name in ("demo.json", "report.html"):
        (directory / name).unlink(missing_ok=True)  # an earlier demo's must not stand beside this one's pairs
    write_pairs(directory / "pairs.parquet", columns)
    content = {
        **about,
        "settings": {"seed": seed, **asdict(settings)},
        "findings": [finding.to_record() for finding in findings],
        "seconds": round(time.monotonic() - started, 1),
    }
    record = write_demo(directory / "demo.json", content)
    report = write_demo_report(directory)
    console = Console(highlight=False)
    print_findings(columns, record, console)
    console.print(Text(f"\nWrote {report}, pairs.parquet and demo.json beside it."), soft_wrap=True)
    return 0


def experiment(
    settings: DemoSettings, *, model: str | None = None, seed: int = 0, quiet: bool = False
) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """Train and measure, without writing anything."""
    from gradent.demo.task import STYLES, find_label_words, make_task, text_rows  # noqa: PLC0415
    from gradent.demo.train import one_thread, train_dpo, train_sft  # noqa: PLC0415

    policy, tokenizer = _load(model, seed)
    task = make_task(
        seed=seed, train=settings.train, probe=settings.probe, answers=12 * settings.train,
        label_words=find_label_words(tokenizer), usual_if_wrong=settings.usual_if_wrong,
    )  # fmt: skip
    runs: dict[str, list[Measured]] = {}
    with one_thread() if model is None else nullcontext(), _progress(settings, list(STYLES), quiet) as watch:
        train_sft(policy, tokenizer, task, settings, seed=seed, advance=watch("SFT"))
        for style in STYLES:
            runs[style] = train_dpo(policy, tokenizer, task, style, settings, seed=seed, advance=watch(style))
    about = {
        "source": model,
        "architecture": type(policy).__name__,
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "label_words": list(task.label_words),
    }
    examples = [{"style": style, **text_rows(task.probe[:1], style, task.label_words)[0]} for style in STYLES]
    return _to_columns(runs, settings.beta), {"model": about, "styles": examples}


def _load(model: str | None, seed: int) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    if model is None:
        from gradent.demo.model import build_model, build_tokenizer  # noqa: PLC0415

        tokenizer: Any = build_tokenizer()
        return build_model(len(tokenizer), seed), tokenizer
    from gradent.loading.models import check_vocabulary, load_model, load_tokenizer  # noqa: PLC0415
    from gradent.loading.source import resolve_source  # noqa: PLC0415

    source = resolve_source(model)
    if source.adapter is not None:
        raise InputError(f"{model}: a PEFT adapter; the demo trains all parameters. Give a full model.")
    tokenizer = load_tokenizer(source)
    if tokenizer.eos_token is None:
        raise InputError(f"{model}: its tokenizer has no EOS token, which ends SFT's answers. Set one and save it.")
    policy = load_model(source)
    check_vocabulary(tokenizer, policy.get_input_embeddings().weight.shape[0], model)
    return policy, tokenizer


def _choose_settings(model: str | None, steps: int | None, seed: int) -> DemoSettings:
    if not 0 <= seed <= _LARGEST_SEED:
        raise InputError(f"seed is {seed}; accepted are 0 to {_LARGEST_SEED} (command line: --seed).")
    if steps is not None and steps < 1:
        raise InputError(f"steps is {steps}; DPO needs at least 1 (command line: --steps).")
    settings = EMBEDDED if model is None else PRETRAINED
    return settings if steps is None else replace(settings, dpo_steps=steps)


def _require_packages() -> None:
    """Before any work: minutes of training must not end in a missing package."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        extra = "trl" if {_NEEDED[name] for name in missing} == {"trl"} else "audit"
        raise InputError(
            f"The demo needs {', '.join(missing)}, which is not installed. Install the extra that brings it: "
            f'pip install "gradent[{extra}]".'
        )
    installed = version("trl")
    if int(installed.split(".")[0]) < 1:  # its trainers lay their batches out differently
        raise InputError(
            f'The demo needs TRL 1.0 or newer, and {installed} is installed: pip install --upgrade "trl>=1".'
        )


@contextmanager
def _progress(settings: DemoSettings, styles: Sequence[str], quiet: bool) -> Iterator[Watch]:
    """One bar for SFT and one a style; each counts optimizer steps."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        totals = {"SFT": settings.sft_steps, **dict.fromkeys(styles, settings.dpo_steps)}
        tasks = {
            name: progress.add_task(name if name == "SFT" else f"DPO, {name}", total=total, start=False)
            for name, total in totals.items()
        }

        def watch(name: str) -> Callable[[int], None]:
            progress.start_task(tasks[name])
            return lambda step: progress.update(tasks[name], completed=step)

        yield watch


def _to_columns(runs: dict[str, list[Measured]], beta: float) -> dict[str, list[Any]]:
    """The columns of `pairs.parquet`; the reference of DPO is the model at step 0."""
    from gradent import losses  # noqa: PLC0415
    from gradent.theory.conditions import verdict  # noqa: PLC0415

    loss = losses.get("dpo", beta=beta)
    columns: dict[str, list[Any]] = {name: [] for name in PAIR_COLUMNS}
    for style, measured in runs.items():
        start = measured[0].gram
        for step, gram in ((measurement.step, measurement.gram) for measurement in measured):
            judged = verdict(gram, loss, start.chosen_logp, start.rejected_logp)
            values: dict[str, list[Any]] = {
                "checkpoint": [style] * len(gram), "step": [step] * len(gram), "pair": list(range(len(gram))),
                "ref_chosen_logp": start.chosen_logp.tolist(),
                "ref_rejected_logp": start.rejected_logp.tolist(),
            }  # fmt: skip
            for name in PAIR_COLUMNS:
                source = gram if hasattr(gram, name) else judged
                columns[name] += values[name] if name in values else getattr(source, name).tolist()
    return columns
