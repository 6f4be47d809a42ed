"""The parts of benchmarks/device.py that time products: the self-check, the GEMM rate, the kernels beside it.

Letters: O and I the two sides of a weight, T tokens of each row, k pairs.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.device_bench import Bench, Times
from benchmarks.reduced import reduce_rows
from gradent.kernels import availability
from gradent.kernels.common.budget import DEFAULT_BUDGET
from gradent.kernels.common.cost import cheapest
from gradent.kernels.common.wanted import Wanted
from gradent.kernels.gram.reference import reduce_gram
from gradent.kernels.outer.reference import reduce_outer

__all__ = ["Case", "Operands", "check", "gemm", "kernels", "runs_kernels"]

SIDE = 8192
"""Of the square product whose rate is the machine's."""

AGREE = 5e-3
"""Most that entries may differ from torch's, by the norms' product: operands of bfloat16, sums of float32."""


class Case(NamedTuple):
    """Factors of k pairs, both rows of T tokens, of a weight `[O, I]`."""

    rows: int
    cols: int
    tokens: int
    pairs: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def columns(self) -> dict[str, Any]:
        """For the CSV."""
        return {**self._asdict(), "dtype": str(self.dtype).removeprefix("torch.")}

    @property
    def lora(self) -> bool:
        """Whether it is a LoRA factor: gram is never its form."""
        return min(self.rows, self.cols) <= 16


FULL = ((4096, 4096), (14336, 4096), (1024, 4096))
LORA = ((16, 4096), (4096, 16), (16, 14336), (14336, 16), (8, 4096), (4096, 8))
CASES = [
    Case(*shape, tokens, pairs) for group in (FULL, LORA) for tokens in (2048, 512) for pairs in (1, 4)
    for shape in group
]  # fmt: skip
# Without tensor cores, where torch's own products may be the faster ones: the rate of bf16 says nothing about it. They
# come early, for it is the last cases that a slow compilation leaves no time for.
CASES[2 * len(FULL) : 2 * len(FULL)] = [Case(4096, 4096, tokens, 1, torch.float32) for tokens in (2048, 512)] + [
    Case(16, 4096, 2048, 4, torch.float32)
]
TOYS = [Case(48, 32, 20, 1), Case(32, 32, 20, 2), Case(8, 40, 20, 1), Case(32, 48, 20, 1, torch.float32)]


def runs_kernels(device: torch.device) -> bool:
    """Whether Triton's kernels can run on a device, be it in the interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    from gradent.kernels.common.triton_tiles import INTERPRETED  # noqa: PLC0415  (imports Triton)

    return device.type == "cuda" or INTERPRETED


def check(bench: Bench) -> None:
    """The kernels' self-check, which compiles them, and the path that measuring takes.

    Raises:
        RuntimeError: the self-check failed.
    """
    wrong = ""
    if bench.device.type == "cuda":
        from gradent.kernels.self_check import self_check  # noqa: PLC0415  (imports Triton)

        for what in ("self-check, cold", "self-check, warm"):
            began = time.perf_counter()
            wrong = self_check(bench.device)
            bench.put(what, median_ms=(time.perf_counter() - began) * 1e3, rounds=1, note=wrong or "passed")
    for dtype in (torch.bfloat16, torch.float32):
        bench.put("path", dtype=str(dtype).removeprefix("torch."), path=availability.path(bench.device, dtype))
    if wrong:
        raise RuntimeError(f"the kernels' self-check failed: {wrong}")


def gemm(bench: Bench) -> None:
    """The rate of bf16 products of torch, and of a copy in device memory."""
    sides = (32, 64) if bench.toy else (2048, 4096, SIDE, 16384)
    shapes = [(side, side, side) for side in sides]
    shapes += [] if bench.toy else [(rows, cols, 4096) for rows, cols in FULL]  # a weight's gradient over 4,096 tokens
    for rows, cols, depth in shapes:
        left, right = bench.draw(rows, depth), bench.draw(depth, cols)
        out = left.new_empty(rows, cols)
        times = bench.turns({"gemm": lambda a=left, b=right, c=out: torch.mm(a, b, out=c)}, rounds=50, seconds=2.0)
        rate = 2 * rows * cols * depth / times["gemm"].median / 1e9
        sizes = {"dtype": "bfloat16", "rows": rows, "cols": cols, "tokens": depth}
        bench.put("torch.mm", **sizes, **times["gemm"].columns, tflops=rate)
    source = bench.draw(2**10 if bench.toy else 2**30)
    target = torch.empty_like(source)
    times = bench.turns({"copy": lambda: target.copy_(source)}, rounds=30, seconds=2.0)
    moved = 2 * source.nbytes
    bench.put("copy", dtype="bfloat16", **times["copy"].columns, gbytes_s=moved / times["copy"].median / 1e6)


class Operands:
    """Factors of a case and what can be made of them.

    Args:
        bench: for the device.
        case: the sizes.
    """

    def __init__(self, bench: Bench, case: Case) -> None:
        self.case = case
        self.half = case.pairs * case.tokens
        self.u, self.v = (bench.draw(2 * self.half, size, dtype=case.dtype) for size in (case.rows, case.cols))
        self._grad = self.u.new_empty(case.rows, case.cols)
        self._coefficients = torch.ones(case.pairs, 2, device=bench.device)

    @property
    def sides(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`u_w, v_w, u_l, v_l`, k rows of T tokens one after the other."""
        return self.u[: self.half], self.v[: self.half], self.u[self.half :], self.v[self.half :]

    def product(self) -> Tensor:
        """The trainer's own weight gradient over all rows, of the operands' dtype."""
        return torch.mm(self.u.T, self.v, out=self._grad)

    def by_torch(self, form: str) -> Tensor:
        """Entries `[k, 3]` of one form in torch's tiles, pair by pair, as without kernels."""
        tokens, rows, cols = self.case.tokens, self.case.rows, self.case.cols
        tiling = cheapest(
            (tokens, tokens),
            rows,
            cols,
            itemsize=4,
            budget=DEFAULT_BUDGET,
            widen=self.case.dtype != torch.float32,
            gram_cost=0.0 if form == "gram" else 1e9,
        )
        assert tiling.form == form
        starts = range(0, self.half, tokens)
        cut = [[side[start : start + tokens] for side in self.sides] for start in starts]
        groups = [((u_w, v_w), (u_l, v_l)) for u_w, v_w, u_l, v_l in cut]
        if form == "gram":
            return torch.stack([reduce_gram(group, tiling, budget=DEFAULT_BUDGET) for group in groups])
        return torch.stack([reduce_outer(group, tiling) for group in groups])

    def by_kernel(self, form: str) -> Any:
        """The same of a kernel, all pairs in one launch; of "store" with the gradient of the batch."""
        from gradent.kernels.common.triton_operands import Spans  # noqa: PLC0415
        from gradent.kernels.gram.triton import gram_entries  # noqa: PLC0415  (imports Triton)
        from gradent.kernels.outer.triton import outer_entries, outer_with_gradient  # noqa: PLC0415

        spans = Spans.padded(self.case.pairs, self.case.tokens)
        if form == "store":
            return outer_with_gradient(*self.sides, spans, self._coefficients)
        return (gram_entries if form == "gram" else outer_entries)(*self.sides, spans)

    def flops(self, form: str, *, kernel: bool) -> int:
        """Of the products that a form really forms."""
        rows, cols, tokens, pairs, dtype = self.case
        if form != "gram":
            return 4 * pairs * tokens * rows * cols
        side = tokens
        if kernel:
            from gradent.kernels.common.tiles import pick_gram  # noqa: PLC0415

            side = min(tokens, pick_gram(dtype, tokens, pairs).rows)
        count, rest = divmod(tokens, side)
        own = (tokens**2 + count * side**2 + rest**2) // 2
        return 2 * pairs * (rows + cols) * (2 * own + tokens**2)


def kernels(bench: Bench) -> None:
    """Rates of the kernels at a model's shapes, beside torch's, the trainer's own product and the GEMM rate.

    Raises:
        RuntimeError: entries differ from torch's.
    """
    side = 64 if bench.toy else SIDE
    square = {"dtype": "bfloat16", "rows": side, "cols": side, "tokens": side}
    rate = bench.gemm(side)
    bench.put("torch.mm", **square, tflops=rate / 1e12, of_gemm=1.0)
    able, wrong = runs_kernels(bench.device), []
    if not able:
        bench.say("Triton's kernels do not run here (no CUDA, and no TRITON_INTERPRET=1): torch alone is timed.")
    cases = TOYS if bench.toy else CASES
    for number, case in enumerate(cases):
        if bench.left <= 0:
            bench.say(f"out of time: {len(cases) - number} of {len(cases)} cases are left out.")
            break
        wrong += _rates(bench, case, rate, able=able)
    after = bench.gemm(side)
    bench.put("torch.mm, afterwards", **square, tflops=after / 1e12, of_gemm=after / rate)
    if wrong:
        raise RuntimeError(f"entries differ from torch's: {'; '.join(wrong)}")


def _rates(bench: Bench, case: Case, rate: float, *, able: bool) -> list[str]:
    """Time one case; what is wrong with it."""
    given = Operands(bench, case)
    forms = ["outer"] if case.lora else ["outer", "gram"]
    todo: dict[str, Callable[[], Any]] = {"weight-gradient GEMM": given.product}
    for form in forms:
        todo[f"torch {form}"] = lambda form=form: given.by_torch(form)
    errors: dict[str, float] = {}
    if able:
        truth = given.by_torch("outer")
        for form in (*forms, "store"):
            todo[form] = lambda form=form: given.by_kernel(form)
            entries = given.by_kernel(form)
            errors[form] = _error(entries[0] if form == "store" else entries, truth)
    times = bench.turns(todo, rounds=25, seconds=1.2)
    for name, taken in times.items():
        form = name.rpartition(" ")[2]
        against = "weight-gradient GEMM" if name in {"outer", "store"} else f"torch {form}" if name == "gram" else ""
        _put(bench, given, name, form, taken, rate, against, times, errors.get(name))
    if able and case.pairs > 1:
        _call(bench, given, times)
        _group(bench, given, times)
    return [f"{name} by {error:.1e} at {case}" for name, error in errors.items() if not error <= AGREE]


def _put(
    bench: Bench,
    given: Operands,
    name: str,
    form: str,
    taken: Times,
    rate: float,
    against: str,
    times: dict[str, Times],
    error: float | None,
) -> None:
    """A row of one kernel, or of torch."""
    case, kernel = given.case, name in {"outer", "gram", "store"}
    flops = given.flops(form, kernel=kernel) / taken.median / 1e9
    read = given.u.nbytes + given.v.nbytes
    stored = {"store": 4, "GEMM": case.dtype.itemsize}.get(form, 0) * case.rows * case.cols
    bench.put(
        name,
        **case.columns,
        **taken.columns,
        path="triton" if kernel else "torch",
        tflops=flops,
        of_gemm=flops * 1e12 / rate,
        gbytes_s=(read + stored) / taken.median / 1e6,
        ratio=taken.median / times[against].median if against else "",
        against=against,
        error="" if error is None else error,
    )


def _call(bench: Bench, given: Operands, times: dict[str, Times]) -> None:
    """A reduction as the ledger asks for it, the host's part included: nothing is queued ahead."""
    case = given.case
    u, v = (side.view(2 * case.pairs, case.tokens, -1) for side in (given.u, given.v))
    call = {"reduce_pairs": lambda: reduce_rows(u, v, Wanted.pairs(case.pairs), budget=DEFAULT_BUDGET)}
    taken = bench.turns(call, rounds=25, seconds=0.5, ahead=False)["reduce_pairs"]
    bench.put(
        "reduce_pairs, host too",
        **case.columns,
        **taken.columns,
        path=availability.path(bench.device, case.dtype),
        ratio=taken.median / times["outer"].median,
        against="outer",
    )


def _group(bench: Bench, given: Operands, times: dict[str, Times]) -> None:
    """All products among all rows of a case, beside the three numbers a pair."""
    from gradent.kernels.common.tiles import plan_groups  # noqa: PLC0415
    from gradent.kernels.common.triton_operands import Groups  # noqa: PLC0415
    from gradent.kernels.gram.triton import gram_products  # noqa: PLC0415  (imports Triton)
    from gradent.kernels.outer.triton import outer_products  # noqa: PLC0415

    case, rows = given.case, 2 * given.case.pairs
    groups = Groups([case.tokens] * rows, [range(rows)])
    plan = plan_groups(case.dtype, case.rows, case.cols, groups, budget=DEFAULT_BUDGET)
    todo: dict[str, Callable[[], Any]] = {"outer": lambda: outer_products(given.u, given.v, groups, plan=plan)}
    if "gram" in times:
        todo["gram"] = lambda: gram_products(given.u, given.v, groups)
    for form, taken in bench.turns(todo, rounds=25, seconds=1.0).items():
        ratio = taken.median / times[form].median
        columns = {**case.columns, **taken.columns, "path": "triton", "ratio": ratio, "against": form}
        bench.put(f"{form}, all rows one group", **columns)


def _error(entries: Tensor, truth: Tensor) -> float:
    """Largest difference, by the norms' product."""
    scale = torch.stack((truth[:, 0], truth[:, 1], (truth[:, 0] * truth[:, 1]).sqrt()), 1)
    return float(((entries - truth).abs() / scale).max())
