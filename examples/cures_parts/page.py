"""`cures-measured.md`, made of the records alone: every sentence with a figure in it is computed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from cures_parts.findings import SAME, Group
from cures_parts.records import ELSEWHERE
from cures_parts.words import HEAD, METHOD

__all__ = ["caption", "image", "parts", "write"]

Row = dict[str, Any]


def parts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The data and optimizers that there are runs of.

    Args:
        rows: of `records.COLUMNS`.

    Returns:
        `(data, optimizer)` in order.
    """
    return list(dict.fromkeys((row["data"], row["optimizer"]) for row in rows if row["phase"] == "run"))


def image(data: str, optimizer: str) -> str:
    """The name of a figure.

    Args:
        data: its data.
        optimizer: its optimizer.

    Returns:
        The file's name in `img/`.
    """
    return re.sub("[^a-z0-9]+", "-", f"cures-{data}-{optimizer}".lower()) + ".png"


def caption(data: str, optimizer: str, about: dict[str, Any]) -> str:
    """What a figure shows.

    Args:
        data: its data.
        optimizer: its optimizer.
        about: settings of the data.

    Returns:
        One line.
    """
    return (
        f"{data}, {optimizer}: mean over {about['probe']} held-out pairs and {len(about['seeds'])} seeds, "
        "band: least to largest seed. Accuracy: right label the most probable token (line), log π(chosen) > "
        "log π(rejected) (dots)"
    )


def write(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """The page.

    Args:
        rows: of `records.COLUMNS`.
        about: settings by data.

    Returns:
        Markdown.
    """
    every = [Group(rows, data, optimizer, about[data]["probe"]) for data, optimizer in parts(rows)]
    lines = [HEAD, "## In short\n", *_totals(every), *_short(every), METHOD, *_settings(about)]
    for group in every:
        lines += _section(group)
    return "\n".join(lines).rstrip() + "\n"


def _totals(every: Sequence[Group]) -> list[str]:
    """A sentence a method, over everything."""
    fallen = {
        (number, run.style, run.seed)
        for number, group in enumerate(every)
        for run in group.runs("DPO")
        if run.change("chosen") < 0
    }
    all_runs = sum(len(group.runs("DPO")) for group in every)
    lines = [f"In {len(fallen)} of {all_runs} runs (styles, seeds, optimizers, data) DPO's chosen falls. In these,\n"]
    for method in every[0].methods[1:]:
        mine = [
            (group, run)
            for number, group in enumerate(every)
            for run in group.runs(method)
            if (number, run.style, run.seed) in fallen
        ]
        rises = sum(run.change("chosen") > 0 for _, run in mine)
        rest = [group.against(run) for group, run in mine if run.change("chosen") <= 0]
        dpo = [group.run("DPO", run.style, run.seed) for group, run in mine]
        moved, without = (fmean(run.change("chosen") for run in some) for some in ([run for _, run in mine], dpo))
        price = fmean(run.change("answers") for _, run in mine) - fmean(run.change("answers") for run in dpo)
        of = "" if len(mine) == len(fallen) else f" of the {len(mine)} that it was tried in"
        lines.append(
            f"- **{method}** raises chosen in {rises}{of}, lets it fall by less in {rest.count(1)}, by as much in "
            f"{rest.count(0)} and by more in {rest.count(-1)}: it changes by {moved:+.2f} nats on average, under DPO "
            f"by {without:+.2f}; the log-prob of held-out SFT answers ends "
            f"{abs(price):.2f} nats {'below' if price < 0 else 'above'} DPO's on average.{_but(method, every, mine)}"
        )
    return [*lines, ""]


def _but(method: str, every: Sequence[Group], mine: Sequence[tuple[Group, Any]]) -> str:
    """What a reader of a method's counts has to know."""
    text = ""
    off = {(id(group), style) for group in every for name, style, _ in group.apart() if name == method}
    unlike = sum((id(group), run.style) in off for group, run in mine)
    if unlike:
        text += f" {unlike} of these runs are not at DPO's separation (see each part)."
    if method == "masked":
        plain = sum(group.runs(method)[0].last["mask_eta"] == 0 for group in every)
        if plain:
            text += (
                f" In {plain} of {len(every)} parts (data and optimizer) tuning chose η = 0, where every token is "
                "kept: that is DPO, and no test of masks."
            )
    return text


def _short(every: Sequence[Group]) -> list[str]:
    """One line a method and part."""
    lines = [
        "A run is one style and seed. *Ends higher* (*lower*): chosen's log-prob ends above (below) DPO's by more",
        f"than {SAME:.0%} of DPO's change in the same style and seed. *Right label*: held-out share at the end, in",
        "percentage points against DPO; *answers*: log-prob of held-out SFT answers, in nats against DPO; both are",
        "means over the runs.\n",
        "| data, optimizer | method | chosen rises | ends higher | ends lower | right label | answers |",
        "|---" * 7 + "|",
    ]
    for group in every:
        for method in group.methods:
            runs = group.runs(method)
            rises = sum(run.change("chosen") > 0 for run in runs)
            cells = [f"{group.data}, {group.optimizer}", method, f"{rises} of {len(runs)}"]
            if method == "DPO":
                cells += ["", "", f"({_mean(runs, lambda run: 100 * run.last['label_right']):.1f}%)"]
                cells += [f"({_mean(runs, lambda run: run.change('answers')):+.2f} since the start)"]
            else:
                both = [(run, group.run("DPO", run.style, run.seed)) for run in runs]
                how = [group.against(run) for run in runs]
                cells += [f"{how.count(sign)} of {len(runs)}" for sign in (1, -1)]
                for name, unit in (("label_right", 100), ("answers", 1)):
                    gap = _mean(both, lambda two, name=name: two[0].last[name] - two[1].last[name])
                    cells += [f"{unit * gap:+.{1 if unit == 100 else 2}f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _mean(items: Sequence[Any], value: Callable[[Any], float]) -> float:
    return sum(map(value, items)) / len(items)


def _settings(about: dict[str, Any]) -> list[str]:
    lines = ["## Settings\n", "| | " + " | ".join(about) + " |", "|---" * (len(about) + 1) + "|"]
    shown: dict[str, Callable[[dict[str, Any]], str]] = {
        "model": lambda one: one["model"],
        "SFT": lambda one: (
            f"AdamW at {one['sft']['sft_lr']:g}, {one['sft']['sft_steps']} steps of {one['sft']['sft_batch']} answers, "
            f"{one['sft']['train']} statements"
        ),
        "longest statement": lambda one: f"{one['longest']} characters" if one["file"] else "as generated",
        "SFT'd models": lambda one: "one, for all seeds" if one["file"] else "one a seed",
        "steps, pairs a step": lambda one: f"{one['steps']}, {one['batch']}",
        "held-out pairs a seed": lambda one: str(one["probe"]),
        "seeds": lambda one: ", ".join(map(str, one["seeds"])) + f" (tuned on {one['tuning_seed']})",
        "DPO's rates": lambda one: ", ".join(f"{name} {opt['rate']:g}" for name, opt in one["optimizers"].items()),
        "masks tried": lambda one: "; ".join(
            f"{name}: η of {_list(opt['masks']['mask_eta'])}, "
            f"head's rate of {_list(opt['masks']['mask_learning_rate'])}"
            for name, opt in one["optimizers"].items()
        ),
        "machine": lambda one: "; ".join(
            [
                f"{one['machine']['processor']}, one thread",
                *(f"{method}: {processor}" for method, processor in one.get(ELSEWHERE, {}).items()),
            ]
        ),
        "versions": lambda one: ", ".join(
            f"{name} {one['machine'][name]}" for name in ("python", "torch", "transformers", "trl")
        ),
        "time": lambda one: f"{one['seconds'] / 60:.0f} min",
    }
    lines += [f"| {name} | {' | '.join(map(show, about.values()))} |" for name, show in shown.items()]
    return [*lines, ""]


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _section(group: Group) -> list[str]:
    name = f"{group.data.capitalize()}, {group.optimizer}"
    return [
        f"## {name}\n",
        f"![{name}: log-probs, cosine and accuracy over steps](img/{image(group.data, group.optimizer)})\n",
        *(f"- {sentence}" for sentence in group.sentences()),
        "",
        *_table(group),
        "",
        *_rates(group),
        "",
        *_masks(group),
        "",
    ]


def _table(group: Group) -> list[str]:
    lines = [
        "Mean over seeds [least, largest]. Changes from the first to the last step, nats; cosine: mean over the",
        "measured steps; accuracies at the end (in brackets: at the start).\n",
        "| style | method | chosen | rejected | margin | label token | cosine | right label | preferred | answers |",
        "|---" * 10 + "|",
    ]
    for style in group.styles:
        for method in group.methods:
            runs = group.runs(method, style)
            cells = [style, method]
            cells += [_spread([run.change(name) for run in runs], "+.2f") for name in ("chosen", "rejected")]
            cells += [
                _spread([run.gain for run in runs], "+.1f"),
                _spread([run.change("label") for run in runs], "+.2f"),
            ]
            cells += [_spread([run.cosine for run in runs], "+.2f")]
            for name in ("label_right", "preferred"):
                start, end = (100 * _mean(runs, lambda run, at=at, name=name: run.rows[at][name]) for at in (0, -1))
                cells += [f"{end:.0f}% ({start:.0f}%)"]
            cells += [_spread([run.change("answers") for run in runs], "+.2f")]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _spread(values: Sequence[float], form: str) -> str:
    if any(map(math.isnan, values)):
        return "–"
    mean = sum(values) / len(values)
    return f"{mean:{form}} [{min(values):{form}}, {max(values):{form}}]"


def _rates(group: Group) -> list[str]:
    lines = [
        "Learning rates, and on the tuning seed the gain of the margin in parts of DPO's:\n",
        "| style | " + " | ".join(group.methods) + " |",
        "|---" * (len(group.methods) + 1) + "|",
    ]
    for style in group.styles:
        cells = [f"{rate:g} ({share:.2f})" for rate, share in (group.tuned(method, style) for method in group.methods)]
        lines.append(f"| {style} | {' | '.join(cells)} |")
    return lines


def _masks(group: Group) -> list[str]:
    tried = group.masks_tried()
    if not tried:
        return []
    lines = [
        f"Masks tried on the tuning seed, in the {tried[0][0]['style']}: changes in nats, and the shares of tokens",
        "that are kept at the end.\n",
        "| η | head's rate | chosen | margin | label tokens | shared tokens | of chosen | of rejected |",
        "|---" * 8 + "|",
    ]
    for row, chosen, gain in tried:
        kept = [f"{100 * row[f'kept_{name}']:.0f}%" for name in ("label", "shared", "chosen", "rejected")]
        cells = [f"{row['mask_eta']:g}", f"{row['mask_learning_rate']:g}", f"{chosen:+.2f}", f"{gain:+.1f}", *kept]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
