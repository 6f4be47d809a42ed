"""Two versions of gradent, call by call in turns on one machine: is the newer one slower, does it hold more?

    git worktree add ../older <commit>
    python -m benchmarks.against ../older

Each version runs in a process of its own, in its own tree, and makes the same models and pairs as its
`benchmarks.peers` (gradent's methods there) and the same training as its `benchmarks.callback`. The two take turns: a
call of the older, then one of the newer, so that a machine whose speed drifts slows both. The ratio is the median over
rounds of newer by older, seconds of the process's own CPU time (`--clock wall` for the clock's), one thread. MiB is the
most that a call held beyond what the process held before it, by the kernel's high-water mark; for the callback the most
that the whole process held.

Appends a line a row to benchmarks/results/against.csv.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
METHODS = ("gradent measure", "gradent piggyback", "gradent piggyback, shared")
WARM = 3
"""Steps of a training run that do not count."""


class Version:
    """A process that imports gradent and benchmarks from `tree` and answers line by line."""

    def __init__(self, tree: Path, *request: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", *request]
        self._process = subprocess.Popen(
            command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, line: str = "") -> Any:
        """The answer to a line, of JSON."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        while not (answer := self._process.stdout.readline()).startswith("{"):
            if not answer:
                raise RuntimeError(f"the process for {self._process.args} ended; its message is above")
        return json.loads(answer)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def answer(**values: Any) -> None:
    """One line of JSON."""
    print(json.dumps(values), flush=True)


def serve_peers(clock: str, kind: str, size: str, case: str) -> None:
    """Call the method that each line names."""
    from benchmarks import peers  # noqa: PLC0415

    shape = peers.SIZES[size]
    model = peers.build(kind, torch.float32, shape)
    batch = peers.draw(*peers.CASES[case], min(shape.gpt2_vocabulary, shape.llama_vocabulary))
    ways = {name: make(model, batch) for name, make in {**peers.METHODS, **peers.WATCHED}.items() if name in METHODS}
    for line in sys.stdin:
        way = ways[line.strip().removesuffix(" held")]
        if line.strip().endswith(" held"):
            answer(mib=(peers.held(way) or 0) / 2**20)
        else:
            answer(seconds=peers.timed(way, CLOCKS[clock]))


def serve_callback(clock: str, kind: str, steps: str) -> None:
    """Train; each line allows one step, the odd ones are measured."""
    from benchmarks import callback  # noqa: PLC0415

    now = CLOCKS[clock]

    class Turn(callback.Stopwatch):
        """Waits for its turn."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            """Start when told."""
            sys.stdin.readline()
            self._since = now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            """Stop and answer."""
            self.seconds.append(now() - self._since)
            answer(seconds=self.seconds[-1], mib=high_water())

    callback.Stopwatch = Turn  # type: ignore[misc]
    name, _, shared = kind.partition(", ")
    with tempfile.TemporaryDirectory() as out:
        callback.run(
            name, int(steps), out, checkpointing=False, profile=False, weight_grad="shared" if shared else None
        )


def high_water() -> float:
    """Most MiB that this process has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def compare_peers(trees: tuple[Path, Path], clock: str, kind: str, size: str, case: str, rounds: int) -> list[dict]:
    """A row a method."""
    versions = [Version(tree, "peers", clock, kind, size, case) for tree in trees]
    rows = []
    for method in METHODS:
        if kind != "GPT-2, full" and method.endswith("shared"):
            continue
        for version in versions:
            version.ask(method)
            version.ask(method)
        held = [statistics.median(version.ask(f"{method} held")["mib"] for _ in range(3)) for version in versions]
        pairs = [[version.ask(method)["seconds"] for version in versions] for _ in range(rounds)]
        rows.append(row(f"{kind}, {size}, {case}: {method}", pairs, held))
    for version in versions:
        version.close()
    return rows


def compare_callback(trees: tuple[Path, Path], clock: str, kind: str, rounds: int) -> list[dict]:
    """A row for the measured steps."""
    steps = WARM + 2 * rounds
    versions = [Version(tree, "callback", clock, kind, str(steps)) for tree in trees]
    answers = [[version.ask() for version in versions] for _ in range(steps)]
    for version in versions:
        version.close()
    held = [pair["mib"] for pair in answers[-1]]
    counted = [[one["seconds"] for one in pair] for pair in answers[WARM:]]
    return [
        row(f"callback, {kind}: measured step", counted[1::2], held),
        row(f"callback, {kind}: step between", counted[::2], held),
    ]


def row(name: str, pairs: list[list[float]], held: list[float]) -> dict[str, Any]:
    """Medians of both versions, and of the ratio of each round."""
    older, newer = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(new / old for old, new in pairs)
    return {
        "row": name, "rounds": len(pairs), "older_s": older, "newer_s": newer, "ratio": ratio,
        "older_mib": held[0], "newer_mib": held[1],
    }  # fmt: skip


def main(
    older: Annotated[Path, typer.Argument(help="The older version's tree.")],
    rounds: Annotated[int, typer.Option(help="Turns of each version.")] = 15,
    clock: Annotated[str, typer.Option(help="cpu: the process's own seconds, or wall.")] = "cpu",
    kinds: Annotated[str, typer.Option(help="Models of the peers' rows, semicolon-separated.")] = (
        "GPT-2, full;Llama, LoRA"
    ),
    sizes: Annotated[str, typer.Option(help="Of these models: mini, small.")] = "mini,small",
    cases: Annotated[str, typer.Option(help="Pairs.")] = "single,short,medium,long",
    callback: Annotated[str, typer.Option(help="Training runs, semicolon-separated.")] = "LoRA;full;full, shared",
    save: Annotated[bool, typer.Option(help="Append to the results.")] = True,
) -> None:
    """Compare both, print the ratios, append them to the results."""
    from benchmarks.append import append  # noqa: PLC0415

    trees = (older.resolve(), Path(__file__).resolve().parents[1])
    table = Table("row", "older (s)", "newer (s)", "newer / older", "older (MiB)", "newer (MiB)")

    def add(rows: list[dict[str, Any]]) -> None:
        for one in rows:
            table.add_row(
                one["row"], f"{one['older_s']:.3f}", f"{one['newer_s']:.3f}", f"{one['ratio']:.3f}",
                f"{one['older_mib']:.0f}", f"{one['newer_mib']:.0f}",
            )  # fmt: skip
            print({key: round(value, 4) if isinstance(value, float) else value for key, value in one.items()})
            if save:
                append("against", {"clock": clock, **one})

    for kind in filter(None, callback.split(";")):
        add(compare_callback(trees, clock, kind, rounds))
    for size in filter(None, sizes.split(",")):
        for kind in kinds.split(";"):
            for case in cases.split(","):
                few = rounds if size == "mini" else max(5, rounds // 3)
                add(compare_peers(trees, clock, kind, size, case, few))
    Console(width=150).print(table)


if __name__ == "__main__":
    if "--serve" in sys.argv:
        what, *request = sys.argv[sys.argv.index("--serve") + 1 :]
        sys.path[0] = os.getcwd()
        torch.set_num_threads(1)
        {"peers": serve_peers, "callback": serve_callback}[what](*request)
    else:
        typer.run(main)
