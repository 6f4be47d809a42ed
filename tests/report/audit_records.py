"""Audits that never ran: records from made-up gradients, of any size, whose numbers fit together as real ones do."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradent.auditing.analysis.distributions import summarize_columns
from gradent.auditing.analysis.tokens import summarize_tokens
from gradent.record import (
    CASE_NAMES,
    PAIR_COLUMNS,
    STEP_COLUMNS,
    write_modules,
    write_pairs,
    write_sample,
    write_steps,
    write_summary,
    write_tokens,
)

HOSTILE = [
    "<script>document.title='ran'</script>", "</script><script>document.title='ran'</script>",
    "<img src=x onerror=\"document.title='ran'\">", "\"' onmouseover='document.title=1'", "\u202eabc\u2066",
    "a\nb\n", "\x00", "{{7*7}}", "$x$", "<b>", "&lt;script&gt;", "%{y}", "\ud83d", "\x1b[2J", "屋", "</td></table>",
]  # fmt: skip
EVIL = "".join(HOSTILE)

Blocks = list[dict[str, list[Any]]]

LAYERS = 4
KINDS = ("self_attn.q_proj", "mlp.up_proj")
TOKENS = [" the", " film", " was", " good", ".", " bad", "\n"]


def write_audit(
    place: Path,
    count: int = 4,
    pairs: int = 24,
    *,
    with_modules: bool = True,
    with_sample: bool = True,
    with_steps: bool = False,
    token_pairs: int = 2,
    hostile: str = "",
    seed: int = 0,
    drop: float = 8.0,
    **changes: Any,
) -> dict[str, Any]:
    """Write an audit's directory.

    Args:
        place: where to.
        count: how many checkpoints; with 1, it is a single model and no run.
        pairs: how many of the data.
        with_modules: whether `modules.parquet` is there.
        with_sample: whether `sample.parquet` is there.
        with_steps: whether `steps.parquet` is there, and what the summary says of it.
        token_pairs: pairs whose tokens are there.
        hostile: appended to every text; tokens are then those of `HOSTILE`.
        seed: of the made-up gradients.
        drop: how far chosen falls over the run.
        **changes: keys of the summary to replace.

    Returns:
        The summary as written.
    """
    place.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    evil = hostile
    steps = [0] if count == 1 else [100 * number for number in range(1, count + 1)]
    names = [f"checkpoint-{step}{evil}" for step in steps]
    blocks = pair_blocks(draw, steps, names, pairs, drop)
    columns = {name: [value for block in blocks for value in block[name]] for name in PAIR_COLUMNS}
    write_pairs(place / "pairs.parquet", columns)
    texts = sample_columns(draw, blocks[-1], evil)
    if with_sample:
        write_sample(place / "sample.parquet", texts)
    if with_steps:
        write_steps(place / "steps.parquet", step_columns(draw, blocks))
    if with_modules:
        write_modules(place / "modules.parquet", module_columns(draw, steps, names, blocks, evil))
    measured = token_columns(draw, blocks[-1], token_pairs, bool(evil)) if token_pairs else None
    if measured:
        write_tokens(place / "tokens.parquet", measured)
    summary = make_summary(blocks, steps, names, texts, evil)
    if not with_steps:
        summary["steps"] = None
    summary["tokens"] = summarize_tokens(measured, blocks[-1]) if measured else None
    return dict(write_summary(place / "summary.json", {**summary, **changes}))


def pair_blocks(
    draw: np.random.Generator, steps: Sequence[int], names: Sequence[str], pairs: int, drop: float
) -> list[dict[str, list[Any]]]:
    """The columns of `pairs.parquet`, checkpoint by checkpoint: log-probs fall, cosines grow."""
    base, start = draw.normal(0.3, 0.3, pairs), draw.normal(-60, 12, (2, pairs))
    lengths = draw.integers(5, 60, (2, pairs))
    blocks = []
    for number, (step, name) in enumerate(zip(steps, names, strict=True)):
        done = number / max(1, len(steps) - 1)
        cosine = np.clip(base + 0.5 * done + 0.05 * draw.normal(size=pairs), -0.99, 0.99)
        chosen_sq, rejected_sq = (draw.lognormal(3, 0.5, pairs) for _ in range(2))
        inner = cosine * np.sqrt(chosen_sq * rejected_sq)
        d_w = d_l = np.full(pairs, 0.05)
        chosen, rejected = d_w * chosen_sq - d_l * inner, d_w * inner - d_l * rejected_sq
        case = np.where(chosen >= 0, np.where(rejected <= 0, 1, 3), np.where(rejected <= 0, 2, 4))
        logps = start - np.array([[drop], [3 * drop]]) * done + draw.normal(0, 0.5, (2, pairs))
        blocks.append({
            "checkpoint": [name] * pairs, "step": [step] * pairs, "pair": [3 * row for row in range(pairs)],
            "chosen_sq": chosen_sq.tolist(), "rejected_sq": rejected_sq.tolist(), "inner": inner.tolist(),
            "cosine": [None if row == pairs - 1 and pairs > 5 else value for row, value in enumerate(cosine.tolist())],
            "chosen_logp": logps[0].tolist(), "rejected_logp": logps[1].tolist(),
            "ref_chosen_logp": start[0].tolist(), "ref_rejected_logp": start[1].tolist(),
            "chosen_len": lengths[0].tolist(), "rejected_len": lengths[1].tolist(), "d_w": d_w.tolist(),
            "d_l": d_l.tolist(), "chosen_change": chosen.tolist(), "rejected_change": rejected.tolist(),
            "case": case.tolist(),
        })  # fmt: skip
    return blocks


def sample_columns(draw: np.random.Generator, block: dict[str, list[Any]], evil: str) -> dict[str, list[Any]]:
    """The columns of `sample.parquet`."""
    count = len(block["pair"])
    return {
        "pair": block["pair"],
        "where": [f"pairs.jsonl:{row + 1}{evil}" for row in block["pair"]],
        "prompt": [f"What was the film of row {row} like?\nTell me briefly.{evil}" for row in block["pair"]],
        "chosen": [f" It was a quiet joy ({row}).{evil}" for row in block["pair"]],
        "rejected": [f" It was a loud bore ({row}).{evil}" for row in block["pair"]],
        "prompt_len": draw.integers(4, 90, count).tolist(),
        "chosen_len": block["chosen_len"],
        "rejected_len": block["rejected_len"],
        "shared_prefix": draw.integers(0, 5, count).tolist(),
        "shared_suffix": draw.integers(0, 3, count).tolist(),
        "edit_distance": draw.integers(1, 40, count).tolist(),
        "truncated": [int(row == 0) for row in range(count)],
    }


def module_columns(
    draw: np.random.Generator, steps: Sequence[int], names: Sequence[str], blocks: Blocks, evil: str
) -> dict[str, list[Any]]:
    """The columns of `modules.parquet`: parts that add up to the mean cosine, shares that add up to 1."""
    modules = [f"model.layers.{layer}.{kind}{evil}" for layer in range(LAYERS) for kind in KINDS]
    modules.append(f"model.embed_tokens{evil}")
    columns: dict[str, list[Any]] = {
        name: [] for name in ("checkpoint", "step", "module", "pairs", "cosine_part", "chosen_share", "rejected_share")
    }
    for step, name, block in zip(steps, names, blocks, strict=True):
        there = [value for value in block["cosine"] if value is not None]
        parts = draw.normal(1, 1.2, len(modules))
        shares = draw.dirichlet(np.ones(len(modules)), 2)
        for number, module in enumerate(modules):
            row = {
                "checkpoint": name, "step": step, "module": module, "pairs": len(there),
                "cosine_part": float(np.mean(there) * parts[number] / parts.sum()),
                "chosen_share": float(shares[0][number]), "rejected_share": float(shares[1][number]),
            }  # fmt: skip
            for key, value in row.items():
                columns[key].append(value)
    return columns


def step_columns(draw: np.random.Generator, blocks: Blocks) -> dict[str, list[Any]]:
    """The columns of `steps.parquet`; nothing arrived at the first checkpoint."""
    columns: dict[str, list[Any]] = {name: [] for name in STEP_COLUMNS}
    for place, block in enumerate(blocks):
        for name, values in columns.items():
            if name in block:
                values.extend(block[name])
            else:
                is_late = name.endswith(("arrived", "realised"))
                made = draw.normal(size=len(block["pair"])).tolist()
                values.extend([None] * len(made) if is_late and not place else made)
    return columns


def steps_of(
    draw: np.random.Generator, blocks: Blocks, steps: Sequence[int], names: Sequence[str], evil: str
) -> dict[str, Any]:
    """The summary's `steps`."""
    parts = [f"{side}_{part}" for side in ("chosen", "rejected") for part in ("own", "partner", "others")]
    modules = [f"model.layers.{layer}.{kind}{evil}" for layer in range(LAYERS) for kind in KINDS]
    return {
        "sample": [
            {
                "checkpoint": name, "step": step, "pairs": len(block["pair"]),
                **{part: float(draw.normal()) for part in parts},
                "cases": dict.fromkeys(CASE_NAMES.values(), 0.2), "chosen_differs": 0.3, "rejected_differs": 0.05,
            }
            for name, step, block in zip(names, steps, blocks, strict=True)
        ],
        "intervals": [
            {
                "from": begin, "to": end, "pairs": len(blocks[0]["pair"]), "chosen_realised": -2.0,
                "rejected_realised": -6.0, "chosen_first_order": -1.9, "rejected_first_order": -5.5,
                "explained": 0.96 if end == steps[-1] else 0.4, "explained_begin": 0.8, "explained_end": -1.0,
                "modules": {module: [float(draw.normal()), float(draw.normal())] for module in modules},
            }
            for begin, end in itertools.pairwise(steps)
        ],
        "what_if": {"is_exact": False, "error": 0.012},
        "pushed": [
            {
                "pair": pair, "side": side, "own": 1.0, "partner": -0.5, "others": -3.0,
                "by": [{"pair": blocks[-1]["pair"][0], "side": "rejected", "moved": -2.5}],
            }
            for pair, side in zip(blocks[-1]["pair"][1:4], ("chosen", "rejected", "chosen"), strict=False)
        ],
    }  # fmt: skip


def token_columns(
    draw: np.random.Generator, block: dict[str, list[Any]], pairs: int, hostile: bool
) -> dict[str, list[Any]]:
    """The columns of `tokens.parquet` for a checkpoint's first pairs: entanglements add up to the inner product."""
    texts = HOSTILE if hostile else TOKENS
    rows = []
    for place in range(pairs):
        for side in ("chosen", "rejected"):
            parts = draw.normal(1, 1, len(texts))
            for position, text in enumerate(texts):
                identical = position % 3 != 0
                inner = float(draw.normal())
                rows.append({
                    "checkpoint": block["checkpoint"][place], "step": block["step"][place],
                    "pair": block["pair"][place], "side": side, "position": position, "token_id": position,
                    "token": text, "identical": identical, "sq": float(draw.lognormal()),
                    "entanglement": float(block["inner"][place] * parts[position] / parts.sum()),
                    "aligned_inner": inner if identical else None, "facing_inner": None if identical else inner,
                    "own_inner": float(draw.normal()),
                })  # fmt: skip
    return {name: [row[name] for row in rows] for name in rows[0]}


def make_summary(
    blocks: Blocks,
    steps: Sequence[int],
    names: Sequence[str],
    texts: dict[str, list[Any]],
    evil: str,
) -> dict[str, Any]:
    """What `write_summary` takes."""
    last, run = blocks[-1], len(blocks) > 1
    shares = [summarize_columns(block)["cases"]["ideal"]["share"] for block in blocks]
    top = sorted(
        (row for row, each in enumerate(last["cosine"]) if each is not None), key=lambda row: -last["cosine"][row]
    )
    return {
        "complete": True,
        "doubt": None,
        "run": {
            "directory": f"my-dpo-run{evil}", "kind": "full", "base": f"my-sft-model{evil}", "found": list(steps),
            "asked": list(steps),
        } if run else None,
        "left_out": [],
        "checkpoints": [
            {"name": name, "step": step, "pairs": len(block["pair"]), **summarize_columns(block)}
            for name, step, block in zip(names, steps, blocks, strict=True)
        ],
        "history": history(steps) if run else None,
        "dynamics": dynamics(blocks, steps) if run else None,
        "steps": steps_of(np.random.default_rng(2), blocks, steps, names, evil),
        "what_if": what_if(blocks, steps, shares, evil),
        "recommendation": {
            "text": f"With DPO (β=0.1), case 1 holds for {shares[-1]:.0%} of {len(last['pair'])} pairs.{evil}",
            "run_ideal": shares[-1], "best": f"CPO (λ=0.5){evil}", "best_ideal": 0.6, "design_ideal": 1.0,
        },
        "properties": properties(evil),
        "model": {
            "checkpoint": names[-1], "base": f"my-sft-model{evil}", "adapter": None, "step": steps[-1],
            "trainable_parameters": 1_234_567, "parameters": 1_234_567, "coverage": 1.0, "dtype": "float32",
            "device": "cpu",
        },
        "reference": {"kind": "model", "source": f"my-sft-model{evil}"},
        "loss": {"name": "dpo", "beta": 0.1},
        "data": {
            "source": f"pairs.jsonl{evil}", "rows": 3 * len(last["pair"]), "measured": len(last["pair"]),
            "skipped": [{"row": 1, "where": f"pairs.jsonl:2{evil}", "reason": f"chosen equals rejected{evil}"}],
            "truncated_responses": 1,
        },
        "settings": {"max_length": 128, "max_pairs": None, "seed": 0, "batch_size": 8, "dtype": "float32"},
        **summarize_columns(last),
        "most_entangled": [
            {"pair": last["pair"][row], "where": texts["where"][row], "cosine": last["cosine"][row],
             "case": CASE_NAMES[last["case"][row]], "chosen": texts["chosen"][row], "rejected": texts["rejected"][row]}
            for row in top[:5]
        ],
        "modules": None,
        "tokens": None,
        "notes": [f"a note{evil}"],
        "seconds": 12.0,
    }  # fmt: skip


def history(steps: Sequence[int]) -> dict[str, Any]:
    """A trainer's log, noisier than what was measured."""
    draw = np.random.default_rng(1)
    logged = list(range(10, steps[-1] + 1, 10))
    return {
        "source": "trainer_state.json",
        "curves": {
            f"logps/{side}": [[step, -60 - slope * step / steps[-1] + float(draw.normal())] for step in logged]
            for side, slope in (("chosen", 8.0), ("rejected", 24.0))
        } | {"rewards/margins": [[step, 0.01 * step] for step in logged]},
    }  # fmt: skip


def dynamics(blocks: Blocks, steps: Sequence[int]) -> dict[str, Any]:
    """Changes as they are, predictions a little off."""
    means = {side: [float(np.mean(block[f"{side}_logp"])) for block in blocks] for side in ("chosen", "rejected")}

    pairs = len(blocks[0]["pair"])

    def interval(first: int, last: int) -> dict[str, Any]:
        moved = {side: means[side][last] - means[side][first] for side in means}
        return {
            "from": steps[first], "to": steps[last], "pairs": len(blocks[0]["pair"]),
            **{f"{side}_change": value for side, value in moved.items()},
            **{f"{side}_predicted": 0.8 * value for side, value in moved.items()},
            "step_size": 0.013, "explained": 0.42, "chosen_sign": 0.81, "rejected_sign": 0.93,
        }  # fmt: skip

    return {
        "onset": {"measured": steps[1], "logged": 10, "logged_keys": ["logps/chosen", "logps/rejected"]},
        "start": {"chosen_logp": -60.0, "rejected_logp": -60.0},
        "curve": [{"step": 0, "pairs": pairs, **{f"{side}{error}": 0.0 for side in means for error in ("", "_error")}}]
        + [
            {
                "step": step,
                "pairs": pairs,
                **{side: means[side][place] + 60 for side in means},
                **{f"{side}_error": 0.5 for side in means},
            }
            for place, step in enumerate(steps)
        ],
        "fall": None
        if len(steps) < 2
        else {
            "from": steps[1],
            "to": steps[-1],
            "pairs": pairs,
            "both": 0.75,
            **{side: means[side][-1] - means[side][1] for side in means},
            **{f"{side}_error": 0.5 for side in means},
        },
        "intervals": [interval(number, number + 1) for number in range(len(steps) - 1)],
        "whole": interval(0, len(steps) - 1),
        "cases_realised": {"ideal": 0.1, "both_down": 0.8, "both_up": 0.05, "reversed": 0.05, "inactive": 0.0},
    }


def what_if(blocks: Blocks, steps: Sequence[int], shares: Sequence[float], evil: str) -> list[dict[str, Any]]:
    """Rows of all groups; one cannot be judged."""
    names = ["DPO (β=0.1)", "R-DPO (β=0.1, α=0.2)", "SimPO (β=2.5, γ=1.375)", "IPO (β=0.1)", "RRHF (λ=1)"]
    names += ["SLiC-HF (λ=0.1, δ=1)", "CPO (β=0.1, λ=0.5)", "DPOP (β=0.1, λ=50)", "KTO (β=0.1)", "SPPO (β=0.001)"]
    judged = [("run", names[0]), *(("paper", name) for name in names)]
    judged += [("sweep", f"DPO (β={beta})") for beta in (0.01, 0.05, 0.3, 0.5)]
    designs = {"Pairwise normalization": "pairwise_normalized", "Token masking": "token_masked"}
    judged += [("design", label) for label in designs]
    rows = []
    for number, (group, label) in enumerate(judged):
        ideal = 1.0 if group == "design" else shares[-1] if group == "run" else 0.2 + 0.04 * number
        rest = 1 - ideal
        rows.append({
            "loss": designs.get(label, label.partition(" ")[0].lower()) + evil, "label": label + evil, "group": group,
            "hyperparameters": {"beta": 0.1}, "varied": "beta" if group == "sweep" else None, "reason": None,
            "pairs": len(blocks[-1]["pair"]),
            "cases": {"ideal": ideal, "both_down": 0.6 * rest, "both_up": 0.3 * rest, "reversed": 0.1 * rest,
                      "inactive": 0.0},
            "ratio": 1.0 + 0.1 * number, "needs_at_least": 0.7, "needs_at_most": 1.4, "within": 0.4,
            "share_chosen_rises": 0.5, "share_rejected_falls": 0.6,
            "ideal_by_step": [[step, share] for step, share in zip(steps, shares, strict=True)],
        })  # fmt: skip
    missing = dict.fromkeys(("cases", "ratio", "needs_at_least", "needs_at_most", "within"))
    rows[9] |= {**missing, "reason": f"It needs a reference's log-probs, and none were measured.{evil}"}
    return rows


def properties(evil: str) -> list[dict[str, Any]]:
    """Three properties, one of no relation."""
    names = [("shared_prefix", "shared beginning", "tokens"), ("edit_distance", "edit distance", "tokens"),
             ("logp_gap", "log-prob gap", "nats")]  # fmt: skip
    return [
        {
            "property": name, "label": label + evil, "unit": unit, "spearman": rho, "low": rho - 0.2, "high": rho + 0.2,
            "pairs": 24,
            "groups": [
                {"low": 4.0 * quarter, "high": 4.0 * quarter + 4, "pairs": 6, "cosine": 0.2 * quarter, "ideal": 0.3}
                for quarter in range(4)
            ],
        }
        for (name, label, unit), rho in zip(names, (0.61, -0.4, 0.03), strict=True)
    ]  # fmt: skip


def without_numbers(summary: dict[str, Any]) -> dict[str, Any]:
    """The changes that make every number null which may be."""
    blank = copy.deepcopy({key: summary[key] for key in ("dynamics", "what_if", "properties", "checkpoints")})

    def empty(value: Any, kept: frozenset[str]) -> Any:
        if isinstance(value, dict):
            return {key: each if key in kept else empty(each, kept) for key, each in value.items()}
        if isinstance(value, list):
            return [empty(each, kept) for each in value]
        return None if isinstance(value, int | float) and not isinstance(value, bool) else value

    changes = {key: empty(value, frozenset({"from", "to"})) for key, value in blank.items()}
    for row in changes["what_if"]:
        row |= {"cases": None, "reason": "no reason given", "ideal_by_step": []}
    nothing = {"cosine": dict.fromkeys(summary["cosine"]), "logps": dict.fromkeys(summary["logps"])}
    return {**changes, **nothing, "history": {"source": "trainer_state.json", "curves": {"logps/chosen": [[10, None]]}},
            "recommendation": None, "most_entangled": []}  # fmt: skip
