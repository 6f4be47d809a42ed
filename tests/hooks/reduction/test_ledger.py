"""Sums over uses before the inner product: shared layers, tied embeddings, weights used in different ways."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gradent.hooks.reduction.ledger import Ledger
from gradent.hooks.reduction.merge import gathered
from gradent.hooks.uses.formats import Factored, Form, Materialized, SparseRows
from gradent.kernels.common.wanted import Wanted

SHAPE = (9, 4)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(seed: int, tokens: int = 5) -> Factored:
    return Factored(draw(tokens, SHAPE[0], seed=seed), draw(tokens, SHAPE[1], seed=seed + 1))


def lookup(seed: int, tokens: int = 6) -> SparseRows:
    ids = torch.randint(SHAPE[0], (tokens,), generator=torch.Generator().manual_seed(seed))
    return SparseRows(ids, draw(tokens, SHAPE[1], seed=seed + 1))


def explicit(seed: int) -> Materialized:
    return Materialized(draw(*SHAPE, seed=seed))


def whole(forms: list[Form]) -> Tensor:
    total = torch.zeros(SHAPE, dtype=torch.float64)
    for form in forms:
        if isinstance(form, Factored):
            total += form.u.T @ form.v
        elif isinstance(form, SparseRows):
            total.index_add_(0, form.ids, form.values)
        else:
            total += form.grad
    return total


def truth(chosen: list[Form], rejected: list[Form], weight: Tensor | None = None) -> Tensor:
    x, y = whole(chosen), whole(rejected)
    w = torch.ones(SHAPE, dtype=torch.float64) if weight is None else weight
    return torch.stack([(w * x * x).sum(), (w * y * y).sum(), (w * x * y).sum()])


KINDS: dict[str, Callable[[int], list[Form]]] = {
    "one product": lambda s: [dense(s)],
    "a shared layer": lambda s: [dense(s), dense(s + 10, tokens=2)],
    "one lookup": lambda s: [lookup(s)],
    "two lookups": lambda s: [lookup(s), lookup(s + 10, tokens=1)],
    "loose": lambda s: [explicit(s)],
    "twice loose": lambda s: [explicit(s), explicit(s + 10)],
    "head and embedding": lambda s: [dense(s), lookup(s + 10)],
    "everything": lambda s: [dense(s), lookup(s + 10), explicit(s + 20)],
    "lookups of nothing": lambda s: [lookup(s, tokens=0), lookup(s + 10, tokens=0)],
    "lookups, one of nothing, and loose": lambda s: [lookup(s, tokens=0), lookup(s + 10), explicit(s + 20)],
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("budget", [200, 2**20])
@pytest.mark.parametrize("kind", KINDS)
def test_uses_add_before_the_product(kind: str, budget: int, weighted: bool) -> None:
    weight = torch.rand(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) if weighted else None
    chosen, rejected = KINDS[kind](100), KINDS[kind](200)
    ledger = Ledger(Wanted.pairs(1), budget=budget, weight=None if weight is None else lambda param: weight.sqrt())
    for row, forms in ((0, chosen), (1, rejected)):
        for form in forms:
            ledger.add(0, row, (), form)
    ledger.finish(0)
    torch.testing.assert_close(ledger.entries[0], truth(chosen, rejected, weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("budget", [200, 2**20])
def test_gradients_formed_already_are_reduced_together(budget: int, weighted: bool) -> None:
    weight = torch.rand(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) if weighted else None
    ledger = Ledger(Wanted.pairs(3), budget=budget, weight=None if weight is None else lambda param: weight.sqrt())
    rows: list[list[Form]] = [[explicit(1)], [explicit(2), explicit(3)], [], [explicit(4)], [], []]
    for row, forms in enumerate(rows):
        for form in forms:
            ledger.add(0, row, (), form)
    ledger.finish(0)
    for pair in range(3):
        expected = truth(rows[pair], rows[pair + 3], weight)
        torch.testing.assert_close(ledger.entries[0].view(-1, 3)[pair], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("budget", [2**10, 2**12, 2**20])
def test_small_parameters_are_reduced_together_and_none_is_mistaken_for_another(budget: int, weighted: bool) -> None:
    shapes: list[tuple[int, ...]] = [(4,), (3, 4), (12,), (), (12,), (4,), (3, 4), (1,)]
    roots = [draw(*shape, seed=900 + number).abs() for number, shape in enumerate(shapes)]
    ledger = Ledger(Wanted.pairs(2), budget=budget, weight=roots.__getitem__ if weighted else None)
    totals = [torch.zeros(4, *shape, dtype=torch.float64) for shape in shapes]
    # Rows in one forward, in two, in another order, one missing, one twice.
    splits: list[list[list[int]]] = [
        [[0, 1, 2, 3]],
        [[2, 3], [0, 1]],
        [[3, 0], [1, 2]],
        [[0, 2, 3]],
        [[1, 0, 3, 2], [1]],
    ]
    for number, shape in enumerate(shapes):
        for part, rows in enumerate(splits[number % len(splits)]):
            grads = draw(len(rows), *shape, seed=100 * number + part)
            if len(shape) == 2 and (number + part) % 2:  # column by column, as `row_products` may leave them
                grads = grads.mT.contiguous().mT
            ledger.add_rows(number, rows, (), grads)
            totals[number].index_add_(0, torch.tensor(rows), grads)
        ledger.finish(number)
    assert list(ledger.entries) == list(range(len(shapes))), "in the order in which they were finished"
    ledger.close()
    for number, total in enumerate(totals):
        grads = (total * roots[number] if weighted else total).reshape(4, -1)
        for pair, (x, y) in enumerate(zip(grads[:2], grads[2:], strict=True)):
            expected = torch.stack([x @ x, y @ y, x @ y])
            torch.testing.assert_close(ledger.entries[number].view(-1, 3)[pair], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_tied_head_reduced_ahead_of_its_embedding(weighted: bool) -> None:
    weight = torch.rand(SHAPE, dtype=torch.float64) if weighted else None
    head, embedding = [dense(1), dense(3)], [lookup(5), lookup(7)]
    ledger = Ledger(Wanted.pairs(1), budget=2**20, weight=None if weight is None else lambda param: weight.sqrt())
    for row in (0, 1):
        ledger.add(0, row, (), head[row])
    ledger.shrink(0, lambda row: embedding[row].ids)
    assert not any(isinstance(form, Factored) for row in ledger._forms[0].values() for form in row[()])  # noqa: SLF001
    for row in (0, 1):
        ledger.add(0, row, (), embedding[row])
    ledger.finish(0)
    expected = truth([head[0], embedding[0]], [head[1], embedding[1]], weight)
    torch.testing.assert_close(ledger.entries[0], expected, rtol=1e-12, atol=1e-12)


def test_narrow_lookups_beside_other_uses_are_added_up_wide() -> None:
    ids = torch.zeros(400, dtype=torch.int64)  # one row of the weight, again and again
    values = [draw(400, SHAPE[1], seed=seed).to(torch.bfloat16) for seed in range(4)]
    loose = [explicit(7), explicit(8)]
    ledger = Ledger(Wanted.pairs(1), budget=2**20)
    for row in (0, 1):
        for part in values[2 * row : 2 * row + 2]:
            ledger.add(0, row, (), SparseRows(ids, part))
        ledger.add(0, row, (), loose[row])
    ledger.finish(0)
    sides = [
        [SparseRows(ids, part.double()) for part in values[2 * row : 2 * row + 2]] + [loose[row]] for row in (0, 1)
    ]
    torch.testing.assert_close(ledger.entries[0], truth(*sides), rtol=1e-6, atol=1e-6)


def test_lookups_before_a_head_without_tokens_are_kept() -> None:
    ledger = Ledger(Wanted.pairs(1), budget=2**20)
    chosen, rejected = lookup(1), lookup(2)
    ledger.add(0, 0, (), chosen)
    ledger.add(0, 1, (), rejected)
    ledger.shrink(0, lambda row: torch.zeros(0, dtype=torch.int64))
    ledger.finish(0)
    torch.testing.assert_close(ledger.entries[0], truth([chosen], [rejected]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_head_of_no_token_has_zero_rows(dtype: torch.dtype) -> None:
    head = Factored(torch.zeros(0, 9, dtype=dtype), torch.zeros(0, 4, dtype=dtype))
    assert torch.equal(gathered(head, torch.tensor([1, 3]), 2**10).double(), torch.zeros(2, 4, dtype=torch.float64))


def test_cross_terms_count() -> None:
    head, embedding = [dense(1), dense(3)], [lookup(5), lookup(7)]
    together = truth([head[0], embedding[0]], [head[1], embedding[1]])
    apart = truth([head[0]], [head[1]]) + truth([embedding[0]], [embedding[1]])
    assert not torch.allclose(together, apart, rtol=1e-2)


def test_slots_are_apart_and_pairs_are_apart() -> None:
    ledger = Ledger(Wanted.pairs(2), budget=2**20)
    forms = {(row, slot): dense(10 * row + slot) for row in range(4) for slot in range(2) if (row, slot) != (3, 1)}
    for (row, slot), form in forms.items():
        ledger.add(7, row, (slot,), form)
    ledger.finish(7)
    for pair in range(2):
        expected = sum(
            truth(*([forms[row, slot]] if (row, slot) in forms else [] for row in (pair, pair + 2)))
            for slot in range(2)
        )
        torch.testing.assert_close(ledger.entries[7].view(-1, 3)[pair], expected, rtol=1e-12, atol=1e-12)


def test_a_row_without_a_form_has_a_zero_gradient() -> None:
    ledger = Ledger(Wanted.pairs(1), budget=2**20)
    ledger.add(0, 0, (), dense(1))
    ledger.finish(0)
    entries = ledger.entries[0]
    assert entries[0] > 0 and entries[1] == 0 and entries[2] == 0


def test_what_never_completes_is_reduced_at_the_end() -> None:
    ledger = Ledger(Wanted.pairs(1), budget=2**20)
    ledger.add(0, 0, (), dense(1))
    ledger.add(0, 1, (), dense(3))
    ledger.close()
    torch.testing.assert_close(ledger.entries[0], truth([dense(1)], [dense(3)]))


def test_a_layer_that_is_called_again_adds_to_what_it_has() -> None:
    ledger, grads = Ledger(Wanted.pairs(1), budget=2**24), draw(3, 2, 5, seed=1)
    for part in grads:
        ledger.add_rows(0, [0, 1], (), part)
    ledger.finish(0)
    assert ledger.waiting == grads[0].nbytes, "three uses, one gradient"
    ledger.close()
    x, y = grads.sum(0)
    torch.testing.assert_close(ledger.entries[0], torch.stack((x @ x, y @ y, x @ y)), rtol=1e-12, atol=1e-12)


def test_parts_of_a_tied_weight_wait_for_its_lookups() -> None:
    """`[2, V, H]`, one part the head, the other the embedding: nothing is reduced ahead, and nothing is lost."""
    ledger, u, v = Ledger(Wanted.pairs(1), budget=2**20), draw(2, 3, 9, seed=1), draw(2, 3, 4, seed=2)
    ids, values = torch.tensor([1, 2, 2]), draw(2, 3, 4, seed=3)
    for row in (0, 1):
        ledger.add(0, row, (1,), Factored(u[row], v[row]))
    ledger.shrink(0, lambda row: ids)
    for row in (0, 1):
        ledger.add(0, row, (0,), SparseRows(ids, values[row]))
    ledger.finish(0)
    embedded = torch.zeros(2, 9, 4, dtype=torch.float64).index_add_(1, ids, values)
    x, y = torch.cat([(u.mT @ v).flatten(1), embedded.flatten(1)], 1)
    torch.testing.assert_close(ledger.entries[0], torch.stack((x @ x, y @ y, x @ y)), rtol=1e-12, atol=1e-12)


def test_a_weight_that_was_reduced_ahead_takes_lookups_alone() -> None:
    ledger, u, v = Ledger(Wanted.pairs(1), budget=2**20), draw(2, 3, 9, seed=1), draw(2, 3, 4, seed=2)
    for row in (0, 1):
        ledger.add(0, row, (), Factored(u[row], v[row]))
    ledger.shrink(0, lambda row: torch.tensor([], dtype=torch.int64))
    assert ledger.holds(0)
    with pytest.raises(AssertionError, match="again"):
        ledger.add(0, 0, (), Factored(u[0], v[0]))
    with pytest.raises(AssertionError, match="again"):
        ledger.add_rows(0, [0, 1], (), u.mT @ v)
