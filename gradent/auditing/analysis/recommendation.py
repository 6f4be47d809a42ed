"""From the rows of a what-if to one to three sentences: would another loss help, and can these pairs tell?

The same pairs are judged under every loss, so two losses are compared as pairs are (McNemar): by how many pairs only
one of them puts in case 1. Judged is one step on the whole sample, where that was measured, else one on each pair
alone. Where such steps did not foretell what the run did to these pairs, no loss is proposed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gradent.auditing.analysis.loss_grid import NAMES, describe_setting
from gradent.report.page.numbers import beats_a_coin, share_interval, share_of_pairs

__all__ = ["CLEARLY", "NEARLY_ALL", "find_foretold", "recommend", "standard_errors"]

CLEARLY = 2.8
"""Standard errors from which a gain is more than sampling noise: of ten losses that gain nothing, one would pass it in
one of twenty samples of pairs."""

NEARLY_ALL = 0.95
"""Share of the pairs that the run's loss moves from which there is little left to gain."""

Row = Mapping[str, Any]

SURELY_NEARLY_ALL = 0.85
"""What the lower end of that share's 95% interval must reach, or the pairs are too few to say so (22 of 22 do)."""

ENOUGH = 100
"""Pairs that are advised where there were too few."""

NOTABLE = 0.1
"""Share of the pairs by which a loss that is not clearly better is too much better to be dismissed."""

_OTHERWISE = {
    "both_down": "both fall", "both_up": "both rise", "reversed": "chosen falls and rejected rises",
    "inactive": "the loss moves nothing",
}  # fmt: skip
_DESIGN = "pairwise normalization (the paper's Section 5.1)"


def recommend(
    rows: Sequence[Row], foretold: Mapping[str, Any] | None = None, twice: tuple[int, int] = (0, 0)
) -> dict[str, Any] | None:
    """What the rows of `what_if` come to, as text and as the numbers that it rests on; None where none was measured."""
    # `foretold` is what `find_foretold` made of the run: how well such steps said what the run then did. `twice`: pairs
    # that hold their prompt once more in chosen, and all pairs. A loss whose λ·NLL term raises both log-probs on more
    # pairs than it separates is not recommended, however many pairs it leaves in case 1; `raises_both` lists those of
    # the paper's losses.
    run = next((row for row in rows if row["group"] == "run"), None)
    if run is None or not run["pairs"] or not any(row["cases"] for row in rows):
        return None
    alone, is_sample = run, run.get("sample") is not None
    if is_sample:
        rows = [{**row, **(row.get("sample") or {"cases": None, "against_run": None})} for row in rows]
        run = next(row for row in rows if row["group"] == "run")
    paper = [row for row in rows if row["group"] == "paper" and row["loss"] != run["loss"]]
    judged = [row for row in paper if row["cases"]]
    same = [row for row in rows if row["group"] in {"paper", "sweep"} and row["loss"] == run["loss"] and row["cases"]]
    best, tuned = _best(judged), _best(same)
    design = next(row for row in rows if row["group"] == "design" and row["loss"] == "pairwise_normalized")
    term = next((row for row in rows if row["group"] == "term"), None)
    facts: dict[str, Any] = {
        "pairs": run["pairs"],
        "repeated": twice[0],  # pairs that hold their prompt once more in chosen
        "step": "sample" if is_sample else "pair",  # what is judged: one step on the sample, or one on each pair alone
        "alone_ideal": _ideal(alone),
        # none_needed, loss, hyperparameter (of the run's own loss), none, too_few (pairs to tell), or not_foretold.
        "lever": _find_lever(run, best, tuned, foretold),
        "foretold": None if foretold is None else dict(foretold),
        "run": run["label"],
        "run_ideal": _ideal(run),
        **_compare("best", best),
        **_compare("own", tuned),
        "design_ideal": _ideal(design),
        # Of the likelihood term with which a step on the sample lowers chosen outside of it no more, on average.
        "nll_weight": term["hyperparameters"]["nll_weight"] if term is not None else None,
        "nll_ideal": _ideal(term),
        "raises_both": [row["label"] for row in judged if _raises_both(row)],
        "not_compared": [row["label"] for row in paper if not row["cases"]],
    }
    return {"text": " ".join([*_first(*twice), *_write(facts, run, best, tuned, judged)]), **facts}


def _first(twice: int, pairs: int) -> list[str]:
    """What comes before any choice of a loss: data that the run was hardly meant to have."""
    if not twice:
        return []
    return [
        f"First the data: in {twice} of {pairs} pairs chosen begins with the prompt, which is there already; take it "
        "out of the responses and train again, since what both share brings their gradients together under any loss."
    ]


def standard_errors(gained: int, lost: int) -> float:
    """A gain in paired standard errors, McNemar's statistic with the continuity correction."""
    return (gained - lost - 1) / math.sqrt(gained + lost) if gained > lost else 0.0


def _best(rows: Sequence[Row]) -> Row | None:
    """The row with the largest share in case 1, those left out whose λ·NLL term raises both on more pairs than that."""
    return max((row for row in rows if not _raises_both(row)), key=lambda row: row["cases"]["ideal"], default=None)


def _raises_both(row: Row) -> bool:
    return bool(row["hyperparameters"].get("lam", 0) > 0 and row["cases"]["both_up"] > row["cases"]["ideal"])


def _ideal(row: Row | None) -> float | None:
    return row["cases"]["ideal"] if row is not None and row["cases"] else None


def _is_clear(row: Row | None) -> bool:
    return row is not None and row["against_run"] is not None and standard_errors(**row["against_run"]) > CLEARLY


def _compare(name: str, row: Row | None) -> dict[str, Any]:
    against = (row or {}).get("against_run") or {"gained": None, "lost": None}
    return {
        name: row["label"] if row is not None else None, f"{name}_ideal": _ideal(row),
        f"{name}_gained": against["gained"], f"{name}_lost": against["lost"], f"{name}_clear": _is_clear(row),
    }  # fmt: skip


def find_foretold(
    steps: Mapping[str, Any] | None, dynamics: Mapping[str, Any] | None, *, is_sample: bool
) -> dict[str, Any] | None:
    """How often a step had the signs of the run's last interval right; None where no interval was measured."""
    rows = ((steps or {}).get("intervals") or []) if is_sample else ((dynamics or {}).get("intervals") or [])
    name = "sample_sign" if is_sample else "sign"
    if not rows or any(rows[-1].get(f"{side}_{name}") is None for side in ("chosen", "rejected")):
        return None
    row = rows[-1]
    return {
        "from": row["from"], "to": row["to"],
        # Those that such a step moves at all.
        "pairs": min(row.get(f"{side}_{name}ed", row["pairs"]) for side in ("chosen", "rejected")),
        "chosen": row[f"chosen_{name}"], "rejected": row[f"rejected_{name}"],
    }  # fmt: skip


def _foretells_nothing(foretold: Mapping[str, Any] | None) -> list[str]:
    """The responses of which the steps had signs right no more often than a coin."""
    if foretold is None or not foretold["pairs"]:
        return []
    return [side for side in ("chosen", "rejected") if not beats_a_coin(foretold[side], foretold["pairs"])]


def _can_tell(pairs: float) -> bool:
    """Whether that many pairs, all gained, would pass for more than noise."""
    return standard_errors(round(pairs), 0) > CLEARLY


def _find_lever(run: Row, best: Row | None, tuned: Row | None, foretold: Mapping[str, Any] | None = None) -> str | None:
    if run["cases"] is None:
        return None
    moved, ideal, pairs = 1 - run["cases"]["inactive"], run["cases"]["ideal"], run["pairs"]
    if moved > 0 and ideal >= NEARLY_ALL * moved:
        surely = share_interval(min(1.0, ideal / moved), max(1, round(moved * pairs)))[0] >= SURELY_NEARLY_ALL
        return "none_needed" if surely else "too_few"
    if not _can_tell((1 - ideal) * pairs):
        return "too_few"
    if _foretells_nothing(foretold):
        return "not_foretold"
    clear = [(name, _ideal(row) or 0.0) for name, row in (("hyperparameter", tuned), ("loss", best)) if _is_clear(row)]
    return max(clear, key=lambda item: item[1])[0] if clear else "none"


def _write(facts: Mapping[str, Any], run: Row, best: Row | None, tuned: Row | None, judged: Sequence[Row]) -> list[str]:
    if run["cases"] is None:
        return _write_without_run(facts, run)
    is_sample = facts["step"] == "sample"
    design = _percent(facts["design_ideal"]) + ("" if is_sample else " by construction")
    most = _find_rest(run)
    rest = f"; on {_percent(run['cases'][most])} {_OTHERWISE[most]}" if run["cases"][most] >= 0.05 else ""
    of = "a step on the whole sample" if is_sample else "one small step on each pair alone"
    beside = f" (a step on each pair alone: {_percent(facts['alone_ideal'])})" if is_sample else ""
    sentences = [
        f"With {run['label']}, case 1 (chosen rises, rejected falls) holds for "
        f"{share_of_pairs(_ideal(run), run['pairs'])} of {_count(run['pairs'])}{beside}, to first order and for "
        f"{of}{rest}."
    ]
    if facts["lever"] == "too_few":
        few = f"{_count(run['pairs'])} {'is' if run['pairs'] == 1 else 'are'} too few to tell losses apart"
        return [*sentences, f"{few}: measure {ENOUGH} or more (max_pairs)."]
    if facts["lever"] == "not_foretold":
        return [*sentences, _describe_foretold(facts["foretold"], is_sample=is_sample)]
    if facts["lever"] == "none_needed":
        return [*sentences, "That is nearly every pair that the loss moves: another loss has little to add."]
    if facts["lever"] == "none":
        compared = f" (the best, {best['label']}: {_percent(_ideal(best))})" if best is not None else ""
        tried = " and no value tried of the run's own hyperparameters" if tuned is not None else ""
        verb = "do" if tried else "does"
        little = "" if is_sample else ", if by little where the gradients are parallel"
        would = f"{_DESIGN} would make it {design}{little}"
        if (facts["design_ideal"] or 0.0) <= (facts["run_ideal"] or 0.0):
            would = f"{_DESIGN} does not raise it ({design})"
        likely = max(
            (row for row in (best, tuned) if row is not None), key=lambda row: _ideal(row) or 0.0, default=None
        )
        if likely is None or (_ideal(likely) or 0.0) - (_ideal(run) or 0.0) < NOTABLE:
            so = f"so these pairs give no reason to change the loss; {would}."
        else:
            against = likely["against_run"]
            so = (
                f"but these pairs are too few to be sure: {likely['label']} brings {against['gained']} of them into "
                f"case 1 and takes {against['lost']} out of it. Measure more (max_pairs); {would}."
            )
        sentences.append(f"None of the paper's other losses{compared}{tried} {verb} clearly better, {so}")
    elif facts["lever"] == "loss" and best is not None:
        sentences.append(f"{best['label']} would make it {_reached(best)}; {_DESIGN} {design}.")
    else:
        sentences.append(f"{_propose(run, tuned)}; {_DESIGN} {design}.")
    return [*sentences, *_describe_term(facts), *_last_sentence(facts, run, tuned, judged)]


def _describe_term(facts: Mapping[str, Any]) -> list[str]:
    """The likelihood term that would be enough, where steps were seen to foretell the run."""
    if facts["nll_weight"] is None or facts["foretold"] is None:
        return []
    return [
        f"A likelihood term on chosen of weight {facts['nll_weight']:.2g} (in TRL loss_type=[..., 'sft'] with "
        "loss_weights) is the smallest with which, to first order, a step on the sample does not lower chosen of pairs "
        f"outside of it on average; case 1 would hold for {_percent(facts['nll_ideal'])}."
    ]


def _describe_foretold(foretold: Mapping[str, Any], *, is_sample: bool) -> str:
    """That such steps did not foretell what the run did, so that no loss is proposed."""
    sides = {side: share_of_pairs(foretold[side], foretold["pairs"]) for side in ("chosen", "rejected")}
    step = "the sample" if is_sample else "each pair alone"
    return (
        f"But nothing shows that a step on {step} foretells this run: from step {foretold['from']:,} to "
        f"{foretold['to']:,} the sign was right for chosen in {sides['chosen']} and for rejected in "
        f"{sides['rejected']} of the pairs that it moves, and a coin has 50%. So no other loss is proposed from it; "
        "save checkpoints more often (save_steps), or watch the steps themselves (EntanglementCallback)."
    )


def _find_rest(run: Row) -> str:
    """The most frequent case but the ideal one."""
    return max(_OTHERWISE, key=lambda name: float(run["cases"][name]))


def _write_without_run(facts: Mapping[str, Any], run: Row) -> list[str]:
    best = f"{_percent(facts['best_ideal'])} with {facts['best']} and " if facts["best"] is not None else ""
    first = f"{run['label']} cannot be judged on these pairs: {run['reason']}"
    if facts["design_ideal"] is None:
        return [first]
    return [
        first,
        f"To first order and for one small step on each of {_count(run['pairs'])} alone, case 1 (chosen rises, "
        f"rejected falls) would hold for {best}{_percent(facts['design_ideal'])} by construction with {_DESIGN}.",
    ]


def _last_sentence(facts: Mapping[str, Any], run: Row, tuned: Row | None, judged: Sequence[Row]) -> list[str]:
    """At most one sentence, the most useful that applies."""
    if facts["lever"] == "loss" and _is_clear(tuned):
        return [f"{_propose(run, tuned)}."]
    if facts["not_compared"]:
        names = [label.partition(" (")[0] for label in facts["not_compared"]]
        listed = " and ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:])
        return [f"{listed} could not be compared, for want of a reference's log-probs."]
    raising = [row for row in judged if _raises_both(row)]
    if raising and _find_rest(run) == "both_down":
        most = max(raising, key=lambda row: row["cases"]["both_up"])
        risen = _percent(most["cases"]["both_up"])
        return [f"The log-likelihood term of {most['label']} raises chosen, but on {risen} rejected with it."]
    return []


def _propose(run: Row, tuned: Row | None) -> str:
    """The best setting of the run's own loss, by what differs from the run's."""
    if tuned is None:
        return ""
    mine = run["hyperparameters"]
    setting = {name: value for name, value in tuned["hyperparameters"].items() if value != mine.get(name)}
    return f"Within {NAMES.get(run['loss'], run['loss'])}, {describe_setting(setting)} would make it {_reached(tuned)}"


def _reached(row: Row) -> str:
    """The share in case 1 and, where it is no small one, the share on which both rise."""
    both_up = row["cases"]["both_up"]
    return _percent(_ideal(row)) + (f" (on {_percent(both_up)} both rise)" if both_up >= 0.1 else "")


def _percent(share: float | None) -> str:
    if share is None:
        return "none"
    if 0 < share < 0.005:
        return "under 1%"
    return "over 99%" if 0.995 < share < 1 else f"{share:.0%}"


def _count(pairs: int) -> str:
    return f"{pairs} pair" + ("" if pairs == 1 else "s")
