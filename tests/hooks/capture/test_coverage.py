"""The coverage check: no use of a parameter escapes, whatever operator it goes through."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gradent.errors import ModelError
from gradent.hooks.capture.capture import Capture, Tap
from gradent.hooks.uses.layout import Layout


class Doubled(torch.autograd.Function):
    """An operator that no rule can see into."""

    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)  # type: ignore[attr-defined]
        return 2 * x * weight

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        return 2 * grad * weight, (2 * grad * x).sum((0, 1))


def weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(4, 4, generator=generator, dtype=torch.float64).requires_grad_()
    return square, torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_()


X = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

SEEN = {
    "linear": lambda W, w: F.linear(X, W, w),
    "matmul with a transpose": lambda W, w: X @ W.T + w,
    "addmm": lambda W, w: torch.addmm(w, X[0], W),
    "left matmul": lambda W, w: (W @ X.mT).mT * w,
    "cast and shifted": lambda W, w: F.linear(X, W.to(torch.float64).contiguous()) * (1.0 + w),
    "broadcast view": lambda W, w: F.linear(X, W) + w[None, None, :],
    "in place": lambda W, w: F.linear(X, W).add_(w),
    "layer norm": lambda W, w: F.layer_norm(F.linear(X, W), (4,), w),
    "rms norm": lambda W, w: F.rms_norm(F.linear(X, W), (4,), w, 1e-6),
    "used twice": lambda W, w: F.linear(F.linear(X, W, w), W, w),
}
MISSED = {
    "custom function": (lambda W, w: Doubled.apply(F.linear(X, W), w), {1}),
    "einsum": (lambda W, w: torch.einsum("bti,oi->bto", X, W) * w, {0}),
    "nonlinear in the weight": (lambda W, w: F.linear(X, W) * torch.exp(w), {1}),
    "seen once, missed once": (lambda W, w: F.linear(torch.einsum("bti,oi->bto", X, W), W) * w, {0}),
    "product of two weights": (lambda W, w: F.linear(X, W * w), {0, 1}),
    "through a detour": (lambda W, w: F.linear(X, W) + w + w.cumsum(0), {1}),
}


def record(function: object) -> tuple[Capture, Tensor, list[tuple[Tap, Tensor]]]:
    arrived: list[tuple[Tap, Tensor]] = []
    pair = weights()
    capture = Capture(pair, Layout(1, 3), lambda tap, b: arrived.append((tap, b)))
    with capture:
        out = function(*pair)  # type: ignore[operator]
    return capture, out.square().sum(), arrived


@pytest.mark.parametrize("name", SEEN)
def test_what_rules_account_for_is_not_missed(name: str) -> None:
    capture, loss, _ = record(SEEN[name])
    found = capture.survey(loss)
    assert not found.missed
    assert {tap.use.view.param for tap in capture.taps} == {0, 1}


@pytest.mark.parametrize("name", MISSED)
def test_what_rules_cannot_see_is_found(name: str) -> None:
    function, expected = MISSED[name]
    capture, loss, _ = record(function)
    assert capture.survey(loss).missed == expected


def test_a_backward_to_the_bottoms_reaches_every_use_and_no_weight() -> None:
    capture, loss, arrived = record(SEEN["used twice"])
    found = capture.survey(loss)
    torch.autograd.grad(loss, found.bottoms)
    assert {id(tap) for tap, _ in arrived} == {id(tap) for tap in capture.taps}
    assert len(found.bottoms) == 1


def test_what_the_loss_does_not_depend_on_is_not_reached() -> None:
    W, w = weights()
    capture = Capture((W, w), Layout(1, 3), lambda tap, b: None)
    with capture:
        used, unused = F.linear(X, W), X * w
    assert unused.requires_grad
    found = capture.survey(used.sum())
    assert not found.missed
    assert len(found.reached) == 1


def test_reentrant_checkpointing_is_refused_since_it_hides_the_graph() -> None:
    W, w = weights()
    x = X.clone().requires_grad_()
    capture = Capture((W, w), Layout(1, 3), lambda tap, b: None)
    with capture:
        out = checkpoint(lambda value: F.linear(value, W, w), x, use_reentrant=True)
    with pytest.raises(ModelError, match="use_reentrant"):
        capture.survey(out.sum())
