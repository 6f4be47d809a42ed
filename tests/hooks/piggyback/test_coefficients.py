"""What a gradient at the logits says of each row, against the softmax taken in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradent.hooks.piggyback import coefficients
from gradent.hooks.piggyback.coefficients import BLOCK, LogitsReadout

ROWS, LENGTH = 4, 9


def drawn(vocabulary: int, dtype: torch.dtype, *, sharp: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, ids and marks: two or three tokens of prompt, padding after all rows but the first, one row unmarked."""
    torch.manual_seed(0)
    logits = (sharp * torch.randn(ROWS, LENGTH, vocabulary, dtype=torch.float64)).to(dtype)
    ids = torch.randint(0, vocabulary, (ROWS, LENGTH))
    marks = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    for row, (start, stop) in enumerate([(2, 9), (3, 7), (2, 3), (0, 0)]):
        marks[row, start:stop] = True
    return logits, ids, marks


def gradient(logits: Tensor, ids: Tensor, marks: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Of `Σ c_i log π_i` at the logits, in their dtype, and the log-probs float64 `[N]`."""
    wide = logits.double().clone().requires_grad_()
    logps = (wide[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * marks[:, 1:]).sum(1)
    (grad,) = torch.autograd.grad((logps * c).sum(), wide)
    return grad.to(logits.dtype), logps.detach()


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [2, 3, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_coefficients_and_log_probs(vocabulary: int, dtype: torch.dtype, labelled: bool) -> None:
    logits, ids, marks = drawn(vocabulary, dtype)
    c = torch.tensor([-0.3, 1e-4, 0.7, 0.0], dtype=torch.float64)
    grad, logps = gradient(logits, ids, marks, c)
    found = LogitsReadout(logits, ids, ids.masked_fill(~marks, -100) if labelled else None).read(grad)
    rtol = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.c, c, rtol=rtol, atol=0)
    torch.testing.assert_close(found.logp[:3], logps[:3], rtol=1e-6, atol=0)
    assert found.is_constant and found.spread <= coefficients.ROUNDING[dtype]
    assert found.has_given_marks == labelled
    assert torch.equal(found.marks[:3], marks[:3])
    torch.testing.assert_close(found.tokens[marks], c[:, None].expand(-1, LENGTH)[marks], rtol=10 * rtol, atol=0)


@pytest.mark.parametrize("vocabulary", [2, BLOCK, 2 * BLOCK + 7])
def test_the_best_other_token_is_the_best_but_the_target(vocabulary: int) -> None:
    """Where the target is the likeliest, the only one of its block, or beside logits that are -inf."""
    torch.manual_seed(0)
    logits = torch.randn(2, 5, vocabulary)
    logits[1, :, : vocabulary // 2] = float("-inf")
    logits[1, 2, :-1] = float("-inf")
    targets = logits.argmax(-1)
    targets[0, 0], targets[0, 1] = 0, vocabulary - 1
    spans = [(0, 5), (1, 4)]
    at = coefficients._positions(spans, logits.device)  # noqa: SLF001
    tokens, best = coefficients._best_others(logits, spans, at, targets[at])  # noqa: SLF001
    others = logits[at].scatter(1, targets[at][:, None], float("-inf"))
    torch.testing.assert_close(best, others.amax(1).double())
    finite = best.isfinite()
    assert torch.equal(tokens[finite], others.argmax(1)[finite])
    assert not (tokens == targets[at])[finite].any()


def test_a_certain_token_inside_a_response_belongs_to_it() -> None:
    logits, ids, marks = drawn(40, torch.float64, sharp=3.0)
    logits[0, 4] = -1000.0
    logits[0, 4, ids[0, 5]] = 1000.0
    grad, _ = gradient(logits, ids, marks, torch.tensor([0.5, 0.5, -0.5, 0.0], dtype=torch.float64))
    assert not grad[0, 4].any()
    assert LogitsReadout(logits, ids, None).read(grad).marks[0, 5]


@pytest.mark.parametrize("where", ["prompt", "another token", "entropy"])
def test_what_is_no_log_prob_of_the_response_is_noticed(where: str) -> None:
    logits, ids, marks = drawn(40, torch.float64)
    grad, _ = gradient(logits, ids, marks, torch.tensor([0.5, 0.4, -0.5, 0.3], dtype=torch.float64))
    if where == "prompt":
        grad[0, 0] += 1e-3
    elif where == "another token":
        grad[0, 3, (ids[0, 4] + 1) % 40] += 1e-3
    else:
        grad[0, 3] += 1e-3 * logits[0, 3].softmax(-1)
    labels = ids.masked_fill(~marks, -100)
    assert not LogitsReadout(logits, ids, labels).read(grad).is_constant
