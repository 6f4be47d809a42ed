"""The loss of kept tokens, term by term as Section 5.2 writes it, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gradent.errors import InputError
from gradent.losses.token_masked import hard_mask, masked_logps, soft_mask, sparsity, token_masked_loss

PAIRS, K = 3, 5


def drawn(elsewhere: float = math.nan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs of both models, scores, and responses of no to five tokens, with a number elsewhere."""
    torch.manual_seed(0)
    policy, reference = (-3 * torch.rand(2 * PAIRS, K, dtype=torch.float64) for _ in range(2))
    scores = torch.randn(2 * PAIRS, K, dtype=torch.float64)
    tokens = torch.zeros(2 * PAIRS, K, dtype=torch.bool)
    for row, (start, stop) in enumerate([(1, 5), (0, 2), (2, 3), (2, 5), (0, 0), (0, 5)]):
        tokens[row, start:stop] = True
    return *(part.masked_fill(~tokens, elsewhere) for part in (policy, reference, scores)), tokens  # type: ignore[return-value]


def by_hand(
    policy: Tensor, reference: Tensor, scores: Tensor, tokens: Tensor, *,
    beta: float, eta: float, threshold: float, k: float, hard: bool,
) -> list[float]:  # fmt: skip
    sums, shares = [], []
    for row in range(len(policy)):
        masks, total = [], 0.0
        for column in tokens[row].nonzero().flatten().tolist():
            score = float(scores[row, column])
            masks.append(float(score >= threshold) if hard else 1 / (1 + math.exp(-k * (score - threshold))))
            total += masks[-1] * float(policy[row, column] - reference[row, column])
        sums.append(total)
        shares.append(sum(masks) / len(masks) if masks else 0.0)
    half = len(policy) // 2
    return [
        math.log(1 + math.exp(-beta * (sums[pair] - sums[half + pair])))
        + eta * (shares[pair] + shares[half + pair]) / 2
        for pair in range(half)
    ]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(("beta", "eta", "threshold", "k"), [(0.3, 0.7, 0.2, 2.5), (1.0, 0.0, -0.4, 1.0)])
def test_the_loss(beta: float, eta: float, threshold: float, k: float, hard: bool) -> None:
    given = {"beta": beta, "eta": eta, "threshold": threshold, "k": k, "hard": hard}
    value = token_masked_loss(*drawn(), **given)  # type: ignore[arg-type]
    torch.testing.assert_close(value, torch.tensor(by_hand(*drawn(), **given), dtype=torch.float64))  # type: ignore[arg-type]


def test_what_is_not_given() -> None:
    value = token_masked_loss(*drawn(), beta=0.5, eta=0.25)
    wanted = by_hand(*drawn(), beta=0.5, eta=0.25, threshold=0.0, k=1.0, hard=False)
    torch.testing.assert_close(value, torch.tensor(wanted, dtype=torch.float64))


def test_a_token_at_the_threshold_is_kept() -> None:
    scores = torch.tensor([0.5, 0.5 - 1e-6])
    assert hard_mask(scores, threshold=0.5).tolist() == [True, False]
    assert soft_mask(scores, threshold=0.5, k=1e9)[0] == 0.5


def test_gradcheck() -> None:
    policy, reference, scores, tokens = drawn(0.0)
    inputs = policy.requires_grad_(), scores.requires_grad_()

    def loss(policy: Tensor, scores: Tensor) -> Tensor:
        return token_masked_loss(policy, reference, scores, tokens, beta=0.3, eta=0.7, threshold=0.1, k=2.0)

    assert torch.autograd.gradcheck(loss, inputs)
    policy_grad, score_grad = torch.autograd.grad(loss(*inputs).sum(), inputs)
    assert not policy_grad[~tokens].any() and not score_grad[~tokens].any()
    assert score_grad[tokens].all()


def test_kept_log_probs() -> None:
    policy, reference, scores, _ = drawn(-1.0)
    mask = soft_mask(scores, threshold=0.0, k=1.0).requires_grad_()
    kept, kept_reference = masked_logps(policy, reference, mask)
    assert torch.equal(kept, mask * policy) and torch.equal(kept_reference, mask * reference)
    (grad,) = torch.autograd.grad((kept - kept_reference).sum(), mask)
    assert torch.allclose(grad, policy - reference, rtol=1e-12)
    ones = torch.ones_like(policy)
    kept, kept_reference = masked_logps(policy, reference, ones)
    assert torch.equal(kept, policy) and torch.equal(kept_reference, reference)


def test_sparsity_is_a_share_of_each_response() -> None:
    mask, tokens = torch.tensor([[1.0, 0.5, 9.0], [0.2, 9.0, 9.0], [9.0, 9.0, 9.0]]), torch.zeros(3, 3, dtype=bool)
    tokens[0, :2] = tokens[1, :1] = True
    assert sparsity(mask, tokens).tolist() == pytest.approx([0.75, 0.2, 0.0])


@pytest.mark.parametrize("change", ["shape", "odd", "flat"])
def test_shapes_that_are_refused(change: str) -> None:
    given = list(drawn())
    if change == "shape":
        given[2] = given[2][:, :-1]
    elif change == "odd":
        given = [part[:-1] for part in given]
    else:
        given = [part.flatten() for part in given]
    with pytest.raises(InputError, match=r"token_masked_loss: received policy .* accepted is one shape \[2B, K\]"):
        token_masked_loss(*given, beta=0.1, eta=0.0)  # type: ignore[misc]
