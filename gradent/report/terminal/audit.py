"""The tables that an audit prints. Reads a summary only; text of pairs is shown as it is, never as rich markup."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gradent.record import Summary
from gradent.report.audit.sections.answer import describe_finding
from gradent.report.audit.sections.settings import describe_loss, describe_reference
from gradent.report.page.numbers import fixed, percent
from gradent.report.page.unit import StepUnit
from gradent.report.terminal.tables import new_table
from gradent.text import printable, visible

__all__ = ["print_summary"]

_ARROWS = {
    "ideal": ("rises", "falls"), "both_down": ("falls", "falls"), "both_up": ("rises", "rises"),
    "reversed": ("falls", "rises"), "inactive": ("-", "-"),
}  # fmt: skip
_MODULES_SHOWN = 12
_TOKENS_SHOWN = 5
_TOKEN_WIDTH = 24  # characters of a token
_MODULE_FIGURES = 42  # columns of the module table that are not the module's name


def print_summary(summary: Summary, console: Console) -> None:
    """Print the tables of one audit."""
    for part in _render(summary, console.width):
        console.print(part)


def _render(summary: Summary, width: int) -> Iterator[RenderableType]:
    model, loss, data, run = summary["model"], summary["loss"], summary["data"], summary["run"]
    facts = {
        **({"model": model["checkpoint"]} if run is None else {"run": run["directory"]}),
        "data": f"{data['source']}, {data['measured']} pairs",
        "loss": describe_loss(loss),
        "reference": describe_reference(summary["reference"]),
    }
    yield Text("")
    for name, fact in facts.items():
        yield Text(f"{name:<9}  {printable(fact)}", "bold", overflow="fold")
    if summary["doubt"]:
        yield Text(f"\n{printable(summary['doubt'])}", "bold red")
    if run is not None:
        yield Text("\nCheckpoint by checkpoint, over the same pairs: median cosine, cases, mean log-probs in nats")
        yield _checkpoint_table(summary["checkpoints"])
    for target in summary["left_out"]:
        yield Text(f"left out: {printable(target['checkpoint'])}: {printable(target['reason'])}", "red")
    where = "" if run is None else printable(f" at step {model['step']} ({model['checkpoint']})")
    yield Text(f"\nCosine of the gradients of log π(chosen) and log π(rejected){where}")
    yield _cosine_table(summary["cosine"])
    yield Text(f"\nWhat one small gradient step of {loss['name']} on a pair does to that pair (first order)")
    yield _case_table(summary["cases"])
    lines, norms = _weight_lines(summary["weights"]), summary["norms"]
    lines.append(f"Mean ‖g_w‖ {_number(norms['chosen_mean'])}, mean ‖g_l‖ {_number(norms['rejected_mean'])}.")
    yield Padding(Text("\n".join(lines)), (0, 0, 0, 1), expand=False)
    if summary["most_entangled"]:
        yield Text("\nMost entangled pairs (rows counted from 0), where their responses part")
        yield _pair_table(summary["most_entangled"])
    if summary["modules"]:
        yield Text("\nWhere the cosine comes from: parts of it and of the squared norms, means over the pairs")
        yield _module_table(summary["modules"], width)
    if summary["tokens"]:
        yield from _render_tokens(summary["tokens"])
    if summary["steps"]:
        yield Text(f"\n{_describe_steps(summary['steps'], StepUnit.of(summary['settings']))}")
    yield Text(f"\n{printable(describe_finding(summary))}.", "bold")
    if summary["recommendation"]:
        yield Text(printable(summary["recommendation"]["text"]), "bold")


def _describe_steps(steps: dict[str, Any], unit: StepUnit) -> str:
    """A line on the step on the sample, and one on how much of the run first order explains."""
    last = steps["sample"][-1]
    parts = {
        side: ", ".join(f"{part} {unit.show(last[f'{side}_{part}'])}" for part in ("own", "partner", "others"))
        for side in ("chosen", "rejected")
    }
    lines = [
        f"A step on the whole sample at step {last['step']:,} ({unit}): chosen "
        f"{parts['chosen']}; rejected {parts['rejected']}."
    ]
    explained = [row["explained"] for row in steps["intervals"] if row["explained"] is not None]
    if explained:
        ends = dict.fromkeys(map(percent, (min(explained), max(explained))))
        lines.append(
            f"Between checkpoints, ⟨∇ log π, Δθ⟩ explains {' to '.join(ends)} of the squared changes of log-probs."
        )
    return "\n".join(lines)


def _checkpoint_table(checkpoints: Sequence[dict[str, Any]]) -> Table:
    table = new_table("step", "pairs", "cosine", "ideal", "both down", "both up", "reversed", "chosen", "rejected")
    for checkpoint in checkpoints:
        cases = [percent(checkpoint["cases"][name]["share"]) for name in ("ideal", "both_down", "both_up", "reversed")]
        logps = [checkpoint["logps"][name] for name in ("chosen_logp", "rejected_logp")]
        cases += ["-" if logp is None else f"{logp:.1f}" for logp in logps]
        table.add_row(str(checkpoint["step"]), str(checkpoint["pairs"]), fixed(checkpoint["cosine"]["p50"]), *cases)
    return table


def _cosine_table(cosine: dict[str, Any]) -> Table:
    names = {"min": "min", "p5": "5%", "p25": "25%", "p50": "median", "p75": "75%", "p95": "95%", "max": "max"}
    table = new_table(*names.values(), "mean", "positive")
    table.add_row(*(fixed(cosine[name]) for name in names), fixed(cosine["mean"]), percent(cosine["share_positive"]))
    if cosine["undefined"]:
        table.caption = f"{cosine['undefined']} pairs have no cosine: one of their gradients is exactly zero."
    return table


def _case_table(cases: dict[str, dict[str, Any]]) -> Table:
    table = new_table("case", "chosen", "rejected", "pairs", "share", text=3)
    for name, (chosen, rejected) in _ARROWS.items():
        counted = cases[name]
        table.add_row(name.replace("_", " "), chosen, rejected, str(counted["count"]), percent(counted["share"]))
    return table


def _weight_lines(weights: dict[str, Any]) -> list[str]:
    if not weights["active"]:
        return ["The loss moves none of the pairs: all its weights d_w and d_l are zero."]
    lines = [
        f"Of {weights['active']} pairs that the loss moves, chosen rises in {percent(weights['share_chosen_rises'])} "
        f"and rejected falls in {percent(weights['share_rejected_falls'])}.",
        f"Median d_w {_number(weights['d_w'])}, d_l {_number(weights['d_l'])}, d_w/d_l {_number(weights['ratio'])}.",
    ]
    if weights["bound_pairs"]:
        lines.append(
            f"Condition 2, medians over the {weights['bound_pairs']} pairs with positive inner product: chosen rises "
            f"where d_w/d_l >= {_number(weights['needs_at_least'])} and rejected falls where d_w/d_l <= "
            f"{_number(weights['needs_at_most'])}; d_w/d_l is {_number(weights['bound_ratio'])}. On each pair "
            f"d_w/d_l = ‖g_l‖/‖g_w‖ gives both (median {_number(weights['balanced_ratio'])})."
        )
    if weights["not_positive"]:
        lines.append(f"{weights['not_positive']} pairs have a zero or negative weight: no d_w/d_l is taken there.")
    return lines


def _pair_table(pairs: list[dict[str, Any]]) -> Table:
    table = new_table("row", "cosine", "case", "")
    table.add_column("")
    for pair in pairs:
        chosen, rejected = (Text(pair[side], no_wrap=True, overflow="ellipsis") for side in ("chosen", "rejected"))
        table.add_row(str(pair["pair"]), fixed(pair["cosine"]), pair["case"].replace("_", " "), "chosen", chosen)
        table.add_row("", "", "", "rejected", rejected)
    return table


def _module_table(modules: dict[str, dict[str, float]], width: int) -> Table:
    ranked = sorted(modules.items(), key=lambda item: -abs(item[1]["cosine_part"]))
    total = sum(part["cosine_part"] for part in modules.values())
    table = new_table("module", "cosine", "share", "‖g_w‖²", "‖g_l‖²", text=1)
    room = max(20, width - _MODULE_FIGURES)
    for full, part in ranked[:_MODULES_SHOWN]:
        name = full.removesuffix(".default")  # what PEFT calls the only adapter
        share = percent(part["cosine_part"] / total) if total else "-"
        text = Text(name if len(name) <= room else "…" + name[1 - room :])  # its end tells more than its beginning
        shares = share, percent(part["chosen_share"]), percent(part["rejected_share"])
        table.add_row(text, fixed(part["cosine_part"]), *shares)
    if len(ranked) > _MODULES_SHOWN:
        table.caption = f"{len(ranked) - _MODULES_SHOWN} more modules are in summary.json."
    return table


def _render_tokens(tokens: dict[str, Any]) -> Iterator[RenderableType]:
    yield Text(f"\nWhich tokens entangle: {tokens['pairs']} pairs, spread over all cosines")
    table = new_table("", "mean cosine", "tokens", text=1)
    counts = {"identical": tokens["identical_tokens"], "differing": tokens["tokens"] - tokens["identical_tokens"]}
    for kind, count in counts.items():
        table.add_row(f"from {kind} tokens", fixed(tokens["cosine"][kind]), str(count))
    table.add_row("together", fixed(tokens["cosine"]["mean"]), str(tokens["tokens"]))
    yield table
    aligned, facing = tokens["aligned"], tokens["facing"]
    lines = [
        f"Of {aligned['count']} identical tokens and their matches, {percent(aligned['share'])} have a positive inner "
        f"product; of {facing['count']} differing tokens that face each other, {percent(facing['share'])} a negative "
        "one."
    ]
    if tokens["undefined"]:
        lines.append(f"{tokens['undefined']} of the pairs have no cosine and no part in these means.")
    yield Padding(Text("\n".join(lines)), (0, 0, 0, 1), expand=False)
    if tokens["entangling"] or tokens["disentangling"]:
        least = tokens["least_count"]
        often = f" (those that occur {least} times or more)" if least > 1 else ""
        yield Text(f"\nTokens by what they add to the cosines{often}")
        table = new_table("", "token", "sum", "mean", "times", text=2)
        for kind in ("entangling", "disentangling"):
            for number, row in enumerate(tokens[kind][:_TOKENS_SHOWN]):
                names = "" if number else kind, Text(visible(row["token"], _TOKEN_WIDTH))
                table.add_row(*names, fixed(row["sum"]), f"{row['mean']:+.4f}", str(row["count"]))
        yield table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
