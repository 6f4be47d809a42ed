"""Write benchmarks/results/sm90.csv: what every configuration of every kernel takes of an H100, compiled without one.

    python -m scripts.compile_kernels [--kernel outer] [--dtype bfloat16] [--target FILE]

Each is compiled ahead of time for sm_90, then assembled once more with `ptxas -v`, whose own figures these are:
registers a thread, bytes spilled to local memory (stores and loads). Shared memory is what Triton reserves. Lines of
other releases of Triton stay as they are. Ends with an error if anything spills (more than `SPILLED`) or takes more
shared memory than a block may have. Takes about two minutes on one core.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing

import torch
import triton
import typer
from rich.console import Console
from rich.progress import track
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from gradent.kernels.common.tiles import Config, gram_configs, group_configs, outer_configs
from gradent.kernels.gram.triton import gram_kernel
from gradent.kernels.outer.triton import group_kernel, outer_kernel

TARGET = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "sm90.csv"
ARCH = 90
SHARED = 227 * 1024
"""Shared memory that a block may have on sm_90, in bytes."""

SPILLED = {"groups": 32}
"""Bytes a thread that may be spilled: of small tiles ptxas does so of its own accord, at half of 255 registers."""

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
]
UNITS = {"UNIT_O": 8, "UNIT_I": 8}
"""Sizes and row strides of real layers, and of LoRA with r = 8, are multiples of 8: `unit` of `common/tiles.py`."""

KERNELS = {"gram": gram_kernel, "outer": outer_kernel, "outer+gradient": outer_kernel, "groups": group_kernel}


@dataclass(frozen=True)
class Case:
    """A kernel as it is launched on contiguous operands, whose sizes are multiples of 8.

    Attributes:
        kernel: one of `KERNELS`.
        u: dtype of u.
        v: dtype of v.
        weighted: with a metric.
        config: the sizes.
    """

    kernel: str
    u: torch.dtype
    v: torch.dtype
    weighted: bool
    config: Config

    @property
    def constants(self) -> dict[str, Any]:
        """Argument name -> value known when compiling."""
        wide = self.u != self.v
        strides = ("u_o", "v_i") if self.kernel == "groups" else ("uw_o", "vw_i", "ul_o", "vl_i")
        known: dict[str, Any] = dict.fromkeys(strides, 1) | UNITS | {"DEPTH": self.config.depth, "FAR": False}
        if self.kernel == "gram":
            return {**known, "B": self.config.rows, "WIDE": False}
        known |= {"BO": self.config.rows, "BI": self.config.cols, "WEIGHTED": self.weighted}
        known |= {"weight_i": 1} if self.weighted else {"weight": None}
        if self.kernel == "groups":  # of more than four rows, which takes more registers
            return {**known, "BLOCK": 8, "CHUNK": 16 * self.config.warps, "WIDE": wide}
        store = self.kernel == "outer+gradient"
        known["STORE"] = store
        return {**known, "WIDE": wide, **({} if store else {"coefficients": None, "gradient": None})}


def cases() -> Iterator[Case]:
    """Every configuration that a launcher may choose."""
    for u, v in DTYPES:
        wide = u if u == v else torch.float32
        yield from (Case("gram", u, v, False, config) for config in gram_configs(wide))
        for store, name in ((False, "outer"), (True, "outer+gradient")):
            for config in outer_configs(wide, store=store):
                yield from (Case(name, u, v, weighted, config) for weighted in (False, True))
        for config in group_configs(wide):
            yield from (Case("groups", u, v, weighted, config) for weighted in (False, True))


def source(case: Case) -> tuple[ASTSource, dict[str, Any]]:
    """What a launch would compile: tests/kernels/test_compile.py compares them.

    Args:
        case: which.

    Returns:
        The kernel with the types, constants and multiples of its arguments, and the compiler's options.
    """
    kernel = KERNELS[case.kernel]
    types = {"u": case.u, "v": case.v, "u_w": case.u, "u_l": case.u, "v_w": case.v, "v_l": case.v}
    pointers = {name: POINTERS[dtype] for name, dtype in types.items()}
    pointers |= {"weight": "*fp32", "coefficients": "*fp32", "gradient": "*fp32", "partials": "*fp64"}
    pointers |= {"spans": "*i64", "products": "*i64", "formed": "*fp32"}
    known = case.constants
    signature = {name: "constexpr" if name in known else pointers.get(name, "i32") for name in kernel.arg_names}
    # Memory begins at a multiple of 16 bytes; so does a stride of 0 count, which is that of a weight that is not there.
    aligned = {*pointers, *(() if case.weighted else ("weight_i",))} - set(known)
    hints = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names) if name in aligned}
    constants = {(place,): known[name] for place, name in enumerate(kernel.arg_names) if name in known}
    options = {"num_warps": case.config.warps, "num_stages": case.config.stages, "enable_fp_fusion": True}
    return ASTSource(kernel, signature, constants, hints), options


def compile_case(case: Case) -> Any:
    """The kernel compiled for sm_90, by this process's Triton.

    Args:
        case: which.

    Returns:
        Triton's compiled kernel, with its `asm` and `metadata`.
    """
    made, options = source(case)
    return triton.compile(made, target=GPUTarget("cuda", ARCH, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """What a compiled kernel takes.

    Args:
        compiled: from `compile_case`.

    Returns:
        `registers` a thread, `spilled` bytes of local memory stored and loaded, `shared` bytes a block.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"], encoding="utf-8")
        tool = get_ptxas(ARCH) if signature(get_ptxas).parameters else get_ptxas()  # Triton 3.4 has one for all
        asked = [tool.path, "-v", f"--gpu-name=sm_{ARCH}a", str(source), "-o", str(source) + ".cubin"]
        said = subprocess.run(asked, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert spills and registers, said
    return {
        "registers": int(registers[1]),
        "spilled": int(spills[1]) + int(spills[2]),
        "shared": compiled.metadata.shared,
    }


def line(case: Case) -> dict[str, Any]:
    """A line of the CSV."""
    return {
        "triton": triton.__version__,
        "arch": f"sm_{ARCH}",
        "kernel": case.kernel,
        "u": str(case.u).removeprefix("torch."),
        "v": str(case.v).removeprefix("torch."),
        "weighted": case.weighted,
        **vars(case.config),
        **resources(compile_case(case)),
    }


def _read(target: Path) -> list[dict[str, str]]:
    """The lines of the CSV; none where there is none."""
    if not target.exists():
        return []
    with open(target, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a line is of, without what was found."""
    return tuple(str(value) for name, value in row.items() if name not in ("registers", "spilled", "shared"))


def main(
    kernel: Annotated[str, typer.Option(help="gram, outer, outer+gradient or groups; all by default.")] = "",
    dtype: Annotated[str, typer.Option(help="Of u: float32, bfloat16 or float16; all by default.")] = "",
    target: Annotated[Path, typer.Option(help="The CSV.")] = TARGET,
    last: Annotated[bool, typer.Option(help="Only the last configuration of those: the largest tile.")] = False,
) -> None:
    """Compile, write the table, and fail if a configuration spills or is too large."""
    chosen = [case for case in cases() if kernel in ("", case.kernel) and str(case.u).endswith(dtype)]
    lines = [line(case) for case in track(chosen[-1:] if last else chosen, "Compiling")]
    if not lines:
        raise typer.BadParameter(f"--kernel {kernel!r} and --dtype {dtype!r}: no configuration is of these.")
    done = None if len(lines) == len(list(cases())) else {_key(row) for row in lines}  # None: all of this release
    others = [
        row
        for row in _read(target)
        if row["triton"] != triton.__version__ or (done is not None and _key(row) not in done)
    ]
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows([*others, *lines])
    wrong = [row for row in lines if row["spilled"] > SPILLED.get(row["kernel"], 0) or row["shared"] > SHARED]
    console = Console()
    for row in wrong:
        console.print(f"[red]spills, or is too large:[/] {row}")
    console.print(f"{len(lines)} configurations, {len(wrong)} of them unfit; {target}")
    raise typer.Exit(1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
