"""What only a GPU can tell, in one run of at most about six minutes: rates, crossover, memory, and a step's overhead.

    python -m benchmarks.device

On an NVIDIA H100 or H200 with PyTorch for CUDA and Triton; of gradent's dependencies, peft, TRL and wandb are not
needed. `--toy` tries every part at sizes of a second on whatever is there: on a CPU in plain torch, or, with
TRITON_INTERPRET=1 and GRADENT_KERNELS=triton, in Triton's interpreter. Its figures mean nothing.

Each part is a process of its own with a time limit, so that a part that fails or hangs takes nothing with it:

- `check`: the kernels' self-check, cold and warm, and the path that measuring takes;
- `gemm`: the rate of bf16 products in torch, which is the ceiling, and of a copy in device memory;
- `kernels`: `outer`, `gram` and the outer that stores at the shapes of an 8B Llama and its LoRA factors, a few of them
  in float32 too, as a share of the GEMM rate, beside torch's tiles and the plain weight-gradient product; entries are
  compared with torch's first;
- `crossover`: T at which gram and outer take the same time, beside ⅔h;
- `memory`: reductions over a sweep, by the allocator's own count, against `memory_budget`;
- `step`: a training step with and without gradent attached, LoRA and full, also with `weight_grad="shared"`, in turns;
  and `measure` beside two backwards a pair.

Kernels are timed with CUDA events while the device is kept busy, so that the host's part is not in it; a step by the
host's clock, which is what a user waits for. Every figure is a median with its 10th and 90th percentile, warm.

Each row is printed and appended to benchmarks/results/device.csv as soon as it is there (of `--toy` none is). On a
machine whose files do not last, `--out DIR` writes DIR/device.csv instead, to be brought home, and `--commit` says what
ran if there is no git. Ends with 1 if any part failed.
"""

from __future__ import annotations

import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.append import RESULTS
from benchmarks.device_bench import Bench

LIMITS = {"check": 90, "gemm": 20, "kernels": 85, "crossover": 30, "memory": 55, "step": 55}
"""Part -> seconds after which it begins nothing more, out of `--minutes` 6; in the order in which they run."""

GRACE = 20
"""Seconds beyond its limit after which a part is ended: for what it was doing, and for starting."""

LEAST = 10
"""Seconds left of all `--minutes` below which a part is not begun."""

NEEDED = (
    "no CUDA device: this benchmark needs one NVIDIA H100 or H200 (another GPU runs too, at its own rates; 40 GiB of "
    "memory), PyTorch built for CUDA, and Triton (pip install 'gradent[cuda]').\n"
    "To try the script without one: python -m benchmarks.device --toy, or, with the kernels in Triton's interpreter, "
    "TRITON_INTERPRET=1 GRADENT_KERNELS=triton python -m benchmarks.device --toy"
)


def part_named(name: str) -> Callable[[Bench], None]:
    """What runs a part. Each imports what it needs alone, so that a package that is missing stops that part alone."""
    if name == "step":
        from benchmarks.device_step import train  # noqa: PLC0415

        return train
    if name == "memory":
        from benchmarks.device_memory import memory  # noqa: PLC0415

        return memory
    if name == "crossover":
        from benchmarks.device_cross import cross  # noqa: PLC0415

        return cross
    from benchmarks import device_kernels  # noqa: PLC0415

    return {"check": device_kernels.check, "gemm": device_kernels.gemm, "kernels": device_kernels.kernels}[name]


def run_here(name: str, *, toy: bool, seconds: float, folder: Path | None, commit: str | None) -> str:
    """Run a part in this process.

    Args:
        name: of the part.
        toy: at toy sizes.
        seconds: after which it begins nothing more.
        folder: of the CSV, or None.
        commit: for the rows.

    Returns:
        "" or what went wrong, which has been printed.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        bench = Bench(name, device, toy=toy, seconds=seconds, folder=folder, commit=commit)
        part_named(name)(bench)
    except Exception as error:  # noqa: BLE001  (whatever it is, the other parts go on)
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return "" if bench.written else "it has no rows"


def run_apart(name: str, arguments: list[str], seconds: float) -> str:
    """Run a part in a process of its own, and end it where it hangs.

    Args:
        name: of the part.
        arguments: the command's own, but for what says which part.
        seconds: after which it begins nothing more.

    Returns:
        "" or what went wrong.
    """
    command = [sys.executable, "-m", "benchmarks.device", "--parts", name, "--here", "--limit", f"{seconds:.0f}"]
    home = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run([*command, *arguments], cwd=home, timeout=seconds + GRACE, check=False)
    except subprocess.TimeoutExpired:
        return f"ended after {seconds + GRACE:.0f} s; the rows so far are kept"
    return f"its process ended with {done.returncode}" if done.returncode else ""


def main(
    parts: Annotated[str, typer.Option(help="Which, and in which order, with commas between.")] = ",".join(LIMITS),
    minutes: Annotated[float, typer.Option(help="For all parts; each has its share.")] = 6.0,
    toy: Annotated[
        bool, typer.Option("--toy", help="Tiny sizes, on a CPU too; writes nothing to the results.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for device.csv, instead of the results.")] = None,
    commit: Annotated[str | None, typer.Option(help="The code's, where git cannot say.")] = None,
    here: Annotated[bool, typer.Option("--here", help="All in this process.")] = False,
    limit: Annotated[float | None, typer.Option(help="Seconds of each part, whatever --minutes says.")] = None,
) -> None:
    """Run the parts one after another; a part that fails is named, and the next one goes on."""
    console = Console(highlight=False, width=120)
    names = [name.strip() for name in parts.split(",") if name.strip()]
    unknown = [name for name in names if name not in LIMITS]
    if unknown or not names:
        raise typer.BadParameter(
            f"{', '.join(unknown) or 'none'}; accepted are {', '.join(LIMITS)}", param_hint="parts"
        )
    if not toy and not torch.cuda.is_available():
        console.print(NEEDED, markup=False, soft_wrap=True)
        raise typer.Exit(2)
    if toy and out is not None and out.resolve() == RESULTS.resolve():
        raise typer.BadParameter("figures of --toy mean nothing, and stay out of the results", param_hint="out")
    folder = None if toy and out is None else (out or RESULTS).resolve()
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    arguments = ["--toy"] * toy + (["--out", str(folder)] if folder else []) + (["--commit", commit] if commit else [])
    failed: dict[str, str] = {}
    began = time.perf_counter()
    for name in names:
        since = time.perf_counter()
        left = 60 * minutes - (since - began)
        share = min(LIMITS[name] * minutes / 6, left) if limit is None else limit
        if limit is None and left < LEAST:
            wrong = f"left out: {minutes:g} minutes are over"
        elif here:
            wrong = run_here(name, toy=toy, seconds=share, folder=folder, commit=commit)
        else:
            wrong = run_apart(name, arguments, share)
        console.print(f"{name}: {wrong or 'done'} ({time.perf_counter() - since:.0f} s)", markup=False, soft_wrap=True)
        if wrong:
            failed[name] = wrong
    if folder is not None:
        console.print(f"Rows are in {folder / 'device.csv'}.", markup=False, soft_wrap=True)
    if failed:
        console.print(f"Failed: {', '.join(failed)}.", markup=False)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
