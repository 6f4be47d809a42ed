"""One program with and without gradent, in processes of their own, and what came of it as one JSON file.

A client module has `CASES` and `run(case, folder, watched)`, which trains as its users do and says where the weights
and the log lie. A case passes where both runs save the same bits and everything else is as its `Case` says.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import hashlib
import importlib.metadata
import json
import logging
import multiprocessing
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scripts.clients.tiny import PAIRS, make_model, write_lines
from scripts.clients.truth import Truth, compare_pairs, compare_rewards, compare_rows
from scripts.clients.watch import Watch, watch_runs

__all__ = ["Case", "Outcome", "main", "recipe"]

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 2e-5
"""Scaled errors in float32."""

PATIENCE = 300
"""Seconds for one run."""


@dataclass(frozen=True)
class Case:
    """One run of a program, and what is right about it."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    source: str | None = "piggyback"
    """Of the records; None where there is nothing to record, and the log says why."""
    kind: str = "pairs"
    """pairs, reward (pairs of a reward model), or rows that are no pairs."""
    weighs_alike: bool = True
    """Whether the loss weighs a response's tokens alike, so that the step's gradient is the sum over its rows."""
    says: str | None = None
    """What the log says, as a pattern."""
    batches: int = 2
    """Backwards of a step."""
    rows: int = 2
    """Pairs (or rows) of each."""


@dataclass(frozen=True)
class Outcome:
    """What a run left."""

    weights: Path
    """Folder of the safetensors."""
    logs: list[Path]
    """The program's own logs, which must have gradent's keys."""


def recipe(line: str, page: str = "recipes.md") -> str:
    """The Python block of a page of docs that has a line, as it stands there."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / page).read_text("utf-8"), flags=re.M | re.S)
    return next(block for block in blocks if line in block.splitlines())


def main(
    program: str, cases: Sequence[Case], run: Callable[[Case, Path, bool], Outcome], versions: Sequence[str]
) -> None:
    """Run the cases of the command line, or all, and write `results/PROGRAM.json` where all were run.

    Args:
        program: name of the client.
        cases: its cases.
        run: trains one.
        versions: packages whose versions belong to the results, the program first.
    """
    parser = argparse.ArgumentParser(description=f"gradent inside {program}")
    parser.add_argument("cases", nargs="*", help="names of cases; by default all")
    parser.add_argument("--work", type=Path, default=Path.cwd() / "my-clients" / program)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.work.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    make_model(folder / "my-model")
    write_lines(folder / "pairs.jsonl", PAIRS)
    chosen = [case for case in cases if not arguments.cases or case.name in arguments.cases]
    found = list[dict[str, Any]]()
    for case in chosen:
        found.append(_run_case(case, folder / case.name, run))
        _say(f"{case.name}: {'; '.join(found[-1]['wrong']) or 'as it should be'}")
    result = {
        "program": program, "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in versions},
        "python": sys.version.split()[0], "tolerance": TOLERANCE, "cases": found,
    }  # fmt: skip
    where = (
        ROOT / "scripts" / "clients" / "results" / f"{program}.json" if not arguments.cases else folder / "some.json"
    )
    where.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    _say(f"written: {where}")
    sys.exit(any(line["wrong"] for line in found))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _run_case(case: Case, folder: Path, run: Callable[[Case, Path, bool], Outcome]) -> dict[str, Any]:
    """Both runs of a case, and what is wrong with them."""
    found: dict[str, Any] = {"case": case.name, "wrong": []}
    context = multiprocessing.get_context("fork")
    for name in ("without", "with"):
        here = folder / name
        here.mkdir(parents=True, exist_ok=True)
        process = context.Process(target=_in_child, args=(case, here, name == "with", run))
        process.start()
        process.join(PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()
        result = here / "found.json"
        if process.exitcode != 0 or not result.exists():
            found["wrong"].append(f"the run {name} gradent ended with code {process.exitcode}: {_last(here / 'log')}")
            return found
        found[name] = json.loads(result.read_text("utf-8"))
    watched = found.pop("with")
    is_same = found.pop("without")["digest"] == watched.pop("digest")
    return {"case": case.name, "same_bits": is_same, **watched, "wrong": _faults(case, watched, is_same=is_same)}


def _in_child(case: Case, folder: Path, watched: bool, run: Callable[[Case, Path, bool], Outcome]) -> None:
    """One run, in its process, its output in `log` and what was found in `found.json`."""
    (folder / "found.json").unlink(missing_ok=True)
    gc.freeze()  # what is imported already: Axolotl collects garbage in every step
    log = (folder / "log").open("w", encoding="utf-8")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    told = list[str]()
    # A filter and no handler: without any, Python prints warnings, and that a user sees them is what is tested.
    logging.getLogger("gradent").addFilter(lambda record: told.append(record.getMessage()) or True)
    watch = watch_runs() if watched else None
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        with contextlib.suppress(SystemExit):
            outcome = run(case, folder, watched)
        found: dict[str, Any] = {"digest": _digest(outcome.weights)}
        if watch is not None:
            log.flush()
            found |= _examine(case, watch, outcome, told, (folder / "log").read_text("utf-8"))
        (folder / "found.json").write_text(json.dumps(found), "utf-8")
    except BaseException:  # noqa: BLE001  (the process ends here, whatever it was)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stderr.flush()
    os._exit(0)  # what a program leaves running ends here


def _examine(case: Case, watch: Watch, outcome: Outcome, told: Sequence[str], output: str) -> dict[str, Any]:
    """What a watched run shows."""
    (callback,) = watch.callbacks
    tokenizer = watch.trainer.processing_class
    steps = [watch.steps[record.step] for record in callback.records]
    found = list[dict[str, Any]]()
    for record, step in zip(callback.records, steps, strict=True):
        truth = Truth(watch.model, step)
        if record.gram is None:
            found.append(compare_rows(truth, record, tokenizer))
        elif record.batch is None:
            found.append(compare_rewards(truth, record, step.rows, tokenizer))
        else:
            found.append(compare_pairs(truth, record, tokenizer, case.batches, case.rows))
    keys = {
        re.sub(r"\.\d.*", "", log.name): len(set(re.findall(r"gradent/[\w/]+", log.read_text("utf-8", "ignore"))))
        for log in outcome.logs
    }
    return {
        "trainer": type(watch.trainer).__mro__[1].__module__ + "." + type(watch.trainer).__name__,
        "row_order": _row_order(next(iter(watch.steps.values())).rows, tokenizer), "records": found, "keys": keys,
        "errors": callback.errors, "told": list(told),
        "is_told": all(text.split("\n")[0][:60] in output for text in told),
    }  # fmt: skip


def _row_order(rows: Sequence[torch.Tensor], tokenizer: Any) -> list[str]:
    """Of the forwards of a step, which response each row has: c0 is the chosen response of pair 0."""
    names = list[str]()
    parts = {f"{side[0]}{number}": pair[side] for number, pair in enumerate(PAIRS) for side in ("chosen", "rejected")}
    for ids in rows:
        texts = [tokenizer.decode(row) for row in ids]
        names.append(" ".join("+".join(name for name, part in parts.items() if part in text) for text in texts))
    return names


def _faults(case: Case, found: dict[str, Any], *, is_same: bool) -> list[str]:
    """What is not as it should be, in words."""
    wrong = [] if is_same else ["the run with gradent saved other bits"]
    records = found["records"]
    if found["errors"]:
        wrong.append(f"{found['errors']} errors of gradent's")
    if not found["is_told"]:
        wrong.append("what gradent said is not in the program's output")
    if case.says is not None and not any(re.search(case.says, text) for text in found["told"]):
        wrong.append(f"nothing in the log is like {case.says!r}: {found['told']}")
    if case.source is None:
        return wrong + (["there are records"] if records else [])
    if not records:
        return [*wrong, f"no record: {found['told']}"]
    if not all(found["keys"].values()):
        wrong.append(f"a log has no gradent/ key: {found['keys']}")
    errors = ["entries_error", "logps_error", *(["step_gradient_error"] if case.weighs_alike else [])]
    for record in records:
        here = f"step {record['step']}"
        if ("rows" in record) != (case.kind == "rows"):
            wrong.append(f"{here}: rows are taken for {'groups' if 'rows' in record else 'pairs'}")
            continue
        if not record.get("right_pairs", True) or not record.get("right_sides", True):
            wrong.append(f"{here}: rows are not those of the data's pairs")
        if record["source"] != case.source:
            wrong.append(f"{here}: source {record['source']}, not {case.source}")
        if case.kind != "rows" and record["pairs"] + record["inactive"] != case.batches * case.rows:
            wrong.append(f"{here}: {record['pairs']} pairs and {record['inactive']} inactive")
        wrong += [f"{here}: {name} {record[name]:.2g}" for name in errors if not record[name] <= TOLERANCE]
    return wrong


def _digest(folder: Path) -> str:
    """Of all saved tensors: a hash of their names and bytes."""
    from safetensors import safe_open  # noqa: PLC0415

    total, files = hashlib.sha256(), sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} has no safetensors: {sorted(each.name for each in folder.iterdir())}")
    for file in files:
        with safe_open(file, "pt") as saved:
            for name in sorted(saved.keys()):
                total.update(name.encode())
                total.update(saved.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _last(log: Path) -> str:
    return " / ".join(log.read_text("utf-8").strip().splitlines()[-4:]) if log.exists() else "no log"
