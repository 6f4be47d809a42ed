"""Every rule of the registry against autograd, a row at a time: batched and single, and declining what it cannot do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradent.errors import InputError
from gradent.hooks.capture.capture import Capture, Tap
from gradent.hooks.rules import RULES, register_rule
from gradent.hooks.uses.formats import Factored, Form, Materialized, SparseRows
from gradent.hooks.uses.layout import Layout
from gradent.hooks.uses.uses import SumUse

R, L = 2, 5
DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


IDS = torch.tensor([[0, 3, 3, 1, 2], [6, 0, 5, 6, 6]])
X = draw(R, L, 4, seed=9)
FLAT = X.reshape(R * L, 4)

# What is called, with which weights, and the torch functions of the registry that it must go through.
CASES: dict[str, tuple[list[Tensor], Callable[..., Tensor], set[object]]] = {
    "linear": ([draw(6, 4), draw(6)], lambda W, b: F.linear(X, W, b), {F.linear}),
    "linear, flattened tokens": ([draw(6, 4), draw(6)], lambda W, b: F.linear(FLAT, W, b), {F.linear}),
    "linear, weight given transposed": ([draw(4, 6)], lambda W: F.linear(X, W.T), {F.linear}),
    "x @ W": ([draw(4, 6)], lambda W: X @ W, {torch.Tensor.matmul}),
    "x @ W.T": ([draw(6, 4)], lambda W: torch.matmul(X, W.T), {torch.matmul}),
    "W @ x": ([draw(6, 4)], lambda W: W @ X.mT, {torch.Tensor.matmul}),
    "mm": ([draw(4, 6)], lambda W: torch.mm(FLAT, W), {torch.mm}),
    "Tensor.mm": ([draw(4, 6)], lambda W: FLAT.mm(W), {torch.Tensor.mm}),
    "addmm (Conv1D)": ([draw(4, 6), draw(6)], lambda W, b: torch.addmm(b, FLAT, W), {torch.addmm}),
    "Tensor.addmm": ([draw(4, 6), draw(6)], lambda W, b: b.addmm(FLAT, W), {torch.Tensor.addmm}),
    "embedding": ([draw(7, 4)], lambda W: F.embedding(IDS, W), {F.embedding}),
    "embedding with padding": ([draw(7, 4)], lambda W: F.embedding(IDS, W, padding_idx=0), {F.embedding}),
    "embedding, flattened": ([draw(7, 4)], lambda W: F.embedding(IDS.reshape(-1), W), {F.embedding}),
    "shared positions": ([draw(9, 4)], lambda W: X + F.embedding(torch.arange(L)[None], W), {torch.Tensor.add}),
    "norm weight": ([draw(4)], lambda w: w * X, {torch.Tensor.mul}),
    "norm weight, Gemma": ([draw(4)], lambda w: X * (1.0 + w.double()), {torch.Tensor.mul}),
    "torch.mul": ([draw(1, 4)], lambda w: torch.mul(X, w), {torch.mul}),
    "bias": ([draw(4)], lambda b: X + b, {torch.Tensor.add}),
    "torch.add": ([draw(1, 1, 4)], lambda b: torch.add(b, X), {torch.add}),
    "bias in place": ([draw(4)], lambda b: (2 * X).add_(b), {torch.Tensor.add_}),
    "bias a position": ([draw(L, 4)], lambda b: X + b, {torch.Tensor.add}),
    "scalar weight": ([draw(1)], lambda s: X * s, {torch.Tensor.mul}),
    "layer_norm": ([draw(4), draw(4)], lambda w, b: F.layer_norm(X, (4,), w, b), {F.layer_norm}),
    "rms_norm": ([draw(4)], lambda w: F.rms_norm(X, (4,), w, 1e-5), {F.rms_norm}),
    "rms_norm, own epsilon": ([draw(4)], lambda w: torch.rms_norm(X, (4,), w), {torch.rms_norm}),
    "attention sinks": ([draw(5)], lambda s: 2 * s.reshape(1, 5, 1).expand(R, 5, 3), {torch.Tensor.expand}),
}
ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)
SINGLE: dict[str, tuple[list[Tensor], Callable[..., Tensor], set[object]]] = {
    "an expert": ([draw(3, 6, 4)], lambda W: F.linear(X[0], W[1]), {F.linear}),
    "an expert by tensor": ([draw(3, 6, 4)], lambda W: F.linear(X[0], W[torch.tensor(2)]), {F.linear}),
    "an expert's bias": ([draw(3, 6, 4), draw(3, 6)], lambda W, b: F.linear(X[0], W[1]) + b[1], {F.linear}),
}
if hasattr(F, "grouped_mm"):
    SINGLE["grouped experts"] = (
        [draw(3, 8, 16).float()],
        lambda W: F.grouped_mm(draw(5, 16).float(), W.transpose(-2, -1), offs=ENDS),
        {torch._grouped_mm},  # noqa: SLF001  (what grouped_mm calls)
    )
    SINGLE["grouped experts, transposed"] = (
        [draw(3, 16, 8).float()],
        lambda W: F.grouped_mm(draw(5, 16).float(), W, offs=ENDS),
        {torch._grouped_mm},  # noqa: SLF001  (what grouped_mm calls)
    )


PICK = torch.tensor([0, 7, 3, 8, 2, 2])  # tokens, of rows 0, 1, 0, 1, 0, 0
EXPERT = torch.tensor([2, 0, 2, 1, 0, 2])
BOUNDS = torch.tensor([2, 2, 6], dtype=torch.int32)
EVERY = torch.arange(R * L).repeat(3)
PICKED: dict[str, tuple[Tensor, list[Tensor], Callable[..., Tensor], set[object]]] = {
    "a matrix": (PICK, [draw(6, 4), draw(6)], lambda W, b: F.linear(FLAT[PICK], W, b), {F.linear}),
    "as many tokens as rows": (PICK[:2], [draw(6, 4)], lambda W: F.linear(FLAT[PICK[:2]], W), {F.linear}),
    "one column": (PICK, [draw(1, 4)], lambda W: F.linear(FLAT.index_select(0, PICK), W), {F.linear}),
    "picked twice": (PICK[[5, 1]], [draw(4, 6)], lambda W: FLAT[PICK][torch.tensor([5, 1])] @ W, {torch.Tensor.matmul}),
    "an expert": (PICK, [draw(3, 6, 4), draw(3, 6)], lambda W, b: F.linear(FLAT[PICK], W[1]) + b[1], {F.linear}),
    "a norm": (PICK, [draw(4)], lambda w: FLAT[PICK] * w, {torch.Tensor.mul}),
    "a bias of each token's expert": (
        PICK, [draw(6, 4), draw(3, 6)], lambda W, b: F.linear(FLAT[PICK], W).add_(b[EXPERT]), {torch.Tensor.add_},
    ),
    "a matrix of each token's expert": (
        PICK, [draw(3, 6, 4)], lambda W: torch.bmm(W[EXPERT], FLAT[PICK].unsqueeze(-1)).squeeze(-1), {torch.bmm},
    ),
    "the same, transposed": (
        PICK, [draw(3, 4, 6)], lambda W: FLAT[PICK].unsqueeze(1).bmm(W[EXPERT]).squeeze(1), {torch.Tensor.bmm},
    ),
    "all tokens for every expert": (
        EVERY, [draw(3, 4, 6)], lambda W: torch.bmm(FLAT.repeat(3, 1).view(3, -1, 4), W).view(-1, 6), {torch.bmm},
    ),
    "every token twice": (
        torch.arange(R * L).repeat_interleave(2), [draw(6, 4)],
        lambda W: F.linear(FLAT.repeat_interleave(2, dim=0), W), {F.linear},
    ),
    "truth values": (torch.arange(0, R * L, 2), [draw(6, 4)], lambda W: F.linear(FLAT[EVEN], W), {F.linear}),
}  # fmt: skip
"""Which tokens are picked; weights, call and functions as above."""
EVEN = torch.arange(R * L) % 2 == 0
if hasattr(F, "grouped_mm"):
    WIDE = draw(R, L, 16).float().reshape(R * L, 16)
    PICKED["grouped experts"] = (
        PICK, [draw(3, 8, 16).float()],
        lambda W: F.grouped_mm(WIDE[PICK], W.transpose(-2, -1), offs=BOUNDS), {torch._grouped_mm},  # noqa: SLF001
    )  # fmt: skip


def materialise(form: Form, shape: tuple[int, ...]) -> Tensor:
    if isinstance(form, Factored):
        return form.u.double().T @ form.v.double()
    if isinstance(form, SparseRows):
        return torch.zeros(shape, dtype=DOUBLE).index_add_(0, form.ids, form.values.double())
    return form.grad.double()


def per_row(weights: list[Tensor], call: Callable[..., Tensor], layout: Layout, budget: int) -> list[list[Tensor]]:
    """Gradients of each row's share of a random functional of the output, as the rules deliver them."""
    leaves = [weight.clone().requires_grad_() for weight in weights]
    grads = [[torch.zeros(weight.shape, dtype=DOUBLE) for weight in weights] for _ in range(layout.rows)]

    def deliver(tap: Tap, grad_output: Tensor) -> None:
        for row, slot, form in tap.use.forms(grad_output, layout, budget):
            target = grads[row][tap.use.view.param]
            target[slot] += materialise(form, tuple(target[slot].shape))

    capture = Capture(leaves, layout, deliver)
    with capture:
        out = call(*leaves)
    loss = (out * draw(*out.shape, seed=5).to(out.dtype)).sum()
    found = capture.survey(loss)
    assert not found.missed, "the rule declined"
    torch.autograd.grad(loss, found.bottoms)
    return grads


def expected(weights: list[Tensor], call: Callable[..., Tensor], layout: Layout) -> list[list[Tensor]]:
    leaves = [weight.clone().requires_grad_() for weight in weights]
    out = call(*leaves)
    product = out * draw(*out.shape, seed=5).to(out.dtype)
    split = product[None] if layout.rows == 1 else product.reshape(layout.rows, -1)
    return [
        [g.double() for g in torch.autograd.grad(split[row].sum(), leaves, retain_graph=True)]
        for row in range(layout.rows)
    ]


@pytest.mark.parametrize("budget", [1, 2**30])
@pytest.mark.parametrize("name", CASES)
def test_batched_rows(name: str, budget: int) -> None:
    weights, call, _ = CASES[name]
    layout = Layout(R, L)
    for got, want in zip(per_row(weights, call, layout, budget), expected(weights, call, layout), strict=True):
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PICKED)
@pytest.mark.parametrize("rows", [1, R])
def test_picked_tokens(name: str, rows: int) -> None:
    tokens, weights, call, _ = PICKED[name]
    tolerance = 1e-12 if all(weight.dtype == DOUBLE for weight in weights) else 1e-5
    leaves = [weight.clone().requires_grad_() for weight in weights]
    out = call(*leaves)
    terms = (out * draw(*out.shape, seed=5).to(out.dtype)).sum(1)
    for row, got in enumerate(per_row(weights, call, Layout(rows, R * L // rows), 2**30)):
        mine = terms[tokens // (R * L // rows) == row].sum()
        for one, other in zip(got, torch.autograd.grad(mine, leaves, retain_graph=True), strict=True):
            torch.testing.assert_close(one, other.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [*CASES, *SINGLE])
def test_a_single_row(name: str) -> None:
    weights, call, _ = (CASES | SINGLE)[name]
    layout = Layout(1, R * L)
    tolerance = 1e-12 if all(weight.dtype == DOUBLE for weight in weights) else 1e-5
    for got, want in zip(per_row(weights, call, layout, 2**30)[0], expected(weights, call, layout)[0], strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_every_rule_of_the_registry_is_tested() -> None:
    tested = {function for *_, functions in [*(CASES | SINGLE).values(), *PICKED.values()] for function in functions}
    assert set(RULES) == tested


UNSPLIT = {
    "time before batch": ([draw(6, 4)], lambda W: F.linear(X.transpose(0, 1).contiguous(), W)),
    "tokens sorted in a way of their own": ([draw(6, 4)], lambda W: F.linear(FLAT.sort(0).values[[0, 7, 3]], W)),
    "as many positions as rows": ([draw(9, 4)], lambda W: F.embedding(torch.arange(R), W)),
    "norm over picked tokens": ([draw(4)], lambda w: FLAT[:3] * w),
    "weight with a batch axis": ([draw(R, L, 4)], lambda w: X * w),
}


@pytest.mark.parametrize("name", UNSPLIT)
def test_rows_that_cannot_be_told_apart_are_declined(name: str) -> None:
    weights, call = UNSPLIT[name]
    leaves = [weight.clone().requires_grad_() for weight in weights]
    capture = Capture(leaves, Layout(R, L), lambda tap, b: None)
    with capture:
        out = call(*leaves)
    assert capture.survey(out.sum()).missed == {0}


def test_a_rule_is_never_replaced_silently() -> None:
    with pytest.raises(InputError, match="already has the rule"):
        register_rule(F.linear)(lambda call: [])
    assert RULES[F.linear].__module__ == "gradent.hooks.rules.matmul"


def test_a_new_rule_is_used_and_can_be_taken_back() -> None:
    def tripled(x: Tensor, weight: Tensor) -> Tensor:
        if torch.overrides.has_torch_function((x, weight)):
            return torch.overrides.handle_torch_function(tripled, (x, weight), x, weight)
        return 3 * x * weight

    def rule(call: object) -> list[object]:
        x, weight = call.args  # type: ignore[attr-defined]
        view = call.find(weight)  # type: ignore[attr-defined]
        return [SumUse(view, weight.shape, lambda cut: 3 * cut(x))]

    register_rule(tripled)(rule)  # type: ignore[arg-type]
    try:
        layout = Layout(R, L)
        got = per_row([draw(4)], lambda w: tripled(X, w), layout, 2**30)
        want = expected([draw(4)], lambda w: tripled(X, w), layout)
        torch.testing.assert_close(got[1][0], want[1][0])
    finally:
        del RULES[tripled]


def test_explicit_forms_keep_the_parameters_shape() -> None:
    layout = Layout(1, L)
    w = draw(1, 1, 4).requires_grad_()
    capture = Capture([w], layout, lambda tap, b: shapes.append([form for *_, form in tap.use.forms(b, layout, 2**30)]))
    shapes: list[list[Form]] = []
    with capture:
        loss = (X[:1] + w).sum()
    torch.autograd.grad(loss, capture.survey(loss).bottoms)
    (form,) = shapes[0]
    assert isinstance(form, Materialized) and form.grad.shape == (1, 1, 4)
