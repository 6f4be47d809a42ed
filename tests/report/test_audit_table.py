"""The printed tables: they say what the summary says, fit the console, and never run what they show."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
from rich.console import Console

from gradent.auditing.analysis.distributions import summarize_columns, summarize_modules
from gradent.auditing.analysis.summary import preview
from gradent.record import PAIR_COLUMNS
from gradent.report.terminal.audit import print_summary
from gradent.text import printable

HOSTILE = "[red]a[/red] [/] [link=x]b :smile: \\[c]"


def summary(**given: Any) -> dict[str, Any]:
    values: dict[str, Any] = {name: [1.0, 2.0, 4.0] for name in PAIR_COLUMNS}
    values |= {"case": [1, 2, 0], "cosine": [0.5, -0.5, None], "inner": [0.5, 1.0, 0.0]}
    return {
        **summarize_columns(values),
        "run": None,
        "checkpoints": [],
        "doubt": None,
        "left_out": [],
        "recommendation": None,
        "steps": None,
        "dynamics": None,
        "model": {"checkpoint": "my-model", "step": 40},
        "reference": {"kind": "self", "source": None},
        "data": {"source": "pairs.jsonl", "measured": 3},
        "loss": {"name": "dpo", "beta": 0.1},
        "most_entangled": [
            {"pair": 41, "cosine": 0.5, "case": "both_down", "chosen": "a good " * 20, "rejected": "a bad " * 20}
        ],
        "modules": None,
        "tokens": None,
        **given,
    }


def printed(given: dict[str, Any], width: int = 80) -> str:
    out = io.StringIO()
    print_summary(given, Console(file=out, width=width))  # type: ignore[arg-type]
    return out.getvalue()


def cells(text: str, start: str) -> list[str]:
    """The words of the line that starts with `start`."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(start)]
    return line.split()


def test_what_it_says() -> None:
    text = printed(summary())
    assert cells(text, "model") == ["model", "my-model"]
    assert "pairs.jsonl, 3 pairs" in text
    assert "dpo (beta=0.1)" in text
    assert cells(text, "reference")[1:] == ["the", "model", "itself"]
    cosines = "-0.500 -0.450 -0.250 0.000 +0.250 +0.450 +0.500 0.000 50.0%"
    assert cells(text, "-0.500") == cosines.split()
    assert "1 pairs have no cosine" in text
    assert cells(text, "ideal") == ["ideal", "rises", "falls", "1", "33.3%"]
    assert cells(text, "both down")[-2:] == ["1", "33.3%"]
    assert cells(text, "reversed")[-2:] == ["0", "0.0%"]
    assert cells(text, "41")[:4] == ["41", "+0.500", "both", "down"]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_it_fits_the_console_and_keeps_its_figures(width) -> None:
    names = [f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_B.default" for layer in range(20)]
    modules = summarize_modules({name: [1.0, 2.0, 3.0] for name in names}, 40)
    text = printed(summary(modules=modules), width)
    assert max(map(len, text.splitlines())) <= width
    assert cells(text, "41")[:4] == ["41", "+0.500", "both", "down"]
    shown = [line.split() for line in text.splitlines() if "v_proj.lora_B " in line]
    assert len(shown) == 12
    assert shown[0][-4:] == ["+0.025", "5.0%", "5.0%", "7.5%"]
    assert "8 more modules are in summary.json" in text


@pytest.mark.parametrize(
    ("kind", "shown"),
    [("none", "none"), ("self", "the model itself"), ("adapter_off", "its base without"), ("model", HOSTILE)],
)
def test_references(kind, shown) -> None:
    assert f"reference  {shown}" in printed(summary(reference={"kind": kind, "source": HOSTILE}))


def test_text_is_shown_as_it_is_and_never_as_markup() -> None:
    pair = {"pair": 0, "cosine": 0.1, "case": "ideal", "chosen": HOSTILE, "rejected": HOSTILE}
    given = summary(
        model={"checkpoint": HOSTILE},
        data={"source": HOSTILE, "measured": 3},
        most_entangled=[pair],
        modules=summarize_modules({HOSTILE: [1.0, 1.0, 1.0]}, 1),
    )
    text = printed(given, 160)
    assert text.count(HOSTILE) == 5
    coloured = io.StringIO()
    print_summary(given, Console(file=coloured, width=160, force_terminal=True, color_system="truecolor"))  # type: ignore[arg-type]
    assert "\x1b[31m" not in coloured.getvalue()  # red
    assert "\x1b]8;" not in coloured.getvalue()  # a link


def test_markup_would_have_been_seen() -> None:
    out = io.StringIO()
    Console(file=out, width=160).print("[red]a[/red] :smile:")
    assert "[red]" not in out.getvalue() and ":smile:" not in out.getvalue()


def test_escape_sequences_do_not_reach_the_terminal() -> None:
    escape = "\x1b]0;owned\x07\x1b[2J"
    text = printed(summary(model={"checkpoint": escape}, data={"source": escape, "measured": 3}))
    assert "\x1b" not in text and "\x07" not in text
    assert "\x1b" not in preview(escape, "") and "\x07" not in preview(escape, "")
    assert printable(f"a\n{escape}\u202eb") == r"a§\x1b]0;owned\x07\x1b[2J\u202eb".replace("§", "\n")


TOKENS: dict[str, Any] = {
    "pairs": 20, "undefined": 0, "tokens": 300, "identical_tokens": 120,
    "cosine": {"mean": 0.31, "identical": 0.25, "differing": 0.06},
    "aligned": {"count": 60, "positive": 57, "share": 0.95}, "facing": {"count": 8, "negative": 6, "share": 0.75},
    "least_count": 2,
    "entangling": [
        {"token": f" t{number}", "count": 9, "identical": 1, "sum": 1.5, "mean": 1 / 6} for number in range(7)
    ],
    "disentangling": [{"token": "\n", "count": 2, "identical": 0, "sum": -0.5, "mean": -0.25}],
}  # fmt: skip


def test_tokens() -> None:
    assert "Which tokens" not in printed(summary())
    text = printed(summary(tokens=TOKENS))
    assert cells(text, "from identical") == ["from", "identical", "tokens", "+0.250", "120"]
    assert cells(text, "from differing") == ["from", "differing", "tokens", "+0.060", "180"]
    assert cells(text, "together") == ["together", "+0.310", "300"]
    said = " ".join(text.split())
    assert "20 pairs, spread over all cosines" in said
    assert "Of 60 identical tokens and their matches, 95.0% have a positive inner product" in said
    assert "of 8 differing tokens that face each other, 75.0% a negative one." in said
    assert "that occur 2 times or more" in said
    assert cells(text, "entangling") == ["entangling", "␣t0", "+1.500", "+0.1667", "9"]
    assert cells(text, "disentangling") == ["disentangling", "⏎", "-0.500", "-0.2500", "2"]
    assert [f"␣t{number} " in text for number in range(7)] == [True] * 5 + [False] * 2


def test_tokens_of_which_there_is_little_to_say() -> None:
    nothing = {
        **TOKENS, "undefined": 20, "cosine": dict.fromkeys(TOKENS["cosine"]), "least_count": 1, "entangling": [],
        "aligned": {"count": 0, "positive": 0, "share": None}, "disentangling": [],
    }  # fmt: skip
    text = " ".join(printed(summary(tokens=nothing)).split())
    assert "20 of the pairs have no cosine" in text
    assert "Of 0 identical tokens and their matches, - have" in text
    assert "Tokens by what" not in text
    assert "nan" not in text and "None" not in text
    assert "that occur" not in printed(summary(tokens={**TOKENS, "least_count": 1}))


HOSTILE_TOKENS = ["[red]a[/red]", "[/]", ":smile:", "\\[c]", "\x1b[31mx", "\u202ex", "\ud83d", "", "x" * 99]


@pytest.mark.parametrize("token", HOSTILE_TOKENS)
def test_tokens_are_shown_as_they_are_on_one_line(token) -> None:
    rows = [{**TOKENS["entangling"][0], "token": token}, {**TOKENS["entangling"][0], "token": "next"}]
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system="truecolor")
    print_summary(summary(tokens={**TOKENS, "entangling": rows}), console)  # type: ignore[arg-type]
    text = out.getvalue()
    assert "\x1b[31m" not in text and "\u202e" not in text and "\ud83d" not in text
    (line,) = [line for line in text.splitlines() if "entangling  " in line and "dis" not in line]
    assert line.split()[-1] == "9" and len(line) <= 80
    assert token not in HOSTILE_TOKENS[:4] or token in line


def test_a_loss_that_moves_nothing() -> None:
    values: dict[str, Any] = {name: [1.0] for name in PAIR_COLUMNS}
    text = printed(summary(**summarize_columns({**values, "case": [0], "cosine": [None]})))
    assert "The loss moves none of the pairs" in text
    assert "1 pairs have no cosine" in text
    assert "nan" not in text and "None" not in text


def test_weights_without_a_ratio_are_told() -> None:
    given = copy.deepcopy(summary())
    given["weights"] |= {"not_positive": 2, "bound_pairs": 0, "ratio": None}
    text = printed(given)
    assert "2 pairs have a zero or negative weight" in text
    assert "Condition 2" not in text


@pytest.mark.parametrize(
    ("text", "other", "shown"),
    [
        ("short", "other", "short"),
        ("", "other", ""),
        ("two\n lines\tand  spaces", "", "two lines and spaces"),
        ("x" * 100, "y", "x" * 39 + "…"),
        ("a beginning of some length, then this", "a beginning of some length, then that", "…gth, then this"),
        ("abcdefghijklmnopqrstuvwxyz!", "abcdefghijklmnopqrstuvwxyz", "…opqrstuvwxyz!"),
        ("abcdefghijklmnopqrstuvwxyz", "abcdefghijklmnopqrstuvwxyz!", "…opqrstuvwxyz"),
    ],
)
def test_previews(text, other, shown) -> None:
    assert preview(text, other, 40) == shown


def test_a_run_is_shown_checkpoint_by_checkpoint() -> None:
    given = summary(run={"directory": "my-run"}, recommendation={"text": "Try another loss."})
    rows = [{"name": f"checkpoint-{step}", "step": step, "pairs": 3, **given} for step in (20, 40)]
    rows[0]["logps"] = {**given["logps"], "chosen_logp": -12.5}
    left = [{"checkpoint": "checkpoint-30", "step": 30, "reason": "half of it\x1b[2J is missing"}]
    text = printed({**given, "checkpoints": rows, "left_out": left}, width=120)
    assert "my-run" in text and "my-model" in text and "at step 40" in text
    assert cells(text, "20")[:4] == ["20", "3", "0.000", "33.3%"] and "-12.5" in cells(text, "20")
    assert "left out: checkpoint-30: half of it" in text and "\x1b" not in text
    assert text.rstrip().endswith("Try another loss.")
