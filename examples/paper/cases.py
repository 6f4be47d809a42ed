"""Table 1: how often each case of DPO occurs, and whether a real step does as the condition says."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from examples.paper.claims import Claim, judge_share, spread
from examples.paper.comparisons import changes
from examples.paper.draw import Row, draw_cases, write_rows
from examples.paper.lab import Lab, Outcome
from examples.paper.trainer import completion_logps
from gradent import losses
from gradent.demo.task import TokenPair, tokenize_style
from gradent.measurement import measure
from gradent.pairs.batch import PairBatch
from gradent.theory.conditions import CASES, verdict

__all__ = ["step_on_each", "table1"]

_LARGEST_STEP = 1e-4  # nats, the largest change that the real steps of Table 1 aim at
_MOST = 0.5  # of the pairs
_LARGEST_MODEL = 10**9  # parameters that are copied in float64


def step_on_each(model: Any, pairs: Sequence[TokenPair]) -> tuple[list[int], list[int]]:
    """Take one real step of gradient descent on each pair's own DPO loss, and see which way the log-probs go.

    In float64, from the same model each time, with the model as its own reference.

    Args:
        model: a causal language model; it is left as it is.
        pairs: the pairs.

    Returns:
        `(predicted, realised)`: the case of each pair.
    """
    policy = copy.deepcopy(model).double().eval()
    parameters = [each for each in policy.parameters() if each.requires_grad]
    loss, predicted, realised = losses.get("dpo"), [], []
    for pair in pairs:
        batch = PairBatch.from_tokens([pair])
        judged = verdict(gram := measure(policy, batch), loss, gram.chosen_logp, gram.rejected_logp)
        predicted.append(int(judged.case))
        largest = max(judged.chosen_change.abs().item(), judged.rejected_change.abs().item())
        inputs = {
            name: getattr(batch, name).to(parameters[0].device)
            for name in ("input_ids", "attention_mask", "completion_mask")
        }
        before = completion_logps(policy, inputs)
        start = before.detach().double()
        value = loss.value(
            chosen_logp=before[:1], rejected_logp=before[1:], ref_chosen_logp=start[:1], ref_rejected_logp=start[1:]
        )
        gradient = torch.autograd.grad(value.sum(), parameters)
        eta = _LARGEST_STEP / largest
        with torch.no_grad():
            kept = [each.clone() for each in parameters]
            for each, slope in zip(parameters, gradient, strict=True):
                each -= eta * slope
            chosen, rejected = (completion_logps(policy, inputs) - start).tolist()
            for each, old in zip(parameters, kept, strict=True):
                each.copy_(old)
        realised.append(1 + (chosen < 0) + 2 * (rejected > 0))
    return predicted, realised


def table1(lab: Lab) -> Outcome:
    """Table 1: the cases of DPO, how often each occurs, and what a real step does.

    Args:
        lab: where from and where to.

    Returns:
        What was found.
    """
    groups = {**{f"sentiment: {style}": rows for style, rows in lab.styles().items()}, "comparisons": []}
    groups["comparisons"] = lab.comparisons(0, ("dpo",))["DPO"]
    caption = f"Table 1. Cases of held-out pairs under DPO, mean over {len(lab.settings.seeds)} seeds"
    draw_cases(lab.image("table1"), groups, caption)
    keep = ("seed", "step", *CASES.values())
    rows = [{"data": name, **{key: row[key] for key in keep}} for name, mine in groups.items() for row in mine]
    write_rows(lab.table("table1"), rows)
    fourth = sum(row["reversed"] == 0 and row["inactive"] == 0 for row in rows)
    claims = [
        judge_share(
            "Table 1", "DPO has three cases: chosen never falls while rejected rises", paper="no fourth case",
            what="measured looks at a model (all pairs) without a fourth case", good=fourth, of=len(rows),
        ),
        *_real_steps(lab),
    ]  # fmt: skip
    shares = [f"{name}: {_shares(mine)}" for name, mine in groups.items()]
    notes = [f"Over all measured steps, {'; '.join(shares)}."]
    for name, mine in groups.items():
        fall, ideal = changes(mine, "chosen"), sum(row["ideal"] for row in mine) / len(mine)
        if max(fall) < 0 and ideal > _MOST:
            notes.append(
                f"{name.capitalize()}: {ideal:.0%} of the pairs are in case 1, yet chosen changes by {spread(fall)} "
                "nats. The case is about a step on that pair alone; here the other pairs of each batch move it as well."
            )
    return Outcome("table1", claims, ("paper-table1.png", caption), notes)


def _shares(rows: Sequence[Row]) -> str:
    names = [name for number, name in CASES.items() if number]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in names}
    return ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in means.items())


def _real_steps(lab: Lab) -> list[Claim]:
    start = lab.sentiment(lab.settings.seeds[0])
    if sum(each.numel() for each in start.model.parameters()) > _LARGEST_MODEL:
        lab.say("table1: the model is too large for steps in float64; they are left out.")
        return []
    probe = start.task.probe[: min(len(start.task.probe), 24)]
    pairs = []
    for style in ("single token", "short suffix", "long suffix"):
        pairs += tokenize_style(start.tokenizer, probe, style, start.task.label_words)
    # With the roles exchanged case 2 is case 3: a policy that is surer of chosen has none of its own.
    pairs += [(prompt, rejected, chosen) for prompt, chosen, rejected in pairs]
    predicted, realised = step_on_each(start.model, pairs)
    counted = ", ".join(f"{predicted.count(case)} in case {case}" for case in (1, 2, 3))
    agree = sum(one == other for one, other in zip(predicted, realised, strict=True))
    return [
        judge_share(
            "Table 1", "The condition says which way a step of DPO moves both log-probs", paper="by (4) and (5)",
            what=f"pairs ({counted}; half with the roles exchanged) whose log-probs really move so in a step of at "
            f"most about {_LARGEST_STEP:g} nats", good=agree, of=len(pairs),
        )
    ]  # fmt: skip
