"""What launches would compile for an H100, told without one; run as a program, with the interpreter off.

A driver that stands in for CUDA's names the target, and a hook of Triton's takes each compilation before it begins.
`python -m tests.kernels.launched` prints, as JSON, how launches differ from `scripts.compile_kernels`, how many
compilations launches of all kinds of sizes ask for, and how the factors of a LoRA with r = 8 are loaded.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from gradent.kernels.common.triton_operands import Spans
from gradent.kernels.gram.triton import gram_entries, gram_kernel
from gradent.kernels.outer.triton import outer_entries, outer_kernel, outer_with_gradient
from scripts.compile_kernels import ARCH, Case, cases, source

KINDS = ("gram", "outer", "outer+gradient")


class _Driver:
    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


def launched(kind: str, u: torch.Tensor, v: torch.Tensor, *, weighted: bool = False, **how: Any) -> dict[str, Any]:
    """What the launch of a kernel on one pair compiles: both sides are u `[T, O]` and v `[T, I]`."""
    seen: list[dict[str, Any]] = []
    triton.knobs.runtime.jit_cache_hook = lambda *, compile, **_: seen.append(compile) or True
    spans = Spans.of_pair(len(u), len(u))
    weight = torch.ones(u.shape[1], v.shape[1]) if weighted else None
    if kind == "gram":
        gram_entries(u, v, u, v, spans, **how)
    elif kind == "outer":
        outer_entries(u, v, u, v, spans, weight, **how)
    else:
        outer_with_gradient(u, v, u, v, spans, torch.ones(1, 2), weight, **how)
    (made,) = seen
    return made


def differences(case: Case) -> list[str]:
    """What a launch on contiguous operands compiles otherwise than `compile_case`."""
    operands = (torch.zeros(40, width, dtype=dtype) for width, dtype in ((24, case.u), (4096, case.v)))
    made = launched(case.kernel, *operands, weighted=case.weighted, config=case.config)
    ours, options = source(case)
    hints = {place: hint for place, hint in made["configs"][0].items() if hint}
    pairs = {
        "signature": (made["signature"], ours.signature),
        "constants": (made["constants"], ours.constants),
        "hints": (hints, ours.attrs),
        "options": ({name: made[name] for name in options}, options),
    }
    return [f"{case}: {name} {there} is not {here}" for name, (there, here) in pairs.items() if there != here]


def compilations(kind: str, shapes: list[tuple[int, int, int]]) -> int:
    """How many compilations of one tile launches ask for, on bfloat16 operands `[T, O]` and `[T, I]` of these sizes."""
    by_tile: dict[str, set[str]] = {}
    for tokens, rows, cols in shapes:
        made = launched(kind, *(torch.zeros(tokens, width, dtype=torch.bfloat16) for width in (rows, cols)))
        known = {name: made["constants"].get((place,)) for place, name in enumerate(made["signature"])}
        by_tile.setdefault(str([known.get(name) for name in ("B", "BO", "BI")]), set()).add(made["key"])
    return max(map(len, by_tile.values()))


def copies(kind: str, rows: int, cols: int) -> tuple[int, int]:
    """Copies beside the computation, and loads of single numbers, in what a launch in bfloat16 compiles."""
    made = launched(kind, *(torch.zeros(300, width, dtype=torch.bfloat16) for width in (rows, cols)))
    kernel = gram_kernel if kind == "gram" else outer_kernel
    code = ASTSource(kernel, made["signature"], made["constants"], made["configs"][0])
    options = {name: made[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    ptx = triton.compile(code, target=GPUTarget("cuda", ARCH, 32), options=options).asm["ptx"]
    return len(re.findall(r"cp\.async\.c[ag]", ptx)), len(re.findall(r"ld\.global\.b16", ptx))


def main() -> None:
    """Compare, count, compile and print."""
    driver.set_active(_Driver())
    whole = [
        (tokens, 8 * rows, 8 * cols) for tokens in (17, 32, 300) for rows in (2, 3, 16, 72) for cols in (2, 9, 512)
    ]
    eights = [(1, 8, 8), (16, 8, 16), (1, 16, 8)]
    odd = [(tokens, rows, cols) for tokens in (1, 17, 32) for rows in (1, 7, 50257) for cols in (64, 768)]
    told: dict[str, Any] = {
        "different": [line for case in cases() for line in differences(case)],
        "whole": {kind: compilations(kind, whole) for kind in KINDS},
        "eights": {kind: compilations(kind, eights) for kind in KINDS},
        "odd": {kind: compilations(kind, odd) for kind in KINDS},
    }
    for rank in (7, 8):
        sizes = [(kind, rows, cols) for kind in KINDS for rows, cols in ((rank, 4096), (4096, rank))]
        told[f"r{rank}"] = {f"{kind} {rows}x{cols}": copies(kind, rows, cols) for kind, rows, cols in sizes}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
