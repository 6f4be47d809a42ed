"""A backward pass run in pieces gives what it gives in one, and lies open only where one node is under way."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from gradent.model.calls import trainable
from gradent.tokens.row_pass import Arrival, Lanes, Strand
from gradent.tokens.schedule import byte_size, cut_order, find_order
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


def order_of(x: Tensor, out: Tensor, layers: nn.ModuleList):
    leaves = {get_gradient_edge(leaf).node: number for number, leaf in enumerate([x, *layers.parameters()])}
    return find_order(get_gradient_edge(out), frozenset(), frozenset(), leaves)


def test_every_node_comes_after_its_consumers(stack):
    x, layers, out = stack
    order = order_of(x, out, layers)
    place = {node: number for number, node in enumerate(order.nodes)}
    for node in order.nodes:
        for child, _ in node.next_functions:
            assert child not in place or place[child] > place[node]
    assert set(order.leaves) == set(range(7))
    assert order.costs == [sum(map(byte_size, edges)) for edges in order.pending]
    assert order.pending[-1] == ()


@pytest.mark.parametrize("limit", [0, 1, 10**9])
def test_pieces_lie_where_one_node_is_under_way(stack, limit):
    x, layers, out = stack
    order = order_of(x, out, layers)
    cuts = cut_order(order, 0, [1] * len(order.nodes), limit)
    assert cuts[0] == 0 and cuts[-1] == len(order.nodes) and all(start < stop for start, stop in pairwise(cuts))
    assert all(len({edge.node for edge in order.pending[cut]}) == 1 for cut in cuts[:-1])
    assert (len(cuts) == 2) == (limit == 10**9)


@pytest.mark.parametrize("limit", [0, 10**9])
def test_a_pass_in_pieces(limit):
    """Cotangents at every use, lane by lane, against one plain backward a lane."""
    model = build("llama")
    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    parameters = list(trainable(model).values())
    strand = Strand(model, parameters, Lanes(0, [0, 1, 2], ids, [4, 6, 7]), 0)
    got: dict[int, Tensor] = {}
    for arrival in strand.start([0, 1, 2], check=True):
        assert arrival.tap in strand.head_taps()
    for start, stop in pairwise(cut_order(strand.order, strand.head, [1] * len(strand.order.nodes), limit)):
        arrivals: list[Arrival] = []
        strand.advance(start, stop, 2, arrivals.append)
        for arrival in arrivals:
            number = strand.taps.index(arrival.tap)
            got.setdefault(number, torch.zeros(3, *arrival.cotangents.shape[1:], dtype=torch.float64))
            got[number][arrival.lanes] = arrival.cotangents
    below = [number for number, tap in enumerate(strand.taps) if tap not in strand.head_taps()]
    assert sorted(got) == below and strand.head > 0
    logps = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    bias = model.model.layers[0].input_layernorm.weight
    tap = next(number for number in below if strand.taps[number].use.view.param == _number(parameters, bias))
    for lane, place in enumerate((4, 6, 7)):
        (want,) = torch.autograd.grad(logps[place - 1], [bias], retain_graph=True)
        torch.testing.assert_close(strand.taps[tap].use.token_sums(got[tap], 2**20)[lane], want, rtol=1e-6, atol=1e-9)
    strand.close()


def _number(parameters: list[Tensor], one: Tensor) -> int:
    return next(number for number, parameter in enumerate(parameters) if parameter is one)
