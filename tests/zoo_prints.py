"""What a family of the zoo is to gradent, sizes aside: its fingerprint.

gradent meets a model through the calls of torch functions that its trainable parameters enter. Families whose calls are
of the same kinds, taken by the same rules in the same arithmetic, are one graph to it: of each such group one family
is held to every truth each day, and all of them in `make test-all`. Every family's fingerprint is taken each day, by
a forward of one row and one of two, and compared with the committed one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from gradent.hooks.capture.capture import Capture
from gradent.hooks.rules import RULES
from gradent.hooks.uses.layout import Layout
from tests.batches import ragged
from tests.truth import call
from tests.zoo import MEASURABLE
from tests.zoo_tables import TWINS, VARIANTS

COMMITTED = Path(__file__).with_name("zoo_fingerprints.json")

RENEW = "`make zoo-fingerprints` holds it to every truth and, where it passes, commits its fingerprint to the file."

MOVES = tuple("Index Gather Take MaskedSelect Sort Topk Roll Flip Scatter MaskedScatter Unfold".split())
"""Beginnings of the names of nodes that hand out positions in an order of their own, or put them back."""


def facts(model: nn.Module) -> list[str]:
    """What gradent has to do with a model: kinds of parameters by their calls, what moves positions, dtypes."""
    batch = ragged().input_ids
    alone, together = (_facts(model, batch[1 : 1 + rows]) for rows in (1, 2))
    differing = {*(f"alone: {fact}" for fact in alone - together), *(f"together: {fact}" for fact in together - alone)}
    return sorted(alone & together) + sorted(differing)


def fingerprint(found: list[str]) -> str:
    """Twelve hex digits of the facts."""
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:12]


def committed() -> dict[str, dict[str, list[str]]]:
    """Fingerprint to `{"families": [...], "facts": [...]}`, as committed."""
    return json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}


def print_of() -> dict[str, str]:
    """Family or variant to its committed fingerprint."""
    return {name: key for key, group in committed().items() for name in group["families"]}


def chosen() -> tuple[str, ...]:
    """The families that are held to every truth each day: one of each fingerprint, and those without one."""
    prints = print_of()
    groups: dict[str, list[str]] = defaultdict(list)
    for name in MEASURABLE:
        groups[prints.get(name, name)].append(name)
    return tuple(sorted(min(group, key=lambda one: (one in TWINS, one in VARIANTS, one)) for group in groups.values()))


def zoo() -> list[Any]:
    """Every family as a parameter of a test, those that are not `chosen` for the night."""
    daily = set(chosen())
    return [name if name in daily else pytest.param(name, marks=pytest.mark.nightly) for name in MEASURABLE]


def _facts(model: nn.Module, ids: Tensor) -> set[str]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    calls: dict[int, Counter[str]] = defaultdict(Counter)
    rows, length = ids.shape
    capture = Capture(parameters, Layout(rows, length, lambda: [(0, length)] * rows), lambda tap, grad: None)
    with _listening(lambda number, fact: calls[number].update([fact])), capture:
        logits = call(model, ids)
    loss = logits.double().log_softmax(-1)[..., 0].sum()
    for number in capture.survey(loss).missed:
        calls[number].update(["by no rule"])
    capture.close()
    nodes = list(_nodes(loss.grad_fn))
    names = {node.name().removesuffix("0").removesuffix("1").removesuffix("Backward") for node in nodes}
    return {
        *(" and ".join(sorted(_told(*item) for item in counts.items())) for counts in calls.values()),
        *(f"moves positions: {name}" for name in names if name.startswith(MOVES)),
        *(f"custom function: {type(node).__name__}" for node in nodes if isinstance(node, BackwardCFunction)),
        *(f"gradients in {meta.dtype}" for node in nodes for meta in node._input_metadata),  # noqa: SLF001
    }


def _told(fact: str, times: int) -> str:
    # How often an expert is used goes by the number of its tokens, and says nothing.
    return f"{fact}, several times" if times > 1 and "slot" not in fact and fact != "by no rule" else fact


@contextmanager
def _listening(tell: Callable[[int, str], None]) -> Iterator[None]:
    """Every rule tells of each trainable operand that it is asked about, in what form, and whether it takes it."""

    def wrap(function: Any, rule: Callable[[Any], list[Any]]) -> Callable[[Any], list[Any]]:
        def told(met: Any) -> list[Any]:
            uses = rule(met)
            taken = {use.view.param for use in uses}
            for place, operand in [*enumerate(met.args), *met.kwargs.items()]:
                view = met.find(operand) if isinstance(operand, Tensor) else None
                if view is not None:
                    tell(view.param, _fact(function.__name__, place, view, met.out, view.param in taken))
            return uses

        return told

    rules = dict(RULES)
    RULES.update({function: wrap(function, rule) for function, rule in rules.items()})
    try:
        yield
    finally:
        RULES.update(rules)


def _fact(function: str, place: Any, view: Any, out: Tensor, taken: bool) -> str:
    forms = {
        "slot": bool(view.slot),
        "flipped": view.flipped,
        "reshaped": view.reshaped,
        "scaled": view.gain is not None,
        "looked up": view.ids is not None,
        "flat": out.dim() < 3,
    }
    form = " ".join(name for name, holds in forms.items() if holds)
    return f"{function}[{place}]{form and ' ' + form} {str(out.dtype).removeprefix('torch.')}{'' if taken else ' left'}"


def _nodes(root: Node | None) -> Iterator[Node]:
    seen, pending = {root}, [root]
    while pending:
        node = pending.pop()
        if node is not None:
            yield node
            following = {child for child, _ in node.next_functions} - seen
            seen |= following
            pending += following
