"""The token level's contractions against gradients that are formed whole, in float64, at odd sizes and tiny budgets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gradent.kernels.common.numerics import dots
from gradent.tokens import contractions
from gradent.tokens.contractions import (
    Gradients,
    RankOne,
    SharedFactor,
    TokenEntries,
    gradient_entries,
    rank_one_entries,
    shared_entries,
    tied_entries,
)
from tests.covering import cross

SIZES = (4, 3)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(
        dtype
    )


def blocks(width: int, columns: int, dtype: torch.dtype = torch.float64, *, prefix: bool = True) -> list[SharedFactor]:
    """Two passes of chosen, the shorter a prefix of the longer (or of another row), and one of rejected."""
    a = draw(7, columns, dtype=dtype)
    short = a[:4] if prefix else draw(4, columns, seed=5, dtype=dtype)
    return [
        SharedFactor(0, [0, 2], draw(2, 4, width, seed=1, dtype=dtype), short),
        SharedFactor(0, [1, 3], draw(2, 7, width, seed=2, dtype=dtype), a),
        SharedFactor(1, [2, 0, 1], draw(3, 5, width, seed=3, dtype=dtype), draw(5, columns, seed=4, dtype=dtype)),
    ]


def whole(parts: list[SharedFactor]) -> list[Tensor]:
    """All tokens' gradients by side, `[n, X·Y]`."""
    sides = [torch.zeros(size, 0, dtype=torch.float64) for size in SIZES]
    for part in parts:
        a = part.a.double() if part.a.is_floating_point() else torch.eye(9, dtype=torch.float64)[part.a]
        grads = torch.einsum("mpx,py->mxy", part.b.double(), a).flatten(1)
        if not sides[part.side].numel():
            sides[part.side] = grads.new_zeros(SIZES[part.side], grads.shape[1])
        sides[part.side][torch.tensor(part.tokens)] = grads
    return sides


def check(entries: TokenEntries, chosen: Tensor, rejected: Tensor, limit: float = 1e-12) -> None:
    scale = chosen.norm(dim=1)[:, None] * rejected.norm(dim=1)[None]
    assert ((entries.inner - chosen @ rejected.T).abs() / scale).max() <= limit
    for got, want in zip(entries.squares, (chosen, rejected), strict=True):
        torch.testing.assert_close(got, want.square().sum(1), rtol=limit, atol=0)


@cross(
    "size, way, budget, prefix",
    [(3, 64), (17, 2), (1, 1), (63, 129)], ["_gram", "_outer", "chosen"], [1, 200, 2**20], [True, False],
)  # fmt: skip
def test_shared(monkeypatch, size, way, budget, prefix):
    if way != "chosen":
        cheap = {"_gram": (0, 1), "_outer": (1, 0)}[way]
        monkeypatch.setattr(contractions, "_gram_flops", lambda parts: cheap[0])
        monkeypatch.setattr(contractions, "_outer_flops", lambda parts: cheap[1])
    parts = blocks(*size, prefix=prefix)
    check(shared_entries(parts, SIZES, budget), *whole(parts))


def test_prefixes_are_told_by_their_values():
    same, other = blocks(3, 8), blocks(3, 8, prefix=False)
    assert [len(family) for family in contractions.prefix_families(same[:2])] == [2]
    assert [len(family) for family in contractions.prefix_families(other[:2])] == [1, 1]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 5e-6), (torch.bfloat16, 5e-6)])
def test_narrow_operands_are_accumulated_wide(dtype, limit):
    parts = blocks(63, 129, dtype)
    check(shared_entries(parts, SIZES, 2**20), *whole(parts), limit)


def looked_up(width: int) -> list[SharedFactor]:
    return [
        SharedFactor(0, [0, 1, 2, 3], draw(4, 6, width, seed=1), torch.tensor([3, 1, 3, 8, 0, 3])),
        SharedFactor(1, [0, 1, 2], draw(3, 5, width, seed=2), torch.tensor([1, 1, 2, 3, 8])),
    ]


@pytest.mark.parametrize("budget", [1, 2**20])
def test_lookups(budget):
    parts = looked_up(4)
    sides = [torch.zeros(size, 9, 4, dtype=torch.float64) for size in SIZES]
    for part in parts:
        for token, b in zip(part.tokens, part.b, strict=True):
            sides[part.side][token].index_add_(0, part.a, b)
    check(shared_entries(parts, SIZES, budget), *(side.flatten(1) for side in sides))


def test_lookups_of_nothing():
    empty = [SharedFactor(0, [0, 1, 2, 3], draw(4, 0, 4), torch.zeros(0, dtype=torch.int64)), looked_up(4)[1]]
    entries = shared_entries(empty, SIZES, 100)
    assert not entries.inner.any() and not entries.squares[0].any() and entries.squares[1].all()


@pytest.mark.parametrize("budget", [1, 2**20])
def test_rank_one_and_gradients(budget):
    u, v = draw(4, 9, seed=1), draw(4, 5, seed=2)
    x, y = draw(3, 9, seed=3), draw(3, 5, seed=4)
    grads = [torch.einsum("mx,my->mxy", *pair).flatten(1) for pair in ((u, v), (x, y))]
    order = [3, 1, 0, 2]
    factors = [RankOne(0, order, u[order], v[order]), RankOne(1, [0, 1, 2], x, y)]
    check(rank_one_entries(factors, SIZES, budget), *grads)
    parts = [Gradients(0, [0, 1, 2, 3], grads[0]), Gradients(1, [0, 1, 2], grads[1])]
    check(gradient_entries(parts, SIZES, budget), *grads)


@pytest.mark.parametrize("budget", [1, 2**20])
def test_a_tied_head_and_embedding(budget):
    heads = [(draw(4, 9, seed=1), draw(4, 6, seed=2)), (draw(3, 9, seed=3), draw(3, 6, seed=4))]
    looked = looked_up(6)
    grads = [torch.einsum("mx,my->mxy", u, v) for u, v in heads]
    for part in looked:
        for token, b in zip(part.tokens, part.b, strict=True):
            grads[part.side][token].index_add_(0, part.a, b)
    ids = torch.unique(torch.cat([part.a for part in looked]))
    factors = [RankOne(side, list(range(len(u))), u, v) for side, (u, v) in enumerate(heads)]
    entries = rank_one_entries(factors, SIZES, budget)
    entries += shared_entries(looked, SIZES, budget)
    rows = [replace(part, u=part.u[:, ids]) for part in factors]
    entries += tied_entries(rows, looked, ids, SIZES, budget)
    check(entries, *(grad.flatten(1) for grad in grads))


def test_long_sums_in_float32():
    left, right = draw(2, 200_000, dtype=torch.float32), draw(3, 200_000, seed=1, dtype=torch.float32)
    want = left.double() @ right.double().T
    scale = left.double().norm(dim=1)[:, None] * right.double().norm(dim=1)[None]
    assert ((dots(left, right) - want).abs() / scale).max() <= 1e-7


def test_a_dropped_token_is_noticed():
    parts = blocks(3, 5)
    wrong = shared_entries(parts[1:], SIZES, 2**20)
    with pytest.raises(AssertionError):
        check(wrong, *whole(parts))
