"""Figures 1, 2, 5 and 6: log-probs and cosines of ten losses on one set of comparisons."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from examples.paper.claims import Claim, judge_signs
from examples.paper.draw import CHOSEN, REJECTED, Panel, Row, draw_panels, series, write_rows
from examples.paper.lab import Lab, Outcome
from examples.paper.settings import shown_name

__all__ = ["changes", "claims_of", "figure1", "figure2", "figure5", "figure6"]

AVERAGED = ("SimPO", "IPO")
"""Losses whose log-probs the paper draws a token."""
REGULARIZED = ("CPO", "DPOP", "RRHF", "SLiC-HF")


def changes(rows: Sequence[Row], column: str) -> list[float]:
    """From the first to the last step.

    Args:
        rows: of one loss or style.
        column: of `watch.summarize`.

    Returns:
        A change a seed.
    """
    by_seed: dict[int, list[Row]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).append(row)
    return [mine[-1][column] - mine[0][column] for mine in by_seed.values()]


def _side(loss: str, side: str) -> str:
    return f"{side}_mean" if loss in AVERAGED else side


def _panel(loss: str, rows: Sequence[Row]) -> Panel:
    lines = {
        "chosen": (CHOSEN, series(rows, _side(loss, "chosen"))),
        "rejected": (REJECTED, series(rows, _side(loss, "rejected"))),
    }
    return Panel(loss, lines, "nats a token" if loss in AVERAGED else "log-prob (nats)")


def _describe(lab: Lab, which: int) -> str:
    start = lab.start(which, lab.settings.seeds[0])
    return f"{start.name}; {lab.over(len(start.probe))}"


def figure1(lab: Lab) -> Outcome:
    """Chosen and rejected log-probs: both rise under one margin loss, both fall under another.

    Args:
        lab: where from and where to.

    Returns:
        What was found.
    """
    runs = lab.comparisons(0)
    rising = [
        loss
        for loss, rows in runs.items()
        if min(*changes(rows, "chosen"), *changes(rows, "rejected"), *_margins(rows)) > 0
    ]
    shown = rising[0] if rising else "CPO"
    caption = f"Figure 1. a: {shown}; b: DPO. {_describe(lab, 0)}"
    draw_panels(lab.image("figure1"), [_panel(f"a: {shown}", runs[shown]), _panel("b: DPO", runs["DPO"])], caption)
    write_rows(lab.table("figure1"), [*runs[shown], *runs["DPO"]])
    note = "The paper's text does not name the losses of Figure 1; a is the first of the ten under which both rise."
    claims = [_both_rise(runs, rising), _both_fall("Figure 1b", "DPO", runs["DPO"])]
    return Outcome("figure1", claims, ("paper-figure1.png", caption), [note])


def _both_rise(runs: Mapping[str, Sequence[Row]], rising: Sequence[str]) -> Claim:
    return Claim(
        where="Figure 1a", claim="Under some margin loss chosen and rejected both rise while the margin grows",
        paper="both rise",
        rule="of the ten losses, at least one with chosen, rejected and the margin above their start at the end, in "
        "every seed",
        ours=f"{len(rising)} of {len(runs)}: {', '.join(rising) or 'none'}", holds=bool(rising),
    )  # fmt: skip


def _both_fall(where: str, loss: str, rows: Sequence[Row]) -> Claim:
    a_token = " a token" if loss in AVERAGED else ""
    return judge_signs(
        where, f"{loss}: chosen and rejected{a_token} both fall", paper="both fall",
        rule="held-out means at the end below the start",
        evidence={side: (-1, changes(rows, _side(loss, side))) for side in ("chosen", "rejected")},
    )  # fmt: skip


def _more(where: str, loss: str, rows: Sequence[Row]) -> Claim:
    gaps = [
        rejected - chosen for chosen, rejected in zip(changes(rows, "chosen"), changes(rows, "rejected"), strict=True)
    ]
    return judge_signs(
        where, f"{loss}: rejected falls more than chosen", paper="the margin grows",
        rule="change of rejected less change of chosen below 0", evidence={"rejected − chosen": (-1, gaps)},
    )  # fmt: skip


def _chosen_rises(where: str, loss: str, rows: Sequence[Row]) -> Claim:
    return judge_signs(
        where, f"{loss}: chosen rises", paper="rises", rule="held-out mean at the end above the start",
        evidence={"chosen": (+1, changes(rows, "chosen"))},
    )  # fmt: skip


def _margins(rows: Sequence[Row]) -> list[float]:
    """The change of `log π(chosen) − log π(rejected)`, one a seed."""
    return [a - b for a, b in zip(changes(rows, "chosen"), changes(rows, "rejected"), strict=True)]


def _together(rows: Sequence[Row]) -> float:
    """Share of the intervals between measurements in which both move the same way, the least seed's."""
    shares = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        mine = [row for row in rows if row["seed"] == seed]
        moves = [
            (after["chosen"] - before["chosen"]) * (after["rejected"] - before["rejected"])
            for before, after in itertools.pairwise(mine)
        ]
        shares.append(sum(move > 0 for move in moves) / len(moves))
    return min(shares)


def claims_of(where: str, runs: Mapping[str, Sequence[Row]]) -> list[Claim]:
    """Section 3.3's statements on the ten losses.

    Args:
        where: the figure.
        runs: name of the loss to its rows.

    Returns:
        The claims.
    """
    claims = [
        claim
        for loss in ("DPO", "R-DPO")
        for claim in (_both_fall(where, loss, runs[loss]), _more(where, loss, runs[loss]))
    ]
    claims.append(
        judge_signs(
            where, "SPPO: chosen rises, rejected falls", paper="chosen rises, rejected falls",
            rule="held-out means at the end above and below the start",
            evidence={
                "chosen": (+1, changes(runs["SPPO"], "chosen")),
                "rejected": (-1, changes(runs["SPPO"], "rejected")),
            },
        )
    )  # fmt: skip
    claims += [_chosen_rises(where, loss, runs[loss]) for loss in REGULARIZED]
    claims += [_both_fall(where, loss, runs[loss]) for loss in AVERAGED]
    return claims


def _together_note(runs: Mapping[str, Sequence[Row]]) -> str:
    """The paper's "rise and fall together, step by step", which its own reading of SPPO contradicts: no verdict."""
    shares = {loss: _together(rows) for loss, rows in runs.items()}
    apart = [f"{loss} {share:.0%}" for loss, share in shares.items() if share <= 0.5]
    return (
        "The paper sees chosen and rejected rise and fall together step by step under all losses, which is no claim "
        "about ends (those of SPPO part in the paper, too) and is not judged. Between measurements both move the same "
        f"way more often than not, in every seed, under {len(shares) - len(apart)} of {len(shares)} losses"
        + (f"; the others: {', '.join(apart)}." if apart else ".")
    )


def figure2(lab: Lab) -> Outcome:
    """Chosen and rejected log-probs under ten losses, first model (the paper's Mistral 7B).

    Args:
        lab: where from and where to.

    Returns:
        What was found.
    """
    return _ten_losses(lab, 0, "2")


def figure5(lab: Lab) -> Outcome:
    """As Figure 2, second model (the paper's Llama-3 8B).

    Args:
        lab: where from and where to.

    Returns:
        What was found.
    """
    return _ten_losses(lab, 1, "5")


def _ten_losses(lab: Lab, which: int, number: str) -> Outcome:
    runs = lab.comparisons(which)
    caption = f"Figure {number}. {_describe(lab, which)}"
    draw_panels(lab.image(f"figure{number}"), [_panel(loss, rows) for loss, rows in runs.items()], caption)
    write_rows(lab.table(f"figure{number}"), [row for rows in runs.values() for row in rows])
    kto = runs["KTO (paired)"]
    moved = " and ".join(f"{side} {sum(values) / len(values):+.2f}" for side, values in
                         ((side, changes(kto, side)) for side in ("chosen", "rejected")))  # fmt: skip
    notes = [f"Of KTO the paper claims nothing (Section 3.2.1); here {moved} nats, means over the seeds."]
    notes.append(_together_note(runs))
    active = {loss: _contrasting(runs[loss]) for loss in ("RRHF", "SLiC-HF")}
    notes.append(
        "A satisfied hinge leaves the likelihood of chosen alone. Pairs whose hinge contrasts anything, over all "
        f"measured steps: {', '.join(f'{loss} {share:.0%}' for loss, share in active.items())}."
    )
    return Outcome(
        f"figure{number}", claims_of(f"Figure {number}", runs), (f"paper-figure{number}.png", caption), notes
    )


def _contrasting(rows: Sequence[Row]) -> float:
    """Mean share of held-out pairs whose `d_l` is not zero."""
    return sum(row["contrasting"] for row in rows) / len(rows)


def figure6(lab: Lab) -> Outcome:
    """The cosine of chosen's and rejected's gradients under ten losses, both models.

    Args:
        lab: where from and where to.

    Returns:
        What was found.
    """
    models = list(dict.fromkeys(lab.settings.models))
    runs = {shown_name(model): lab.comparisons(which) for which, model in enumerate(models)}
    losses = list(next(iter(runs.values())))
    colours = dict(zip(runs, (CHOSEN, "#c77400"), strict=False))
    panels = [
        Panel(loss, {name: (colours[name], series(mine[loss], "cosine")) for name, mine in runs.items()}, "cosine")
        for loss in losses
    ]
    claims = [
        judge_signs(
            "Figure 6", f"{loss}: the two gradients point the same way", paper="not stated; positive is expected",
            rule="mean over the measured steps above 0",
            evidence={name: (+1, _seed_means(mine[loss])) for name, mine in runs.items()},
        )
        for loss in losses
    ]  # fmt: skip
    starts = [lab.start(which, lab.settings.seeds[0]) for which in range(len(models))]
    caption = f"Figure 6. {'; '.join(start.name for start in starts)}; {lab.over(len(starts[0].probe))}"
    draw_panels(lab.image("figure6"), panels, caption)
    keep = ("model", "loss", "seed", "step", "cosine")
    rows = [row for mine in runs.values() for each in mine.values() for row in each]
    write_rows(lab.table("figure6"), [{name: row[name] for name in keep} for row in rows])
    return Outcome("figure6", claims, ("paper-figure6.png", caption))


def _seed_means(rows: Sequence[Row]) -> list[float]:
    seeds = dict.fromkeys(row["seed"] for row in rows)
    means = []
    for seed in seeds:
        mine = [row["cosine"] for row in rows if row["seed"] == seed]
        means.append(sum(mine) / len(mine))
    return means
