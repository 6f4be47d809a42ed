"""`measure` is exact on hand-written models: no parameter is missed, doubled or given to the wrong row."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gradent.errors import GradentError
from gradent.measurement import measure
from tests.batches import left_padded, ragged, square, uneven
from tests.odd_models import ODD, build_odd
from tests.odd_weights import CalledTwice
from tests.truth import assert_exact, truth, untouched

BATCHES = {"ragged": ragged, "square": square, "uneven": uneven, "left-padded": lambda: left_padded(ragged())}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("batch", BATCHES)
def test_odd_model(name, batch):
    pairs = BATCHES[batch]()
    true = truth(build_odd(name), pairs)
    assert true.arithmetic == "float64"
    with untouched(build_odd(name)) as model:
        gram = measure(model, pairs, by_module=True)
    assert_exact(gram, true, pairs)


@pytest.mark.parametrize("name", ODD)
def test_odd_model_by_the_second_engine(name):
    pairs, model = ragged(), build_odd(name)
    with untouched(model):
        gram = measure(model, pairs, engine="func", by_module=True)
    assert_exact(gram, truth(model, pairs), pairs)


@pytest.mark.parametrize("name", ODD)
def test_the_same_model_measured_again(name):
    # What was found out about a model on one batch is not taken for granted on the next.
    model = build_odd(name)
    for pairs in (square(), uneven(), ragged(), square()):
        assert_exact(measure(model, pairs), truth(model, pairs), pairs)


class Reentrant(CalledTwice):
    def block(self, x):
        return checkpoint(super().block, x, use_reentrant=True)


def test_reentrant_checkpointing_is_exact_or_refused():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Reentrant().eval().double()
    with pytest.raises(GradentError, match="eentrant"):
        measure(model, ragged())
