"""A backward pass run in pieces gives what it gives in one, and lies open only where one node is under way."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from gradent.model.parameters import trainable
from gradent.tokens.row_pass import Arrival, RowPass, RowTokens
from gradent.tokens.schedule import byte_size, cut_schedule, find_schedule
from tests.zoo import build


def residual(x: Tensor, layers: nn.ModuleList) -> Tensor:
    for layer in layers:
        x = x + layer(torch.tanh(x))
    return x


@pytest.fixture
def stack() -> tuple[Tensor, nn.ModuleList, Tensor]:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)).double()
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    return x, layers, residual(x, layers)


def schedule_of(x: Tensor, out: Tensor, layers: nn.ModuleList):
    leaves = {get_gradient_edge(leaf).node: number for number, leaf in enumerate([x, *layers.parameters()])}
    return find_schedule(get_gradient_edge(out), frozenset(), frozenset(), leaves)


def test_every_node_comes_after_its_consumers(stack):
    x, layers, out = stack
    schedule = schedule_of(x, out, layers)
    place = {node: number for number, node in enumerate(schedule.nodes)}
    for node in schedule.nodes:
        for child, _ in node.next_functions:
            assert child not in place or place[child] > place[node]
    assert set(schedule.leaves) == set(range(7))
    assert schedule.costs == [sum(map(byte_size, edges)) for edges in schedule.pending]
    assert schedule.pending[-1] == ()


@pytest.mark.parametrize("limit", [0, 1, 10**9])
def test_pieces_lie_where_one_node_is_under_way(stack, limit):
    x, layers, out = stack
    schedule = schedule_of(x, out, layers)
    cuts = cut_schedule(schedule, 0, [1] * len(schedule.nodes), limit)
    assert cuts[0] == 0 and cuts[-1] == len(schedule.nodes) and all(start < stop for start, stop in pairwise(cuts))
    assert all(len({edge.node for edge in schedule.pending[cut]}) == 1 for cut in cuts[:-1])
    assert (len(cuts) == 2) == (limit == 10**9)


@pytest.mark.parametrize("limit", [0, 10**9])
def test_a_pass_in_pieces(limit):
    """Output gradients at every use, token by token, against one plain backward a token."""
    model = build("llama")
    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    parameters = list(trainable(model).values())
    row_pass = RowPass(model, parameters, RowTokens(0, [0, 1, 2], ids, [4, 6, 7]), 0)
    got: dict[int, Tensor] = {}
    for arrival in row_pass.start([0, 1, 2], check=True):
        assert arrival.tap in row_pass.head_taps()
    for start, stop in pairwise(
        cut_schedule(row_pass.schedule, row_pass.head, [1] * len(row_pass.schedule.nodes), limit)
    ):
        arrivals: list[Arrival] = []
        row_pass.advance(start, stop, 2, arrivals.append)
        for arrival in arrivals:
            number = row_pass.taps.index(arrival.tap)
            got.setdefault(number, torch.zeros(3, *arrival.grad_outputs.shape[1:], dtype=torch.float64))
            got[number][arrival.span] = arrival.grad_outputs
    below = [number for number, tap in enumerate(row_pass.taps) if tap not in row_pass.head_taps()]
    assert sorted(got) == below and row_pass.head > 0
    logps = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    bias = model.model.layers[0].input_layernorm.weight
    tap = next(number for number in below if row_pass.taps[number].use.view.param == _number(parameters, bias))
    for token, place in enumerate((4, 6, 7)):
        (want,) = torch.autograd.grad(logps[place - 1], [bias], retain_graph=True)
        torch.testing.assert_close(
            row_pass.taps[tap].use.token_sums(got[tap], 2**20)[token], want, rtol=1e-6, atol=1e-9
        )
    row_pass.close()


def _number(parameters: list[Tensor], one: Tensor) -> int:
    return next(number for number, parameter in enumerate(parameters) if parameter is one)
