"""Vectors of whole gradients: the gradient itself where it fits, else an unbiased sketch, whatever tiles come."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradent.kernels.common.account import AccountLayout
from gradent.kernels.common.sketch import GradientSketch, SketchSums

SHAPES = [torch.Size(shape) for shape in ((30, 20), (7,), (3, 11, 5), ())]
ROWS = 4


def gradients(seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, *shape, dtype=torch.float64, generator=draw) for shape in SHAPES]


def vectors(grads: list[Tensor], width: int, *, tile: int) -> tuple[GradientSketch, Tensor]:
    """Vectors from tiles of a matrix, from lookups in parts of a 3-D parameter, and from whole small ones."""
    sketch = GradientSketch(SHAPES, width)
    found = torch.zeros(ROWS, sketch.width, dtype=torch.float64)

    def sums(number: int, slot: tuple[int, ...] = ()) -> SketchSums:
        return SketchSums(AccountLayout(ROWS, 0, 0), sketch, found, number, slot)

    matrix = sums(0)
    for top in range(0, 30, tile):
        for left in range(0, 20, tile):
            place = slice(top, min(30, top + tile)), slice(left, min(20, left + tile))
            matrix.add(grads[0][(slice(None), *place)].clone(), place)
    assert not matrix.entries.any()
    for number in (1, 3):
        whole = sums(number)
        whole.add(grads[number].clone(), ...)
        assert not whole.entries.any()
    for expert in range(3):
        part = sums(2, (expert,))
        for ids in (torch.tensor([0, 3, 5]), torch.tensor([1, 2, 4, 6, 7, 8, 9, 10])):
            part.add(grads[2][:, expert][:, ids], (ids, slice(0, 5)))
        assert not part.entries.any()
    return sketch, found


def flat(grads: list[Tensor]) -> Tensor:
    return torch.cat([grad.flatten(1) if grad.dim() > 1 else grad[:, None] for grad in grads], 1)


@pytest.mark.parametrize("tile", [7, 13, 30])
def test_where_it_fits_a_vector_is_the_gradient(tile) -> None:
    sketch, found = vectors(gradients(), 10**6, tile=tile)
    assert sketch.is_exact and torch.equal(found, flat(gradients()))


def test_tiles_do_not_matter() -> None:
    (_, one), (_, other) = (vectors(gradients(), 300, tile=tile) for tile in (5, 30))
    assert torch.allclose(one, other, atol=1e-12)


def test_a_matrix_may_come_as_a_column_or_flattened() -> None:
    sketch, whole = vectors(gradients(), 10**6, tile=30)
    found = torch.zeros_like(whole)
    sums = SketchSums(AccountLayout(ROWS, 0, 0), sketch, found, 2, ())
    sums.reshaped(lambda grad: grad.flatten(1)).add(gradients()[2].flatten(2), (slice(0, 3), slice(0, 55)))
    assert torch.equal(found[:, 607:772], whole[:, 607:772]) and not found[:, :607].any()


def test_inner_products_are_unbiased_with_the_stated_error() -> None:
    width, errors = 200, []
    for seed in range(60):
        grads = gradients(seed)
        _, found = vectors(grads, width, tile=30)
        dense = flat(grads)
        norms = dense.norm(dim=1)
        errors.append(((found @ found.T - dense @ dense.T) / torch.outer(norms, norms))[0, 1])
    spread = torch.stack(errors)
    assert abs(float(spread.mean())) < 3 * width**-0.5 / 60**0.5
    assert 0.7 * width**-0.5 < float(spread.std()) < 1.4 * width**-0.5


def test_buckets_are_even_and_signs_are_fair() -> None:
    buckets, signs = GradientSketch([torch.Size((100_000,))], 100).hashed(torch.arange(100_000))
    counts = torch.bincount(buckets, minlength=100).double()
    assert 0.5 < float(counts.var() / counts.mean()) < 1.6
    assert abs(float(signs.double().mean())) < 0.02 and set(signs.tolist()) == {-1, 1}


def test_places_of_large_models_do_not_run_into_each_other() -> None:
    """Two billion elements: places are 64-bit."""
    sketch = GradientSketch([torch.Size((2**31,)), torch.Size((4, 4))], 64)
    places = sketch.places(1, sketch.view(1, ()), ..., torch.device("cpu"))
    assert places.tolist() == list(range(2**31, 2**31 + 16))
    buckets, _ = sketch.hashed(places)
    assert ((buckets >= 0) & (buckets < 64)).all()
