"""Theorems 1 and 3 and Corollary 2 as numbers: `gradent.theory`'s closed forms beside `measure`, on their own set-ups.

Letters: V vocabulary, d width, M tokens that a prediction is uniform over, m the differing place, L tokens a response.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from examples.paper.claims import Claim, judge_error, judge_share
from examples.paper.draw import Row, write_rows
from examples.paper.lab import Lab, Outcome
from examples.paper.setups import F64, LearnableHead, LearnableLogits, V
from gradent import losses
from gradent.errors import GradentWarning
from gradent.measurement import measure
from gradent.pair_gram import PairGram
from gradent.pairs.batch import PairBatch
from gradent.theory.closed_forms import Entries, corollary_2, theorem_1, theorem_3
from gradent.theory.conditions import verdict

__all__ = ["corollary2", "theorem1", "theorem3"]

CHOSEN, REJECTED = 9, 2
EXACT = 1e-9


def _measured(model: nn.Module, prompt: list[int], chosen: list[int], rejected: list[int]) -> PairGram:
    with warnings.catch_warnings():  # Model Setup 2 is measured a row at a time, which is said and is no trouble here
        warnings.filterwarnings("ignore", message="gradent measures this model one row", category=GradentWarning)
        return measure(model, PairBatch.from_tokens([(prompt, chosen, rejected)]))


def _error(theory: Entries, gram: PairGram) -> float:
    """Largest difference over the gradients' norms, since inner products cancel."""
    norm_w, norm_l = gram.chosen_sq.sqrt(), gram.rejected_sq.sqrt()
    scales = {"chosen_sq": norm_w**2, "rejected_sq": norm_l**2, "inner": norm_w * norm_l}
    return max(((getattr(theory, name) - getattr(gram, name)).abs() / scale).item() for name, scale in scales.items())


def _case(gram: PairGram) -> int:
    return int(verdict(gram, losses.get("dpo"), gram.chosen_logp, gram.rejected_logp).case)


def theorem1(lab: Lab) -> Outcome:
    """Theorem 1: one differing token, a uniform prediction, a learnable head.

    Args:
        lab: where to.

    Returns:
        What was found.
    """
    rows: list[Row] = []
    supports = ([2, 9], [2, 4, 9], [0, 1, 2, 5, 7, 9, 10], list(range(V)))
    for seed in range(20):
        for support in supports:
            model, prompt = LearnableHead(seed), [3, 4, 8]
            model.predict_uniformly(prompt, support)
            gram = _measured(model, prompt, [CHOSEN], [REJECTED])
            theory = theorem_1(model.hidden(torch.tensor([prompt]))[0, -1], len(support))
            rows.append(
                {
                    "seed": seed, "M": len(support), "inner": gram.inner.item(), "closed form": theory.inner.item(),
                    "chosen_sq": gram.chosen_sq.item(), "closed form of it": theory.chosen_sq.item(),
                    "error": _error(theory, gram), "case": _case(gram),
                }
            )  # fmt: skip
    write_rows(lab.table("theorem1"), rows)
    where = "Theorem 1"
    claims = [
        judge_error(
            where, "inner = -‖h‖²/M, and both squared norms are ((M-1)/M)‖h‖²", paper="equal",
            what=f"largest error of {len(rows)} draws, in parts of the norms,", error=max(row["error"] for row in rows),
            bound=EXACT,
        ),
        judge_share(
            where, "The inner product is negative, so under DPO chosen rises and rejected falls", paper="inner < 0",
            what="draws with inner < 0 and case 1", good=sum(row["inner"] < 0 and row["case"] == 1 for row in rows),
            of=len(rows),
        ),
    ]  # fmt: skip
    return Outcome(
        "theorem1", claims, notes=["Float64; 20 models of random weights, M of 2, 3, 7 and 12 (all tokens)."]
    )


def _corollary_draws() -> Iterator[tuple[int, str, Entries, PairGram]]:
    """Random prefixes; then prefixes that lean: one of the two last tokens, over and over."""
    draw = torch.Generator().manual_seed(0)
    for seed in range(200):
        length = int(torch.randint(1, 7, (1,), generator=draw))
        prefix = torch.randint(0, V, (length,), generator=draw).tolist()
        model, prompt = LearnableHead(seed), [3, 4]
        model.predict_uniformly(prompt + prefix, list(range(V)))
        yield seed, "random", *_corollary_entries(model, prompt, prefix)
    for token in (REJECTED, CHOSEN):
        model = LearnableHead(2)
        with torch.no_grad():
            model.lm_head.weight.zero_()
        yield 2, "chosen's" if token == CHOSEN else "rejected's", *_corollary_entries(model, [token] * 3, [token] * 6)


def _corollary_entries(model: LearnableHead, prompt: list[int], prefix: list[int]) -> tuple[Entries, PairGram]:
    row = torch.tensor([prompt + prefix])
    with torch.no_grad():
        hidden = model.hidden(row)[0, len(prompt) - 1 :]
        probs = torch.softmax(model.lm_head(hidden[:-1]), -1)
    theory = corollary_2(hidden, probs, torch.tensor(prefix), CHOSEN, REJECTED, torch.arange(V))
    return theory, _measured(model, prompt, [*prefix, CHOSEN], [*prefix, REJECTED])


def corollary2(lab: Lab) -> Outcome:
    """Corollary 2: responses that differ at their last token alone.

    Args:
        lab: where to.

    Returns:
        What was found.
    """
    rows: list[Row] = []
    for seed, prefix, theory, gram in _corollary_draws():
        gap = (gram.chosen_sq / gram.rejected_sq - 1).abs().item()
        rows.append({"seed": seed, "prefix": prefix, "chosen_sq": gram.chosen_sq.item(),
                     "rejected_sq": gram.rejected_sq.item(), "inner": gram.inner.item(), "norms differ by": gap,
                     "error": _error(theory, gram), "case": _case(gram)})  # fmt: skip
    write_rows(lab.table("corollary2"), rows)
    where, drawn = "Corollary 2", [row for row in rows if row["prefix"] == "random"]
    claims = [
        judge_error(
            where, "gradent's own closed form (docstring of `theory.corollary_2`) is what is measured",
            paper="not the paper's", what=f"largest error of {len(rows)} draws, in parts of the norms,",
            error=max(row["error"] for row in rows), bound=EXACT,
        ),
        judge_share(
            where, "‖∇log π_w‖² = ‖∇log π_l‖²", paper="equal", what="draws with norms equal to 1e-9",
            good=sum(row["norms differ by"] < EXACT for row in rows), of=len(rows),
        ),
        judge_share(
            where, "inner ≤ both squared norms, so chosen rises and rejected falls", paper="always",
            what=f"draws in case 1 ({sum(row['case'] == 1 for row in drawn)} of {len(drawn)} random ones; the others "
            "repeat one of the two last tokens)", good=sum(row["case"] == 1 for row in rows), of=len(rows),
        ),
    ]  # fmt: skip
    cases = {row["prefix"]: row["case"] for row in rows if row["prefix"] != "random"}
    told = "; ".join(f"{prefix} last token: case {case}" for prefix, case in cases.items())
    notes = [
        "The proof (B.1) keeps the gradients of the last token alone; those of the shared prefix are the same in both "
        f"responses, but their products with the last token's are not. Where the prefix repeats {told}."
    ]
    return Outcome("corollary2", claims, notes=notes)


_DIFFER = (
    ([1, 2, 3, 4, 5, 6], [1, 2, 7, 4, 5, 6], 2),
    ([3, 4, 5], [7, 4, 5], 0),
    ([1, 2, 8, 4], [1, 7, 8, 4], 1),
)
_PROMPT = [0]


def theorem3(lab: Lab) -> Outcome:
    """Theorem 3: one differing token in the middle, learnable logits.

    Args:
        lab: where to.

    Returns:
        What was found.
    """
    rows: list[Row] = []
    for seed in range(20):
        for chosen, rejected, m in _DIFFER:
            rows += _step_rows(LearnableLogits(16, seed), chosen, rejected, m, seed)
    write_rows(lab.table("theorem3"), rows)
    where, eta = "Theorem 3", f"a real step of DPO, η = {_ETA:g}"
    at = [row for row in rows if row["place"] == "at m"]
    claims = [
        judge_error(
            where, "(12) to (14), with (13) as its proof's (22) has it, are the tokens' changes", paper="equal",
            what=f"largest difference from {eta}, over the step's largest change,",
            error=max(row["error"] for row in rows), bound=1e-3,
        ),
        judge_error(
            where, "The tokens' changes sum to ‖g_w‖² − ⟨g_w, g_l⟩ as measured", paper="equal",
            what="largest error, in parts of the norms,", error=max(row["sum error"] for row in rows), bound=EXACT,
        ),
        judge_error(
            where, "(13) as printed: 1 + (s[j*] − s[k*])", paper="equal",
            what="largest difference from the change at m, in parts of it,",
            error=max(abs(row["printed"] / row["closed form"] - 1) for row in at), bound=1e-3,
        ),
        judge_share(
            where, "Nothing changes before m, and chosen rises at m", paper="= 0, ≥ 0",
            what="tokens of chosen before m (below 0.001) and at m, in a real step", good=sum(
                abs(row["real step"]) < 1e-3 if row["place"] == "before m" else row["real step"] >= 0
                for row in rows if row["place"] != "after m"
            ), of=sum(row["place"] != "after m" for row in rows),
        ),
        *_suffix_claims(),
    ]  # fmt: skip
    after = [row["closed form"] for row in rows if row["place"] == "after m"]
    note = (
        f"Without the assumption of Pal et al., chosen falls at {sum(each < 0 for each in after)} of {len(after)} "
        "tokens after m in these draws. The theorem takes each position's logits for one parameter of both responses; "
        "with a row of its own for every prefix nothing after m would be entangled (docstring of `theory.theorem_3`)."
    )
    return Outcome("theorem3", claims, notes=[note])


_ETA = 1e-3


def _logps(model: nn.Module, response: list[int]) -> Tensor:
    row = torch.tensor([_PROMPT + response])
    logits = model(input_ids=row).logits[0, len(_PROMPT) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])[:, 0]


def _probs(model: nn.Module, response: list[int]) -> Tensor:
    with torch.no_grad():
        return torch.softmax(model(input_ids=torch.tensor([_PROMPT + response])).logits[0, len(_PROMPT) - 1 : -1], -1)


def _step_rows(model: LearnableLogits, chosen: list[int], rejected: list[int], m: int, seed: int) -> Iterator[Row]:
    """A row a chosen token: closed form per unit of C, and what a real step does."""
    s_w, s_l = _probs(model, chosen), _probs(model, rejected)
    changes = theorem_3(s_w, s_l, torch.tensor(chosen), torch.tensor(rejected)).chosen
    gram = _measured(model, _PROMPT, chosen, rejected)
    whole = (gram.chosen_sq - gram.inner).item()
    stepped = copy.deepcopy(model)
    margin = _logps(stepped, chosen).sum() - _logps(stepped, rejected).sum()
    (-nn.functional.logsigmoid(0.1 * (margin - margin.detach()))).backward()
    torch.optim.SGD(stepped.parameters(), lr=_ETA).step()
    scale = _ETA * 0.05  # C = η β σ(0)
    realised = ((_logps(stepped, chosen) - _logps(model, chosen)) / scale).detach()
    for place, (closed, real) in enumerate(zip(changes.tolist(), realised.tolist(), strict=True)):
        yield {
            "seed": seed, "m": m, "token": place,
            "place": "before m" if place < m else "at m" if place == m else "after m",
            "closed form": closed, "real step": real, "error": abs(real - closed) / changes.abs().max().item(),
            "sum error": abs(changes.sum().item() - whole) / gram.chosen_sq.item(),
            "printed": 1 + (s_w[m, chosen[m]] - s_w[m, rejected[m]]).item() if place == m else closed,
        }  # fmt: skip


def _suffix_claims() -> list[Claim]:
    """Under the assumption of Pal et al.: every token after m falls, and each more of them takes chosen lower."""
    m, length, draws = 1, 9, 100
    falls = lower = ends = 0
    for seed in range(draws):
        draw = torch.Generator().manual_seed(seed)
        logits = torch.randn(length, V, generator=draw, dtype=F64)
        lifted = logits.clone()
        lifted[m + 1 :, 0] += torch.rand(length - m - 1, generator=draw, dtype=F64)
        chosen, rejected = torch.zeros(length, dtype=torch.long), torch.zeros(length, dtype=torch.long)
        chosen[m], rejected[m] = 3, 4
        changes = theorem_3(torch.softmax(lifted, -1), torch.softmax(logits, -1), chosen, rejected).chosen
        sums = changes.cumsum(0)[m:]
        falls += bool((changes[m + 1 :] <= 0).all())
        lower += bool((sums.diff() <= 0).all())
        ends += bool(sums[-1] < 0)
    where, paper = "Theorem 3", "falls"
    return [
        judge_share(where, "Under Pal et al.'s assumption chosen falls at every token after m", paper=paper,
                    what="draws", good=falls, of=draws),
        judge_share(where, f"The longer the suffix, the more chosen's log-prob falls (in sum it fell in {ends} of "
                    f"{draws} draws, at 7 tokens of suffix)", paper="falls more",
                    what="draws in which every further token lowers the sum", good=lower, of=draws),
    ]  # fmt: skip
