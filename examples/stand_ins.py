"""How good are the cheap stand-ins for gradient entanglement, and does choosing data by them pay?

    python examples/stand_ins.py
    python examples/stand_ins.py grade --model my-model --data pairs.jsonl
    python examples/stand_ins.py choose --model my-model --data pairs.jsonl
    python examples/stand_ins.py page

Without a command both are done on a tiny model with made-up pairs, in seconds. `grade` scans pairs, measures all of
them exactly and keeps the rank correlations; `choose` trains on the worst, the best and all but the worst by each
score, and keeps what became of held-out pairs. Both add to docs/stand-ins.json, of which `page` makes the tables in
docs/stand-ins.md.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from stand_ins_parts.data import make_adapter, read_pairs, write_lines
from stand_ins_parts.training import Trial, fine_tune, train_on
from tiny import make_model, make_pairs, make_tokenizer

from gradent import scan, select

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS, PAGE = DOCS / "stand-ins.json", DOCS / "stand-ins.md"
SCORES = ("edit_distance", "ches", "ches_normalized", "head", "exact", "predicted_change", "random")
GOALS = ("cosine", "pair_change", "sample_change")

PARTS = {
    "worst": (1 / 3, True, "worst third"), "best": (2 / 3, False, "best third"),
    "kept": (0.36, False, "all but the worst 36%"),
}  # fmt: skip
"""Of each part of the data: the share of the worst that is cut off, whether the cut-off is the part, and its name."""

app = typer.Typer(add_completion=False, help=__doc__)
Model = Annotated[Path, typer.Option(help="Directory of the model.")]
Data = Annotated[Path, typer.Option(help="JSON lines: prompt, chosen, rejected; or text, label.")]
Pairs = Annotated[int, typer.Option(help="Pairs to scan.")]
Letters = Annotated[int, typer.Option(help="Most characters of prompt and response.")]
Length = Annotated[int, typer.Option(help="Most tokens of prompt and response.")]


@app.command()
def grade(
    model: Model, data: Data, lora: Annotated[bool, typer.Option(help="A LoRA adapter as training starts.")] = False,
    pairs: Pairs = 96, letters: Letters = 600, max_length: Length = 256,
    results: Annotated[Path, typer.Option(help="The file to add to.")] = RESULTS,
) -> None:  # fmt: skip
    """Scan pairs, measure all of them exactly, and keep how well each stand-in ranks them."""
    with tempfile.TemporaryDirectory() as folder:
        rows = write_lines(Path(folder, "pairs.jsonl"), read_pairs(data, pairs, letters))
        adapter = make_adapter(model, Path(folder, "adapter")) if lora else None
        record = scan(
            model, rows, adapter=adapter, out=Path(folder, "scan"), exact=None, max_length=max_length, report=False,
            skip_bad_rows=True, quiet=True,
        ).record  # fmt: skip
    setting = {"model": model.name, "data": data.stem, "trained": "LoRA" if lora else "full"}
    _keep(results, "grades", setting, {
        **setting, "pairs": record["data"]["scanned"], "grades": record["grades"], "costs": record["costs"],
        "device": record["model"]["device"], "cores": 2,
    })  # fmt: skip
    for row in record["grades"]:
        Console().print(row["rung"], *(row[goal]["spearman"] for goal in GOALS))


@app.command()
def choose(
    model: Model, data: Data, pairs: Pairs = 96, letters: Letters = 200, max_length: Length = 256,
    held: Annotated[int, typer.Option(help="Pairs held out.")] = 32,
    sft: Annotated[int, typer.Option(help="Steps of SFT on the pool's chosen responses, before all else.")] = 60,
    steps: Annotated[int, typer.Option(help="Steps of DPO.")] = 12,
    rate: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 3e-4,
    seeds: Annotated[str, typer.Option(help="Orders of the data.")] = "0,1,2",
    parts: Annotated[str, typer.Option(help="Of worst, best and kept.")] = ",".join(PARTS),
    scores: Annotated[str, typer.Option(help="What to choose by.")] = ",".join(SCORES),
    by_column: Annotated[str | None, typer.Option(help="Cut the same share of each of its values.")] = None,
    work: Annotated[Path | None, typer.Option(help="Where the tuned model and its scan are kept, to go on.")] = None,
    results: Annotated[Path, typer.Option(help="The file to add to.")] = RESULTS,
) -> None:  # fmt: skip
    """Train on the worst third, the best third and all but the worst 36% by each score; look at held-out pairs."""
    drawn = read_pairs(data, pairs + held, letters)
    chance = np.random.default_rng(0).permutation(len(drawn))
    pool, out = ([drawn[number] for number in sorted(part)] for part in (chance[held:], chance[:held]))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) if work is None else work
        place.mkdir(exist_ok=True)
        tuned = place / "tuned"
        if not (tuned / "config.json").is_file():
            fine_tune(model, pool, tuned, steps=sft)
        trial = Trial(tuned, pool, out, steps=steps, rate=rate, max_length=max_length)
        rows = write_lines(place / "pairs.jsonl", [{**row, "number": number} for number, row in enumerate(pool)])
        done = place / "scan"
        scan(tuned, rows, out=done, exact=None, max_length=max_length, report=False, quiet=True)
        chosen = {("all", "all"): list(range(len(pool)))}
        for by in scores.split(","):
            for part in parts.split(","):
                drop, rest, _ = PARTS[part]
                kept = select(done, by=by, drop=drop, by_column=by_column, out=place / "kept.jsonl", quiet=True).out
                numbers = {json.loads(line)["number"] for line in kept.read_text("utf-8").splitlines()}
                chosen[by, part] = sorted(set(range(len(pool))) - numbers if rest else numbers)
        runs = [
            {"by": by, "part": part, "seed": seed, "pairs": len(numbers), **train_on(trial, numbers, seed)}
            for seed in map(int, seeds.split(","))
            for (by, part), numbers in chosen.items()
        ]
    setting = {"model": model.name, "data": data.stem, "by_column": by_column}
    known = json.loads(results.read_text("utf-8"))["runs"] if results.is_file() else []
    new = {run["seed"] for run in runs}
    for each in known:  # those of other orders stay
        if all(each.get(name) == value for name, value in setting.items()):
            others = [run for run in each["runs"] if run["seed"] not in new]
            runs = sorted([*others, *runs], key=lambda run: run["seed"])
    _keep(results, "runs", setting, {
        **setting, "pool": len(pool), "held": len(out), "sft": sft, "steps": steps, "rate": rate, "runs": runs
    })  # fmt: skip


def _keep(path: Path, kind: str, setting: dict[str, Any], entry: dict[str, Any]) -> None:
    """Add a result to the file; one of the same setting is replaced."""
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {"grades": [], "runs": []}
    others = [each for each in known[kind] if any(each.get(name) != value for name, value in setting.items())]
    known[kind] = sorted(
        [*others, entry],
        key=lambda each: [each["model"], each["data"], each.get("trained", ""), each.get("by_column") or ""],
    )
    path.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


@app.command()
def page(
    results: Annotated[Path, typer.Option(help="What was kept.")] = RESULTS,
    target: Annotated[Path, typer.Option(help="The page whose tables are made anew.")] = PAGE,
) -> None:
    """Make the tables of docs/stand-ins.md from docs/stand-ins.json."""
    known = json.loads(results.read_text("utf-8"))
    text = target.read_text("utf-8")
    for name, made in (("grades", _grade_tables(known["grades"])), ("runs", _run_tables(known["runs"]))):
        start, end = f"<!-- {name}: written by examples/stand_ins.py -->\n", f"<!-- end of {name} -->\n"
        before, rest = text.split(start)
        text = f"{before}{start}\n{made}\n{end}{rest.split(end)[1]}"
    target.write_text(text, "utf-8")


def _grade_tables(grades: list[dict[str, Any]]) -> str:
    names = [row["rung"] for row in grades[0]["grades"]] if grades else []
    parts = [_range_table(grades, names)]
    for goal, title in zip(GOALS, ("the exact cosine", "a step on the pair", "a step on the sample"), strict=True):
        lines = [f"With {title}:\n", f"| model, data, trained | {' | '.join(f'`{name}`' for name in names)} |"]
        lines.append(f"|---|{'---|' * len(names)}")
        for each in grades:
            cells = [_cell(each["grades"], name, goal) for name in names]
            lines.append(f"| {_setting(each)} | {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    header = "| model, data, trained | pairs | text | forward | CHES | head | exact | step on the sample |"
    lines = ["Seconds a pair:\n", header, "|---|---|---|---|---|---|---|---|"]
    for each in grades:
        costs = [each["costs"][name] for name in ("text", "forward", "ches", "head", "exact", "sample")]
        cells = [str(each["pairs"]), *("-" if cost is None else f"{cost:.2g}" for cost in costs)]
        lines.append(f"| {_setting(each)} | {' | '.join(cells)} |")
    return "\n".join([*parts, "\n".join(lines) + "\n"])


def _range_table(grades: list[dict[str, Any]], names: list[str]) -> str:
    """The least and the greatest ρ of each stand-in over all settings."""
    lines = ["Over all settings:\n", "| stand-in | the exact cosine | a step on the pair | a step on the sample |"]
    lines.append("|---|---|---|---|")
    for name in names:
        cells = []
        for goal in GOALS:
            values = [row[goal]["spearman"] for each in grades for row in each["grades"] if row["rung"] == name]
            known = [value for value in values if value is not None]
            cells.append(f"{min(known):+.2f} to {max(known):+.2f}" if known else "-")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _setting(entry: dict[str, Any]) -> str:
    return f"{entry['model']}, {entry['data'].split('_')[0]}, {entry['trained']}"


def _cell(rows: list[dict[str, Any]], name: str, goal: str) -> str:
    """ρ and half of its interval; in brackets where the interval holds 0."""
    found = next((row[goal] for row in rows if row["rung"] == name), None)
    if found is None or found["spearman"] is None:
        return "-"
    text = f"{found['spearman']:+.2f} ±{(found['high'] - found['low']) / 2:.2f}"
    return f"({text})" if found["low"] <= 0 <= found["high"] else text


def _run_tables(runs: list[dict[str, Any]]) -> str:
    parts = []
    for each in runs:
        seeds = sorted({run["seed"] for run in each["runs"]})
        found = [part for part in PARTS if any(run["part"] == part for run in each["runs"])]
        lines = [
            f"{each['model']} on {each['data'].split('_')[0]}: {each['sft']} steps of SFT, then {each['steps']} of "
            f"DPO on all parameters (AdamW at {each['rate']:g}, 8 pairs each), from {each['pool']} pairs; "
            f"{each['held']} held out; {len(seeds)} orders of the data"
            + (f"; the same share of every `{each['by_column']}`" if each.get("by_column") else "")
            + ". Change of the held-out chosen log-prob in "
            "nats (± the standard deviation over orders), and the share of held-out pairs whose margin grew:\n",
            f"| score | {' | '.join(PARTS[part][2] for part in found)} |",
            f"|---|{'---|' * len(found)}",
        ]
        known = {run["by"] for run in each["runs"]}
        for name in (name for name in SCORES if name in known):
            lines.append(f"| `{name}` | {' | '.join(_outcome(each['runs'], name, part) for part in found)} |")
        lines.append(f"\nAll pairs: {_outcome(each['runs'], 'all', 'all')}.")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _outcome(runs: list[dict[str, Any]], by: str, part: str) -> str:
    found = [run for run in runs if (run["by"], run["part"]) == (by, part)]
    if not found:
        return "-"
    chosen = [run["chosen"] for run in found]
    spread = statistics.stdev(chosen) if len(chosen) > 1 else 0.0
    return f"{statistics.fmean(chosen):+.2f} ± {spread:.2f}, {statistics.fmean(run['accuracy'] for run in found):.0%}"


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    """Do what the command says; without one, both on a tiny model."""
    torch.set_num_threads(1)
    if context.invoked_subcommand is not None:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        make_model().save_pretrained(folder / "tiny")
        make_tokenizer().save_pretrained(folder / "tiny")
        data = write_lines(folder / "made_up.jsonl", [dict(row) for row in make_pairs(30)])
        results = folder / "stand-ins.json"
        grade(folder / "tiny", data, pairs=20, letters=600, max_length=64, lora=False, results=results)
        choose(
            folder / "tiny", data, pairs=20, letters=600, max_length=64, held=8, sft=2, steps=2, seeds="0,1",
            results=results,
        )  # fmt: skip
        known = json.loads(results.read_text("utf-8"))
        Console().print(_grade_tables(known["grades"]), _run_tables(known["runs"]))


if __name__ == "__main__":
    app()
