"""How far a reader of one `measure(model, batch)` has to go: the functions and files on the way of the data.

The rule. Landmarks are what the data pass: rows, micro-batches, forwards, a rule, log-probs, the coverage check, a
decision, a reducer, a kernel, the sums by module. On the way are the functions and methods of gradent's that are on the
call stack when a landmark is entered, and the landmark; several of one kind (two rules, say) count once, in the first
one's file, for a weight takes one of them. A stop is one of these that is entered from another file: what a file calls
of its own is read in it. What is only asked on the way (a look-up, a size) and comprehensions do not count.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from transformers import LlamaForCausalLM

import gradent
from gradent import measure, measurement, pair_gram
from gradent.hooks.capture import coverage
from gradent.hooks.passes import microbatch
from gradent.hooks.reduction.collector import REDUCERS
from gradent.hooks.rules import RULES
from gradent.kernels import strategy
from gradent.kernels.gram import reference as gram
from gradent.kernels.outer import reference as outer
from gradent.model import logprobs
from tests.batches import ragged

STOPS, FUNCTIONS, FILES = 19, 32, 16
"""At most: stops, functions on the way (stops and what their files call of their own), and files."""

ROOT = Path(gradent.__file__).parent

LANDMARKS: dict[str, list[Callable[..., Any]]] = {
    "rows": [measurement._rows],  # noqa: SLF001  (no public name)
    "micro-batches": [microbatch.micro_batches],
    "forwards": [microbatch.group_rows],
    "a rule": list(RULES.values()),
    "log-probs": [logprobs.sequence_logprobs],
    "coverage": [coverage.survey],
    "a decision": [strategy.decide],
    "a reducer": list(REDUCERS.values()),
    "a kernel": [gram.reduce_gram, outer.reduce_outer, outer.reduce_all_rows],
    "sums by module": [pair_gram.sum_parameters],
}


def walk(call: Callable[[], object]) -> tuple[dict[str, str], list[str]]:
    """Functions on the way of a call, landmarks by their kind, with their files; and those that are stops."""
    kinds = {inspect.unwrap(each).__code__: kind for kind, some in LANDMARKS.items() for each in some}
    way: dict[str, str] = {}
    stops: dict[str, None] = {}

    def file_of(code: CodeType) -> str | None:
        path = Path(code.co_filename)
        in_place = code.co_name in ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
        return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) and not in_place else None

    def see(frame: FrameType, event: str, _: object) -> None:
        if event != "call" or frame.f_code not in kinds:
            return
        stack: list[tuple[str, CodeType]] = []
        at: FrameType | None = frame
        while at is not None:
            if file := file_of(at.f_code):
                stack.append((file, at.f_code))
            at = at.f_back
        above = ""
        for file, code in reversed(stack):
            name = kinds.get(code, f"{file}:{code.co_firstlineno} {code.co_name}")
            way.setdefault(name, file)
            if file != above:
                stops[name] = None
            above = file

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return way, list(stops)


def test_a_measurement_is_read_in_few_stops(tiny_llama: LlamaForCausalLM) -> None:
    batch = ragged()
    measure(tiny_llama, batch)  # what is asked of a model once is known from here on
    way, stops = walk(lambda: measure(tiny_llama, batch))
    assert LANDMARKS.keys() <= way.keys(), "the walk has lost its way"
    told = "\n".join(f"{'-> ' if name in stops else '   '}{name}" for name in way)
    assert len(stops) <= STOPS, told
    assert len(way) <= FUNCTIONS, told
    assert len(set(way.values())) <= FILES, told
