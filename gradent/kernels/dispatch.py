"""Which code reduces: Triton's kernels on a GPU, plain torch elsewhere. The one place that decides.

On a CUDA device Triton's kernels are used where Triton is installed and, once a device and
process, their self-check succeeds; if either fails, one `GradentWarning` says so, and plain torch does it. So does one
where a budget is below the kernels' scratch, or a CUDA graph is captured before the check. float64, and operands of two
dtypes on the two sides of a pair, are torch's business anyway. On a CPU nothing of this is loaded.

The environment variable `GRADENT_KERNELS` forces a path: `torch`, or `triton`, without a self-check (on a CPU that
takes Triton's interpreter, `TRITON_INTERPRET=1`, and is meant for tests).
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from gradent.errors import GradentWarning, InputError
from gradent.kernels.common.cost import choose
from gradent.kernels.common.numerics import batch_pays, reduce_batch, reduce_dense
from gradent.kernels.common.streams import is_capturing
from gradent.kernels.crossover import price

if TYPE_CHECKING:
    from gradent.kernels.common.triton_operands import Spans

__all__ = [
    "VARIABLE",
    "announce_budget",
    "attempt",
    "on_kernels",
    "pairs_pay",
    "pairs_together",
    "path",
    "reduce_pair",
    "reduce_pairs",
]

T = TypeVar("T")

VARIABLE = "GRADENT_KERNELS"
NARROW = (torch.float32, torch.bfloat16, torch.float16)

MISSING = "Triton is not installed"
KEEP = f"{VARIABLE}=torch keeps torch without this warning"

_verdicts: dict[torch.device, str] = {}
"""Device -> why the kernels are not used on it, "" where they are."""

_announced: set[tuple[torch.device, str]] = set()
"""What was said of single reductions that kernels leave to torch."""


def path(device: torch.device | str, dtype: torch.dtype) -> str:
    """What reduces operands of a dtype on a device.

    The first question about a CUDA device imports Triton and runs the self-check, which compiles (half a minute or so;
    little where Triton's cache has the kernels).

    Args:
        device: where the operands are.
        dtype: theirs.

    Returns:
        "triton", or "torch" and why, as `torch (float64 operands)`.

    Raises:
        InputError: `GRADENT_KERNELS` has another value than `torch` or `triton`, or asks for kernels that this process
            cannot run.
    """
    device = torch.device(device)
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", "torch", "triton"):
        raise InputError(
            f"{VARIABLE}={forced!r}: accepted are 'torch' and 'triton'; leave it unset to let gradent choose."
        )
    if forced == "torch":
        return f"torch ({VARIABLE}=torch)"
    if dtype not in NARROW:
        return f"torch ({str(dtype).removeprefix('torch.')} operands)"
    if device.type != "cuda" and not forced:
        return f"torch (operands on the {device.type})"
    reason = _forced(device) if forced else _verdict(device)
    return f"torch ({reason})" if reason else "triton"


def reduce_pair(
    u_w: Tensor, v_w: Tensor, u_l: Tensor, v_l: Tensor, *, budget: int, weight: Tensor | None = None
) -> Tensor:
    """Gram entries of `G_w = u_wᵀ v_w` and `G_l = u_lᵀ v_l`, neither of which is ever held whole.

    Args:
        u_w: `[T_w, O]`, any float dtype.
        v_w: `[T_w, I]`.
        u_l: `[T_l, O]`.
        v_l: `[T_l, I]`.
        budget: bytes that tiles, or the kernels' sums of tiles, may take.
        weight: `[O, I]` or None; square root of the metric's diagonal, which multiplies every entry of G.

    Returns:
        `[3]` float64, on the operands' device.

    Raises:
        MemoryBudgetError: not even one row of a tile fits.
    """
    if _kernels(u_w, v_w, u_l, v_l):
        from gradent.kernels.common.triton_operands import Spans  # noqa: PLC0415  (imports Triton)

        launch = _launch(u_w, v_w, u_l, v_l, Spans.of_pair(len(u_w), len(u_l)), budget, weight, last=True)
        entries = None if launch is None else launch()
        if entries is not None:
            return entries[0]
    return reduce_dense(u_w, v_w, u_l, v_l, budget=budget, weight=weight)


def pairs_together(
    u: Tensor,
    v: Tensor,
    *,
    budget: int,
    lengths: Tensor | Sequence[int] | None = None,
    weight: Tensor | None = None,
) -> Callable[[], Tensor] | None:
    """How k pairs are reduced at once, looked up but not done: `pairs_pay` and `reduce_pairs` in one.

    Args:
        u: `[2k, T, O]`, rows 0..k-1 chosen and k..2k-1 rejected, any float dtype.
        v: `[2k, T, I]`.
        budget: as for `reduce_pair`.
        lengths: the tokens of each right-padded row, 2k integers or int64 `[2k]`, whose padding is then not looked at;
            None where padding is zero in u or v.
        weight: as for `reduce_pair`.

    Returns:
        A call that returns what `reduce_pairs` does; None where pair by pair is the better way, and nothing was copied.
    """
    launch = _launch_pairs(u, v, budget, lengths, weight)
    if launch is None:
        pays = lengths is None and batch_pays(u, v, budget=budget)
        return partial(reduce_batch, u, v, weight=weight) if pays else None

    def together() -> Tensor:
        entries = launch()
        if entries is not None:
            return entries
        if lengths is None and batch_pays(u, v, budget=budget):
            return reduce_batch(u, v, weight=weight)
        return _one_by_one(u, v, budget, lengths, weight)

    return together


def reduce_pairs(
    u: Tensor,
    v: Tensor,
    *,
    budget: int,
    lengths: Tensor | Sequence[int] | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Gram entries of k pairs, at once where `pairs_together` knows how, else pair by pair.

    Args:
        u: as for `pairs_together`.
        v: the same.
        budget: as for `reduce_pair`.
        lengths: as for `pairs_together`.
        weight: as for `reduce_pair`.

    Returns:
        `[k, 3]` float64.

    Raises:
        MemoryBudgetError: not even one row of a tile fits.
    """
    together = pairs_together(u, v, budget=budget, lengths=lengths, weight=weight)
    return _one_by_one(u, v, budget, lengths, weight) if together is None else together()


def pairs_pay(u: Tensor, v: Tensor, *, budget: int) -> bool:
    """Whether `reduce_pairs` is the way: always with kernels that fit the budget, in torch where `batch_pays`.

    Args:
        u: `[2k, T, O]`.
        v: `[2k, T, I]`.
        budget: bytes of scratch.

    Returns:
        The answer; nothing is copied for it.
    """
    return pairs_together(u, v, budget=budget) is not None


def on_kernels(*operands: Tensor) -> bool:
    """Whether kernels, not torch, reduce these operands.

    Args:
        *operands: tensors on one device.

    Returns:
        Whether `path` is "triton" for all of them.
    """
    kinds = {(operand.device, operand.dtype) for operand in operands}
    return all(path(device, dtype) == "triton" for device, dtype in kinds)


def attempt(device: torch.device, launch: Callable[[], T]) -> T | None:
    """What kernels give, or None where they cannot be compiled or launched: torch is then to do it.

    The failure is announced, and `path` names torch for the device from then on.

    Args:
        device: where the operands are.
        launch: calls Triton's kernels.

    Returns:
        What `launch` returned, or None.

    Raises:
        OutOfMemoryError: torch's own, also where Triton found no memory: it says nothing about the kernels.
        BROKEN: what Triton raised, with `GRADENT_KERNELS=triton`.
    """
    from gradent.kernels.self_check import BROKEN  # noqa: PLC0415  (imports Triton)

    try:
        return launch()
    except torch.OutOfMemoryError:
        raise
    except BROKEN as error:
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        if os.environ.get(VARIABLE):
            raise
        _give_up(device, f"{type(error).__name__}: {str(error).strip() or 'without a message'}")
        return None


def announce_budget(device: torch.device, needed: int, budget: int) -> None:
    """Say, once a device, that torch reduces what the kernels have no room for.

    Args:
        device: where the operands are.
        needed: bytes that the kernel would hold.
        budget: bytes that it may.
    """
    reason = f"the kernels would hold {needed:,} bytes for some products, and memory_budget is {budget:,}"
    _announce_once(device, reason, "give a larger memory_budget", kind="budget")


def _announce_once(device: torch.device, reason: str, remedy: str, *, kind: str = "") -> None:
    """One warning a device and kind of reason."""
    key = device, kind or reason
    if key not in _announced:
        _announced.add(key)
        _warn(device, reason, remedy)


def _one_by_one(
    u: Tensor, v: Tensor, budget: int, lengths: Tensor | Sequence[int] | None, weight: Tensor | None
) -> Tensor:
    pairs, tokens = len(u) // 2, u.shape[1]
    ends = [tokens] * len(u) if lengths is None else [int(length) for length in lengths]
    cut = [(u[row, :end], v[row, :end]) for row, end in enumerate(ends)]
    return torch.stack(
        [reduce_pair(*cut[pair], *cut[pair + pairs], budget=budget, weight=weight) for pair in range(pairs)]
    )


def _launch_pairs(
    u: Tensor, v: Tensor, budget: int, lengths: Tensor | Sequence[int] | None, weight: Tensor | None
) -> Callable[[], Tensor | None] | None:
    """As `_launch`, for rows of one tensor; None too where their tokens are not evenly spaced in memory."""
    if len(u) == 0 or not _kernels(u, v, u, v) or not (_even(u) and _even(v)):
        return None
    from gradent.kernels.common.triton_operands import Spans  # noqa: PLC0415  (imports Triton)

    half, tokens = len(u) // 2, u.shape[1]
    u, v, middle = u.flatten(0, 1), v.flatten(0, 1), half * tokens
    spans = Spans.padded(half, tokens, lengths)
    return _launch(u[:middle], v[:middle], u[middle:], v[middle:], spans, budget, weight)


def _launch(
    u_w: Tensor,
    v_w: Tensor,
    u_l: Tensor,
    v_l: Tensor,
    spans: Spans,
    budget: int,
    weight: Tensor | None,
    *,
    last: bool = False,
) -> Callable[[], Tensor | None] | None:
    """The kernel's launch, which gives `[k, 3]` (None if it turns out to be impossible); None if over the budget."""
    from gradent.kernels.gram import triton as gram  # noqa: PLC0415
    from gradent.kernels.outer import triton as outer  # noqa: PLC0415

    factors = (u_w, v_w, u_l, v_l, spans)
    longest = (max(side, default=0) for side in (spans.chosen_length, spans.rejected_length))
    sizes = (*longest, u_w.shape[1], v_w.shape[1])
    dear = partial(price, u_w.device, u_w.dtype, path="triton", budget=budget)
    chosen = partial(choose, *sizes, itemsize=4, budget=budget, weighted=weight is not None, price=dear)
    plan = attempt(u_w.device, chosen)  # it may measure the kernels
    if plan is None:
        return None
    needed = (gram.gram_scratch if plan.form == "gram" else outer.outer_scratch)(*factors)
    if needed > budget:
        if last:  # of several pairs, each may still fit by itself
            announce_budget(u_w.device, needed, budget)
        return None
    if plan.form == "gram":
        return lambda: attempt(u_w.device, lambda: gram.gram_entries(*factors))
    return lambda: attempt(u_w.device, lambda: outer.outer_entries(*factors, weight))


def _kernels(u_w: Tensor, v_w: Tensor, u_l: Tensor, v_l: Tensor) -> bool:
    """Whether the kernels take these operands."""
    if u_w.dtype != u_l.dtype or v_w.dtype != v_l.dtype:
        return False
    return on_kernels(u_w, v_w)


def _even(rows: Tensor) -> bool:
    """Whether `[2k, T, ...]` is a view of `[2k T, ...]`."""
    return rows.shape[1] > 0 and rows.stride(0) == rows.shape[1] * rows.stride(1)


def _forced(device: torch.device) -> str:
    """No reason against kernels, "", where `GRADENT_KERNELS=triton` can be followed; an error elsewhere."""
    if importlib.util.find_spec("triton") is None:
        raise InputError(f"{VARIABLE}=triton, but Triton is not installed: pip install 'gradent[cuda]'.")
    from gradent.kernels.common.triton_tiles import INTERPRETED  # noqa: PLC0415  (imports Triton)

    if device.type != "cuda" and not INTERPRETED:
        raise InputError(
            f"{VARIABLE}=triton, but the operands are on the {device.type}, where only Triton's interpreter runs: set "
            f"TRITON_INTERPRET=1 before Python starts, or unset {VARIABLE}."
        )
    return ""


def _verdict(device: torch.device) -> str:
    """Why a CUDA device does without the kernels, "" if it does not; found out and announced once."""
    if device == torch.device(device.type):  # without a number
        device = torch.device(device.type, torch.cuda.current_device())
    if device not in _verdicts:
        if is_capturing(device):  # a check waits for the device, which ends the capture
            reason = "a CUDA graph is captured before the kernels were checked"
            _announce_once(device, reason, f"measure once before the capture; {KEEP}")
            return reason
        reason = _examine(device)
        if reason:
            _give_up(device, reason)
        else:
            _verdicts[device] = ""
    return _verdicts[device]


def _examine(device: torch.device) -> str:
    if importlib.util.find_spec("triton") is None:
        return MISSING
    try:
        from gradent.kernels.self_check import self_check  # noqa: PLC0415  (imports Triton)
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    wrong = self_check(device)
    return f"the kernels' self-check failed: {wrong}" if wrong else ""


def _give_up(device: torch.device, reason: str) -> None:
    _verdicts[device] = reason
    remedy = (
        "pip install 'gradent[cuda]'"
        if reason == MISSING
        else "pip install --upgrade 'gradent[cuda]', or report it with this message"
    )
    _warn(device, reason, f"{remedy}; {KEEP}")


def _warn(device: torch.device, reason: str, remedy: str) -> None:
    warnings.warn(
        f"Gradients on {device} are reduced in plain torch, not by gradent's kernels: {reason}. Results are the same, "
        f"later. What to do: {remedy}.",
        GradentWarning,
        stacklevel=3,
    )
