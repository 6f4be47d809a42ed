"""`module.compile()` on layers or on the model: the capture is never traced, and the entries are exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradent import attach
from gradent.model.parameters import compiled_modules
from gradent.recorder.recording import Recording
from tests.batches import ragged
from tests.hooks.piggyback.watching import own_hooks, prepare
from tests.trainer_steps import through_logits
from tests.truth import TOLERANCE, scaled_error, truth
from tests.zoo import build


def run(how: Callable[[nn.Module, Any], None], *, watched: bool) -> tuple[dict[str, Tensor], list[Any], list[str]]:
    """Weights after three steps, what was recorded of the first, and every function that was compiled."""
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(graph.code)
        return graph.forward

    torch._dynamo.reset()  # noqa: SLF001
    model, batch = prepare(build("llama", dtype=torch.float32)), ragged()
    how(model, backend)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=1e-2), []
    for step in range(3):
        if watched and step == 1:
            with attach(model) as recorder:
                through_logits(model, batch).backward()
                before = truth(build_as(model), batch)
                found.append((recorder.harvest(), before))
        else:
            through_logits(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert own_hooks(model) == [] and compiled_modules(model)
    return {name: part.detach().clone() for name, part in model.named_parameters()}, found, compiled


def build_as(model: nn.Module) -> nn.Module:
    """A model that is not compiled, with the same weights."""
    copy = build("llama", dtype=torch.float32)
    copy.load_state_dict(model.state_dict())
    return copy


def layers(model: Any, backend: Any) -> None:
    for layer in model.model.layers:
        layer.compile(backend=backend)


def whole(model: Any, backend: Any) -> None:
    model.compile(backend=backend)


@pytest.mark.parametrize("how", [layers, whole])
def test_compiled_calls(how: Callable[[nn.Module, Any], None]) -> None:
    weights, _, alone = run(how, watched=False)
    ours, ((recording, true),), compiled = run(how, watched=True)
    assert compiled == alone and compiled, "something else was compiled because it was watched"
    assert all(torch.equal(ours[name], weights[name]) for name in weights)
    assert isinstance(recording, Recording) and recording.source == "measure"
    assert scaled_error(recording.gram, true) <= TOLERANCE["float32"]
