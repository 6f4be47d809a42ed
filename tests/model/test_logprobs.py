"""Log-probs from logits: value and gradient against log_softmax, memory reused only where that is safe."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradent.errors import NonFiniteError
from gradent.hooks.piggyback.coefficients import LogitsReadout
from gradent.model.logprobs import check_logps, sequence_logprobs

IDS = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 3, 5]])
MARKS = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)


def plain(logits: Tensor) -> Tensor:
    scores = logits.double().log_softmax(-1)[:, :-1].gather(2, IDS[:, 1:, None])[..., 0]
    return (scores * MARKS[:, 1:]).sum(1)


def head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), torch.randn(6, 7, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("tile", [1, 100, 2**20])
@pytest.mark.parametrize(
    "last", [lambda z: z, lambda z: torch.tanh(z), lambda z: 3 * torch.tanh(z), lambda z: z[:, :, :]]
)
def test_value_and_gradient(tile: int, last: object) -> None:
    hidden, weight = head()
    rows = torch.tensor([0.7, -2.0], dtype=torch.float64)
    want = plain(last(hidden @ weight))  # type: ignore[operator]
    (want_grad,) = torch.autograd.grad((want * rows).sum(), hidden)
    got = sequence_logprobs(last(hidden @ weight), IDS, MARKS, tile=tile)  # type: ignore[operator]
    (got_grad,) = torch.autograd.grad((got * rows).sum(), hidden)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)
    torch.testing.assert_close(got_grad, want_grad, rtol=1e-12, atol=1e-14)


def test_half_precision_logits_are_normalized_in_float32() -> None:
    hidden, weight = head(torch.bfloat16)
    logits = hidden @ weight
    torch.testing.assert_close(sequence_logprobs(logits, IDS, MARKS), plain(logits.detach()), rtol=1e-6, atol=0)


def test_the_gradient_takes_the_logits_place_where_nobody_needs_them() -> None:
    hidden, weight = head()
    logits = hidden @ weight
    arrived: list[int] = []
    logits.register_hook(lambda grad: arrived.append(grad.data_ptr()))
    torch.autograd.grad(sequence_logprobs(logits, IDS, MARKS).sum(), hidden)
    assert arrived == [logits.data_ptr()]


def test_logits_that_their_own_node_kept_are_left_alone() -> None:
    hidden, weight = head()
    logits = torch.tanh(hidden @ weight)
    before = logits.detach().clone()
    torch.autograd.grad(sequence_logprobs(logits, IDS, MARKS).sum(), hidden)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("tile", [1, 2**20])
def test_tokens_between_the_marked_ones_do_not_count(tile: int, dtype: torch.dtype) -> None:
    hidden, weight = head(dtype)
    marks = MARKS.clone()
    marks[1] = torch.tensor([0, 1, 0, 1, 0])
    logits = hidden @ weight
    with torch.no_grad():
        logits[1, 1] = float("nan")  # the prediction of a token that is not marked
    logps = sequence_logprobs(logits, IDS, marks, tile=tile)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    assert logps.isfinite().all() and grad.isfinite().all()
    predicts = marks.roll(-1, 1)
    assert not grad[~predicts].any() and grad[predicts].any(-1).all()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_log_probs_are_refused_by_name(value: float) -> None:
    with pytest.raises(NonFiniteError, match=r"pair 9, rejected"):
        check_logps(torch.tensor([-1.0, value]), [9, 9], [True, False])


@pytest.mark.parametrize("vocabulary", [8192, 152_064])
def test_a_coefficient_is_read_off_a_large_vocabulary(vocabulary: int) -> None:
    """float32 sums over the vocabulary must not pass for a loss that weighs tokens differently."""
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, 6), generator=source)
    logits = torch.randn(2, 6, vocabulary, generator=source).requires_grad_()
    logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0].sum(1)
    (grad,) = torch.autograd.grad((torch.tensor([-0.3, 0.3]) * logps).sum(), logits)
    found = LogitsReadout(logits, ids, torch.where(torch.arange(6) > 0, ids, -100)).read(grad)
    assert found.is_constant and found.spread <= 2e-6
    torch.testing.assert_close(found.c, torch.tensor([-0.3, 0.3]).double(), rtol=1e-5, atol=0)
