"""Rules of forward mode against a backward pass: `⟨u, J v⟩ = ⟨Jᵀu, v⟩`, operator by operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradent.tokens import forward_mode
from gradent.tokens.forward_mode import push, split

IDS = torch.tensor([[3, 0, 2, 3], [1, 3, 0, 0]])
MASK = torch.ones(4, 4, dtype=torch.bool).tril_()


def written_to(x: Tensor, y: Tensor) -> Tensor:
    """The sum is overwritten: its tangent must not be x's own."""
    total = x + y.detach()
    total.mul_(y)
    return total + x.sin()


def without_gradient(x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        scale, parts = x.sum() * 2, (x * y).chunk(2)
    return scale * x @ y.T + parts[0].sum() * y.sum()


def attention(**fields: object) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **fields)


HEADS = ((2, 4, 4, 3), (2, 4, 4, 3), (2, 4, 4, 5))
GROUPS = ((2, 4, 4, 3), (2, 2, 4, 3), (2, 2, 4, 5))

CASES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "product": (lambda x, y: x * y, ((3, 4), (3, 4))),
    "product, broadcast": (lambda x, y: torch.mul(x, y), ((4,), (3, 1))),
    "product with numbers": (lambda x, y: 3 * x * y.mul(2) * torch.tensor(2.0), ((3, 4), (3, 4))),
    "quotient by a number": (lambda x, y: x / 3 + y.div(torch.arange(1, 5)), ((3, 4), (3, 4))),
    "quotient": (lambda x, y: torch.div(x, 4 + y**2), ((3, 4), (4,))),
    "quotient, rounded": (lambda x, y: torch.div(x, 0.1, rounding_mode="floor") * y, ((3, 4), (4,))),
    "sum with numbers": (lambda x, y: (1 + x) * (y + torch.ones(2, 3, 4)), ((3, 4), (3, 4))),
    "sum": (lambda x, y: torch.add(x, y) * x.add(y, alpha=3), ((3, 4), (4,))),
    "difference": (lambda x, y: (x - 1) * (2 - x) * torch.sub(y, x) * x.sub(torch.ones(4)), ((3, 4), (4,))),
    "a sum that is written to": (written_to, ((3, 4), (3, 4))),
    "matmul": (lambda x, y: (x @ y) @ torch.ones(5, 2).double(), ((2, 3, 4), (4, 5))),
    "vectors": (lambda x, y: torch.matmul(x, y), ((4,), (4,))),
    "bmm": (lambda x, y: x.bmm(y) + torch.bmm(x, y), ((2, 3, 4), (2, 4, 5))),
    "mm": (lambda x, y: x.mm(y) + torch.mm(x, y), ((3, 4), (4, 5))),
    "linear": (lambda x, w, b: F.linear(x, w, b), ((2, 3, 4), (5, 4), (5,))),
    "linear, no bias": (lambda x, w: F.linear(x, w), ((2, 3, 4), (5, 4))),
    "linear by keyword": (lambda x, w, b: F.linear(input=x, weight=w, bias=b), ((2, 3, 4), (5, 4), (5,))),
    "addmm": (lambda b, x, w: torch.addmm(b, x, w) * b.addmm(x, w), ((5,), (3, 4), (4, 5))),
    "addmm, scaled": (lambda b, x, w: torch.addmm(b, x, w, beta=2, alpha=3), ((5,), (3, 4), (4, 5))),
    "embedding": (lambda w: F.embedding(IDS, w), ((5, 4),)),
    "embedding, padding": (lambda w: F.embedding(IDS, w, padding_idx=0), ((5, 4),)),
    "embedding, padding from the end": (lambda w: F.embedding(IDS, w, padding_idx=-2), ((5, 4),)),
    "embedding, by frequency": (lambda w: F.embedding(IDS, w, 1, scale_grad_by_freq=True), ((5, 4),)),
    "attention": (attention(), HEADS),
    "attention, causal": (attention(is_causal=True, scale=0.3), HEADS),
    "attention, causal, grouped": (attention(is_causal=True, enable_gqa=True), GROUPS),
    "attention, masked": (attention(attn_mask=MASK), HEADS),
    "no gradient": (without_gradient, ((4, 4), (4, 4))),
    "a graph asked for": (lambda x, y: x.requires_grad_() * y, ((3, 4), (3, 4))),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule(name):
    function, shapes = CASES[name]
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes]
    vector = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    for moving in range(1, 2 ** len(shapes)):
        some = {str(at): part for at, part in enumerate(vector) if moving >> at & 1}

        def pushed(duals):
            value, tangent = split(function(*duals.values()))
            assert not value.requires_grad or name == "a graph asked for"
            return value, tangent

        value, tangent = push(pushed, {str(at): part for at, part in enumerate(values)}, some)
        want = function(*(part.clone() for part in values))
        torch.testing.assert_close(value, want.detach())
        u = torch.randn(want.shape, generator=draw, dtype=torch.float64)
        grads = torch.autograd.grad(want, values, u, allow_unused=True)
        expected = sum(float((grads[int(at)] * part).sum()) for at, part in some.items() if grads[int(at)] is not None)
        got = 0.0 if tangent is None else float((u * tangent).sum())
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_experts_in_one_product():
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(6, 16, generator=draw), torch.randn(3, 16, 8, generator=draw)
    dx, dw = torch.randn(6, 16, generator=draw), torch.randn(3, 16, 8, generator=draw)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)

    def pushed(duals):
        return split(F.grouped_mm(duals["x"], duals["w"], offs=ends))[1]

    got = push(pushed, {"x": x, "w": w}, {"x": dx, "w": dw})
    want = torch.cat([dx[:2] @ w[0] + x[:2] @ dw[0], dx[2:] @ w[2] + x[2:] @ dw[2]])
    torch.testing.assert_close(got, want)


def test_every_rule_is_in_a_case(monkeypatch):
    rules, reached = dict(forward_mode._RULES), set()  # noqa: SLF001

    def watched(function):
        def rule(*args, **kwargs):
            reached.add(function)
            return rules[function](*args, **kwargs)

        return rule

    monkeypatch.setattr(forward_mode, "_RULES", {function: watched(function) for function in rules})
    for name in CASES:
        test_a_rule(name)
    if hasattr(F, "grouped_mm"):
        test_experts_in_one_product()
    assert set(rules) - reached == set()


def test_torch_is_left_as_it_was():
    model = nn.MultiheadAttention(8, 2)
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    x = torch.ones(3, 1, 8)

    def failing(duals):
        model(duals["x"], duals["x"], duals["x"])
        raise RuntimeError("of the model's own")

    with pytest.raises(RuntimeError, match="of the model's own"):
        push(failing, {"x": x}, {"x": x})
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before
    assert split(x * 2)[1] is None
