"""What a gradient at the logits says of each row, against the softmax taken in float64."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from gradent.hooks.piggyback import coefficients
from gradent.hooks.piggyback.coefficients import (
    BLOCK,
    Coefficients,
    FusedReadout,
    LogitsReadout,
    RewardReadout,
    find_readout,
)

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
    assert not found.tokens[~marks].any() and not found.is_reward


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


@pytest.mark.parametrize("certain", [45.0, 2000.0])
def test_a_certain_token_inside_a_response_belongs_to_it(certain: float) -> None:
    """Without a coefficient of its own: its gradient, if it has one, is rounding."""
    logits, ids, marks = drawn(40, torch.float64, sharp=3.0)
    logits[0, 4] = 0.0
    logits[0, 4, ids[0, 5]] = certain
    grad, _ = gradient(logits, ids, marks, torch.tensor([0.5, 0.5, -0.5, 0.0], dtype=torch.float64))
    assert bool(grad[0, 4].any()) == (certain < 100)
    found = LogitsReadout(logits, ids, None).read(grad)
    assert found.marks[0, 5] and found.tokens[0, 5] == 0 and found.is_constant


def test_which_tokens_a_gradient_is_over() -> None:
    """Those that got some, and those between them that got none because they are certain."""
    kinds = ["cmcmuy", "umumcv"]  # no gradient, certain or not; moved; the target alone or another token alone moved
    ids, logits = torch.zeros(2, 7, dtype=torch.int64), torch.zeros(2, 7, 5, dtype=torch.float64)
    grad = torch.zeros_like(logits)
    for row, text in enumerate(kinds):
        for position, kind in enumerate(text):
            logits[row, position, 0] = 100.0 if kind == "c" else math.log(6.0)  # else the target has 6/10, e^-0.51
            grad[row, position, 0] = 0.4 * (kind in "my")
            grad[row, position, 1] = -0.1 * (kind in "mv")
    found = LogitsReadout(logits, ids, None).read(grad)
    assert found.marks.int().tolist() == [[0, 0, 1, 1, 1, 0, 1], [0, 0, 1, 0, 1, 1, 1]]
    assert not found.has_given_marks


def test_a_labelled_response_that_the_loss_does_not_move_has_its_log_prob() -> None:
    logits, ids, marks = drawn(40, torch.float64)
    grad, logps = gradient(logits, ids, marks, torch.tensor([0.0, 0.5, 0.0, 0.0], dtype=torch.float64))
    found = LogitsReadout(logits, ids, ids.masked_fill(~marks, -100)).read(grad)
    torch.testing.assert_close(found.logp, logps)
    assert torch.equal(found.marks, marks) and found.c[0] == 0 and found.is_constant


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("more", [2, -1])
def test_virtual_positions_in_front_and_positions_left_out(more: int, labelled: bool) -> None:
    """Prompt tuning's output has more positions than tokens, that of a trainer which cuts the prompt off fewer."""
    logits, ids, marks = drawn(40, torch.float64)
    grad, _ = gradient(logits, ids, marks, torch.tensor([0.5, 0.4, -0.5, 0.0], dtype=torch.float64))
    labels = ids.masked_fill(~marks, -100) if labelled else None
    whole = LogitsReadout(logits, ids, labels).read(grad)
    front = torch.ones(ROWS, max(0, more), 40, dtype=torch.float64)
    logits, grad = (torch.cat([front, part[:, max(0, -more) :]], 1) for part in (logits, grad))
    same(LogitsReadout(logits, ids, labels).read(grad), whole)


def same(found: Coefficients, wanted: Coefficients) -> None:
    for name in ("c", "logp", "marks", "tokens"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name))
    assert (found.is_constant, found.has_given_marks) == (wanted.is_constant, wanted.has_given_marks)


def test_the_ends_of_what_matters() -> None:
    live = torch.tensor([[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    assert coefficients._ends(live) == [(1, 4), (0, 0), (0, 5), (4, 5)]  # noqa: SLF001


def test_only_what_lies_between_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids, marks = drawn(40, torch.float64)
    grad, _ = gradient(logits, ids, marks, torch.tensor([0.5, 0.4, -0.5, 0.3], dtype=torch.float64))
    seen, best = [], coefficients._best_others  # noqa: SLF001
    monkeypatch.setattr(coefficients, "_best_others", lambda *given: seen.append(given[1]) or best(*given))
    LogitsReadout(logits, ids, None).read(grad)
    assert seen == [[(1, 8), (2, 6), (1, 2), (0, 0)]]


def test_what_is_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many positions that blocks of 256 tokens, as four int64 each, fit; so many rows of the vocabulary, widened."""
    logits, ids, marks = drawn(40, torch.bfloat16)
    grad, _ = gradient(logits, ids, marks, torch.tensor([0.5, 0.4, -0.5, 0.0], dtype=torch.float64))
    whole = LogitsReadout(logits, ids, None).read(grad)
    room, sizes, look = [1], [], coefficients._best_in_blocks  # noqa: SLF001
    monkeypatch.setattr(coefficients, "at_once", lambda device: room[0])
    monkeypatch.setattr(coefficients, "_best_in_blocks", lambda *given: sizes.append(len(given[2])) or look(*given))
    for room[0], wanted in ((3 * 256 * 4 * 8, [3, 3, 3, 3]), (1, [1] * 12)):  # 7, 4 and 1 positions
        sizes.clear()
        same(LogitsReadout(logits, ids, None).read(grad), whole)
        assert sizes == wanted
    for room[0], stops in ((3 * 40 * 4, [3, 6, 9]), (3 * 40 * 4 - 1, [2, 4, 6, 8, 9]), (1, [*range(1, 10)])):
        assert [part.stop for part in coefficients._tiles(logits[0])] == stops  # noqa: SLF001


@pytest.mark.parametrize("more", [-1, 0, 2])
def test_the_fused_heads_log_probs(more: int) -> None:
    """Of 5 tokens 4 are predicted; virtual ones in front are no part of the rows."""
    torch.manual_seed(0)
    c = torch.tensor([0.5, -0.25, 0.125, 0.0], dtype=torch.float64)
    marks = torch.tensor([[0, int(more >= 0), 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0] * 5]).bool()
    logps = torch.randn(4, 5, dtype=torch.float64)
    root, mask = (torch.cat([torch.ones(4, 2, dtype=part.dtype), part[:, 1:]], 1) for part in (logps, marks))
    root, mask = root[:, 2 - more :], mask[:, 2 - more :]
    grad = torch.where(mask, c[:, None], 7.0)
    found = FusedReadout(root, mask, 5).read(grad)
    assert torch.equal(found.c, c) and torch.equal(found.marks, marks), "the second token is cut off where K is 3"
    torch.testing.assert_close(found.logp, (logps * marks).sum(1))
    assert torch.equal(found.tokens, c[:, None] * marks)
    assert found.spread == 0 and found.is_constant and found.has_given_marks and not found.is_reward


def test_a_reward_models_head() -> None:
    root, grad = torch.tensor([[0.5], [2.0], [-1.0]]), torch.tensor([[0.25], [-0.5], [0.0]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]])
    found = RewardReadout(root, mask).read(grad)
    assert found.c.tolist() == [0.25, -0.5, 0.0] and found.logp.tolist() == [0.5, 2.0, -1.0]
    assert torch.equal(found.marks, mask.bool())
    assert found.tokens.tolist() == [[0.0, 0.25, 0.25], [-0.5, -0.5, -0.5], [0.0, 0.0, 0.0]]
    assert found.is_reward and found.is_constant and found.has_given_marks and found.spread == 0


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [
        (torch.float64, 1e-9),
        (torch.float32, 1e-5),
        (torch.float16, 0.01),
        (torch.bfloat16, 0.05),
        (torch.float8_e5m2, 0.05),
    ],
)
def test_what_rounding_explains(dtype: torch.dtype, limit: float) -> None:
    def judged(*rows: tuple[float, float]) -> tuple[float, bool]:
        """Spread and constancy of rows of a coefficient and its tokens' largest deviation from it."""
        c, off = torch.tensor(rows, dtype=torch.float64).unbind(1)
        found = coefficients._judge(c, c, c, c, off, dtype)  # noqa: SLF001
        return found.spread, found.is_constant

    assert judged((1.0, 0.0), (-2.0, 2 * limit), (0.0, 0.0)) == (limit, True)
    assert judged((1.0, math.nextafter(limit, 1.0)))[1] is False
    assert judged((0.0, 0.0)) == (0.0, True)
    assert judged((1.0, 0.0), (0.0, 0.5)) == (0.0, False), "tokens' coefficients cancel"


IDS = torch.zeros(2, 4, dtype=torch.int64)
LOG_PROBS, LOGITS, REWARDS, FLAT = (
    torch.zeros(size, requires_grad=True) for size in ((2, 3), (2, 4, 5), (2, 1), (2, 2))
)
LABELS = torch.tensor([[-100, -100, 1, 2], [-100, 3, 100, -100]])
MASK = torch.ones(2, 3)


def test_where_log_probs_are_found() -> None:
    head = find_readout(SimpleNamespace(log_probs=LOG_PROBS, label_mask=MASK), {"labels": LABELS}, IDS)
    assert isinstance(head, FusedReadout) and head.root is LOG_PROBS and head.mask is MASK and head.length == 4
    head = find_readout(SimpleNamespace(log_probs=LOG_PROBS, logits=LOGITS), {"labels": LABELS}, IDS)
    assert isinstance(head, FusedReadout)
    assert head.mask.int().tolist() == [[0, 1, 1], [1, 1, 0]]
    given: Any
    for given in (SimpleNamespace(log_probs=LOG_PROBS.detach(), logits=LOGITS), (LOGITS, None), LOGITS):
        found = find_readout(given, {"labels": LABELS}, IDS)
        assert isinstance(found, LogitsReadout) and found.root is LOGITS
        assert found.labels is LABELS and found.input_ids is IDS
    assert isinstance(find_readout(LOGITS[:, :, :2], {}, IDS), LogitsReadout), "a vocabulary of two"
    for kwargs, mask in (({"attention_mask": LABELS}, LABELS), ({}, torch.ones_like(IDS))):
        reward = find_readout(SimpleNamespace(logits=REWARDS), kwargs, IDS)
        assert isinstance(reward, RewardReadout) and reward.root is REWARDS and torch.equal(reward.attention_mask, mask)


@pytest.mark.parametrize(
    ("output", "why"),
    [
        (SimpleNamespace(log_probs=LOG_PROBS), "without a mask"),
        (SimpleNamespace(log_probs=LOG_PROBS, label_mask=MASK[:, 1:]), "without a mask"),
        (SimpleNamespace(logits=LOGITS.detach()), "neither log_probs nor logits"),
        ((), "neither log_probs nor logits"),
        (SimpleNamespace(), "neither log_probs nor logits"),
        (SimpleNamespace(logits=LOGITS[:1]), r"have shape \[1, 4, 5\]"),
        (SimpleNamespace(logits=LOGITS[:, :, :1]), r"have shape \[2, 4, 1\]"),
        (SimpleNamespace(logits=FLAT), r"have shape \[2, 2\]"),
        (SimpleNamespace(logits=LOGITS[None]), r"have shape \[1, 2, 4, 5\]"),
    ],
)
def test_where_none_are_found(output: Any, why: str) -> None:
    assert re.search(why, str(find_readout(output, {}, IDS)))


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
