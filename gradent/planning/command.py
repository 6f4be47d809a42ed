"""`gradent plan`: the traced model, what `decide` says of its layers, and the table of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from rich.text import Text

from gradent.errors import InputError
from gradent.hooks.passes.autograd_engine import EXACT, is_plain, rows_within
from gradent.hooks.passes.microbatch import group_rows, micro_batches
from gradent.kernels.availability import device_name, path
from gradent.kernels.common.budget import DEFAULT_BUDGET, parse_budget
from gradent.loading.models import check_device, check_dtype
from gradent.loading.runs.last import last_of_run
from gradent.loading.source import resolve_source
from gradent.planning.cost import CostSetting, Line, Totals, plan_lines, sum_lines
from gradent.planning.trace import TracedModel, inspect_model
from gradent.report.page.numbers import percent
from gradent.report.terminal.tables import new_table
from gradent.text import printable

__all__ = ["print_plan", "show_plan"]

_NAME, _FIGURES = 24, 56  # columns of a name at least, and of all that stands beside it
_FORMS = (
    "Form: what is reduced. outer: tiles of the weight gradients themselves; gram: Gram matrices of activations and "
    "output gradients; sum: gradients of biases and norms; lookup: rows of an embedding."
)


def show_plan(
    model: str,
    *,
    tokens: int,
    pairs: int = 1,
    adapter: str | None = None,
    memory_budget: int | str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
    console: Console,
) -> None:
    """Print what `measure` would do to pairs of two rows of T tokens, by the model's config.json alone, no weights."""
    if tokens < 1 or pairs < 1:
        raise InputError(f"tokens is {tokens} and pairs is {pairs}; both must be 1 or more.")
    check_dtype(dtype)
    place = check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    budget = parse_budget(memory_budget) or DEFAULT_BUDGET
    model = last_of_run(model, adapter, lambda text: console.print(Text(printable(text), overflow="fold")))
    traced = inspect_model(resolve_source(model, adapter, weights=False), trust_remote_code=trust_remote_code)
    operands = traced.dtype if dtype == "auto" else getattr(torch, dtype)
    reduced_by = path(place, operands)
    # A use without a rule cannot tell rows apart: they go through the model one by one, pair after pair.
    alone = any(use.kind == "explicit" for use in traced.uses)
    together = 1 if alone else len(micro_batches([(tokens, tokens)] * pairs, place)[0])
    # Only a hook on a parameter, tf32 or autocast, of which a plan knows nothing, could change this.
    sizes = traced.parameters * operands.itemsize, traced.trainable * operands.itemsize
    few = rows_within(*sizes, budget) if operands in EXACT else 0
    forwards = [[0], [1]] if alone else group_rows([tokens] * (2 * together), place, few=few)
    setting = CostSetting(
        tokens=tokens,
        groups=pairs,
        together=together,
        rows=max(map(len, forwards)),
        is_plain=is_plain(forwards, few),
        dtype=operands,
        device=place.type,
        has_kernels=reduced_by == "triton",
        budget=budget,
        limit=None if memory_budget is None else budget,
    )
    lines = plan_lines(traced.uses, setting)
    facts = {
        "model": f"{model} ({traced.name}), {_si(traced.trainable)} of {_si(traced.parameters)} parameters trained",
        "rows": f"{pairs} pair{'s' * (pairs > 1)}, {tokens} tokens a row, {setting.together} at once",
        "device": f"{device_name(place)}, {str(operands).removeprefix('torch.')}, reduced by {reduced_by}",
    }
    totals = sum_lines(lines, setting, traced.parameters)
    facts["costs"] = (
        f"{totals.flops / totals.pass_flops:.1%} of a forward and backward ({_flop(totals.flops)} of "
        f"{_flop(totals.pass_flops)}), and up to {_bytes(totals.scratch)} of scratch"
    )
    for name, fact in facts.items():
        console.print(Text(f"{name:<7} {printable(fact)}", "bold", overflow="fold"))
    print_plan(lines, totals, setting, traced, console)


def print_plan(
    lines: Sequence[Line], totals: Totals, setting: CostSetting, traced: TracedModel, console: Console
) -> None:
    """Print the table and the totals."""
    kernels = setting.has_kernels
    names = ("layers", "O×I", "r", "form", *(["path"] if kernels else []), "tile", "FLOPs", "scratch", "share")
    room = max(_NAME, console.width - _FIGURES)
    rows: list[list[str | Text]] = [
        [
            Text(
                _in_lines(printable(line.name), room) + (f" ×{line.count}" if line.count > 1 else ""), overflow="fold"
            ),
            (f"{line.slots}×" if line.slots > 1 else "") + "×".join(map(str, line.shape)),
            "" if line.rank is None else str(line.rank),
            line.form,
            *([line.path] if kernels else []),
            "" if line.tile is None else "×".join(map(str, line.tile)) + (f", {line.rows} rows" * (line.rows > 2)),
            _si(line.flops),
            _bytes(line.scratch),
            percent(line.flops / totals.flops if totals.flops else 0.0),
        ]
        for line in lines
    ]
    console.print(new_table(*names, text={0, 3, 4} if kernels else {0, 3}, rows=rows))
    frozen = "" if traced.trainable == traced.parameters else ", 4·P·T for those that are frozen"
    console.print(
        Text(
            f"A forward and backward is 6·P·T FLOP for P parameters and T tokens of each row{frozen}. Largest scratch: "
            f"{_bytes(totals.scratch)}, of a budget of {_bytes(setting.budget)}. Model and activations come on top.\n"
            f"O×I: outputs and inputs of a layer; r: rank of an adapter. {_FORMS}"
        )
    )
    for remark in _remarks(lines, totals, setting, traced):
        console.print(Text(remark))


def _remarks(lines: Sequence[Line], totals: Totals, setting: CostSetting, traced: TracedModel) -> Iterator[str]:
    """What the table alone would not explain."""
    reasons = {f"{line.strategy.reducer}: {line.strategy.why}." for line in lines if line.strategy is not None}
    yield from sorted(reasons)
    if setting.tokens > traced.longest:
        yield (
            f"The model says that it takes {traced.longest:,} tokens at most (max_position_embeddings); with learned "
            f"positions, rows of {setting.tokens:,} fail."
        )
    if setting.is_plain:
        yield (
            "whole: every row has a forward of its own here, and so little is trained that the backward itself forms "
            "the gradients. There are no tiles; all rows' gradients are held, and copied twice while they are reduced."
        )
    if totals.waiting > max((line.scratch for line in lines), default=0):
        yield f"Small gradients wait to be reduced together: up to {_bytes(totals.waiting)} of them, copied meanwhile."
    refused = [line for line in lines if line.refused]
    if refused:
        yield (
            f"torch in {len(refused)} of {sum(bool(line.path) for line in lines)} lines of products: the kernels' sums "
            f"of tiles would take up to {_bytes(max(line.refused for line in refused))}, more than the budget, so "
            "torch's tiles reduce them: the same results, later."
        )
    if any(line.form == "explicit" for line in lines):
        yield (
            "explicit: no rule knows this use; both gradients are held whole, and every row has a forward of its "
            "own. Only a memory_budget that is given limits them."
        )
    dear = [line for line in lines if line.form == "explicit" and line.scratch > (setting.limit or math.inf)]
    if dear:
        yield (
            f"measure will refuse the explicit gradients of {', '.join(line.name for line in dear)}, which need "
            f"{_bytes(max(line.scratch for line in dear))}: raise memory_budget, freeze them, or pass "
            "allow_uncovered=True to go on without them."
        )
    if any(line.form == "sum" and 2 * setting.itemsize * math.prod(line.shape) > setting.budget for line in lines):
        yield "sum: the two gradients of a bias or a norm are held whole, also where they are more than the budget."


def _in_lines(name: str, room: int) -> str:
    """A module's name, broken at its dots into lines of that many columns."""
    lines = [""]
    for part in re.split(r"(?<=\.)", name):
        if lines[-1] and len(lines[-1]) + len(part) > room:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _flop(number: int) -> str:
    text = _si(number)
    return f"{text[:-1]} {text[-1]}FLOP" if text[-1].isalpha() else f"{text} FLOP"


def _si(number: int) -> str:
    """A number in three digits, with T, G, M or k behind it."""
    for factor, letter in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{letter}" if number < 999.5 * factor else f"{number / factor:.0f}{letter}"
    return str(number)


def _bytes(number: int) -> str:
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}" if number < 999.5 * factor else f"{number / factor:.0f} {unit}"
    return f"{number} B"
