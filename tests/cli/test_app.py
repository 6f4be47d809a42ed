"""The command line: what a user gets wrong ends in one readable block and exit code 2, never in a traceback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from gradent.auditing.measuring import batches as scan
from gradent.cli.app import app
from gradent.errors import GradentError
from gradent.loading import prepare
from gradent.record import read_pairs, read_summary
from gradent.version import __version__
from tests.auditing.made import FORMATS, KINDS, PAIRS, save_lora, write_jsonl

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def here(local_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`my-model` and `pairs.jsonl` in the current directory, a console of 100 columns, other libraries let be."""
    monkeypatch.chdir(local_model.parent)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("gradent.cli.console._quieten_others", lambda: None)
    write_jsonl(local_model.parent / "pairs.jsonl", PAIRS)
    return local_model.parent


def gradent(*arguments: str) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def audit(*arguments: str, model: str = "my-model", data: str = "pairs.jsonl") -> Result:
    return gradent("audit", model, "--data", data, "--out", "out", "--no-report", *arguments)


def records() -> list[str]:
    """Names of what an audit wrote, but for its journal."""
    return sorted(path.name for path in Path("out").glob("*") if path.name != "journal")


def assert_refused(result: Result, message: str) -> None:
    """Exit code 2, one block on stderr that holds the message, nothing that looks like a bug."""
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert re.search(r"^error \(\w+Error\)\n  ", result.stderr, flags=re.MULTILINE)
    assert re.search(message, result.stderr), result.stderr
    assert not records()


def rows(*bad: Any) -> Callable[[Path], None]:
    """A file whose line 3 and on are these rows."""
    return lambda here: write_jsonl(here / "pairs.jsonl", [PAIRS[0], PAIRS[1], *bad]) and None


def encoder(here: Path) -> None:
    BertForMaskedLM(BertConfig(vocab_size=259, initializer_range=0.5, **TINY)).save_pretrained(here / "my-model")


def mismatched(here: Path) -> None:
    LlamaForCausalLM(LlamaConfig(vocab_size=100, **TINY)).save_pretrained(here / "my-model")


def not_finite(here: Path) -> None:
    """A model with a nan for a letter that line 6 alone holds."""
    model = AutoModelForCausalLM.from_pretrained(here / "my-model")
    letter = json.loads((here / "my-model" / "tokenizer.json").read_text())["model"]["vocab"]["Z"]
    with torch.no_grad():
        model.get_input_embeddings().weight[letter] = torch.nan
    model.save_pretrained(here / "my-model")
    write_jsonl(here / "pairs.jsonl", [PAIRS[2], PAIRS[4], *3 * [PAIRS[3]], {**PAIRS[5], "rejected": "Zz"}])


def no_weights(here: Path) -> None:
    (here / "my-model" / "model.safetensors").unlink()


BAD: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "no completion": (rows({**PAIRS[0], "chosen": None}), [], "pairs.jsonl:3: chosen is null; accepted"),
    "missing keys": (rows({"prompt": "p", "answer": "a"}), [], "pairs.jsonl:3: missing 'chosen' and 'rejected'"),
    "further bad rows": (
        rows({}, [], "text"),
        [],
        "pairs.jsonl:3: (.|\n)*pairs.jsonl:4, pairs.jsonl:5.(.|\n)*--skip-bad",
    ),
    "no JSON": (rows('{"prompt": "p"'), [], "pairs.jsonl:3: not valid JSON"),
    "not finite": (not_finite, [], "pairs.jsonl:6: non-finite.*(dtype|checkpoint)"),
    "an encoder": (encoder, [], "my-model: .*not causal.*(encoder|decoder)"),
    "mismatched vocabulary": (mismatched, [], "my-model: the tokenizer's vocabulary does not match.*Use the tokenizer"),
    "no weights": (no_weights, [], "my-model: no weights in it"),
    "no such data": (lambda here: (here / "pairs.jsonl").unlink(), [], "pairs.jsonl: there is no such file.*Accepted"),
    "no such reference": (lambda here: None, ["--reference", "./gone"], "./gone: there is no such directory"),
    "no such adapter": (lambda here: None, ["--adapter", "my-model"], "my-model: not a PEFT adapter.*--adapter"),
    "no such split": (lambda here: None, ["--split", "test"], "a file has no splits.*--split"),
    "no such loss": (lambda here: None, ["--loss", "dop"], r"--loss dop: unknown loss; did you mean 'dpo'\?"),
    "no such hyperparameter": (lambda here: None, ["--gamma", "1"], "dpo has no hyperparameter 'gamma'.*beta"),
    "a bad hyperparameter": (lambda here: None, ["--beta", "-1"], "beta is -1.0; accepted: a finite number > 0"),
    "no such dtype": (lambda here: None, ["--dtype", "int8"], "dtype is 'int8'; accepted: float32.*--dtype"),
    "no such device": (lambda here: None, ["--device", "cuda:99"], "device 'cuda:99' cannot.*--device cpu"),
    "no such engine": (lambda here: None, ["--engine", "fast"], "engine is 'fast'.*--engine"),
    "no batch": (lambda here: None, ["--batch-size", "0"], "batch_size is 0.*--batch-size"),
    "no pairs": (lambda here: None, ["--max-pairs", "0"], "max_pairs is 0.*--max-pairs"),
    "no pairs of tokens": (lambda here: None, ["--token-pairs", "0"], "token_pairs is 0.*--token-pairs"),
    "no length": (lambda here: None, ["--max-length", "4096"], "my-model has 128 positions.*--max-length 128"),
    "no budget": (lambda here: None, ["--memory-budget", "1"], "needs .* bytes"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_a_user_can_get_wrong(what, here) -> None:
    spoil, arguments, message = BAD[what]
    spoil(here)
    assert_refused(audit(*arguments), message)


def test_nothing_trainable(monkeypatch) -> None:
    load = prepare.load_model
    monkeypatch.setattr(prepare, "load_model", lambda *given, **options: load(*given, **options).requires_grad_(False))
    assert_refused(audit(), r"no trainable parameter.*requires_grad_\(True\)")


def test_a_tokenizer_without_a_pad_token_will_do(here, tiny_tokenizer) -> None:
    tiny_tokenizer.pad_token = None
    tiny_tokenizer.save_pretrained(here / "my-model")
    assert audit().exit_code == 0


def test_rows_that_teach_nothing_are_left_out_and_counted(here) -> None:
    rows({**PAIRS[0], "prompt": 200 * "p"}, {**PAIRS[0], "chosen": " a loud bore."}, {**PAIRS[0], "chosen": ""})(here)
    result = audit()
    assert result.exit_code == 0, result.output
    told = " ".join(result.stderr.split())
    assert "1 rows are left out: the prompt alone fills max_length 128, and TRL learns nothing from such rows" in told
    assert (
        "1 rows are left out: chosen equals rejected, so that there is no preference to learn: pairs.jsonl:4." in told
    )
    assert read_summary("out/summary.json")["data"]["measured"] == 3  # an empty response is EOS alone


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--truncation-mode", "left", "accepted: 'keep_start' and 'keep_end'"),
        ("--max-prompt-length", "0", "at least 1"),
        ("--max-completion-length", "0", "at least 1"),
    ],
)
def test_what_is_no_way_to_cut(option, value, message, here) -> None:
    assert_refused(audit(option, value), message)


def test_bad_rows_can_be_skipped(here) -> None:
    rows({"prompt": "p"}, PAIRS[3])(here)
    result = audit("--skip-bad-rows")
    assert result.exit_code == 0
    assert "pairs.jsonl:3: missing" in result.stderr
    assert read_pairs(Path("out/pairs.parquet")).to_pydict()["pair"] == [0, 1, 3]


def test_the_check_of_errors_can_fail(monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(scan, "measure", fail)
    result = audit()
    assert result.exit_code == 1
    with pytest.raises(AssertionError):
        assert_refused(result, "a bug")
    with pytest.raises(AssertionError):
        assert_refused(audit("--engine", "fast"), "another message")


def test_an_interrupted_audit_writes_nothing(monkeypatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scan, "measure", interrupt)
    result = audit()
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert records() == []


def test_errors_are_shown_as_they_are(monkeypatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise GradentError("[red]x[/red] [/] :smile: \x1b[2J\nsecond line")

    monkeypatch.setattr(scan, "measure", fail)
    assert_refused(audit(), re.escape("  [red]x[/red] [/] :smile: \\x1b[2J\n  second line"))


def test_every_option_reaches_the_audit(here) -> None:
    save_lora(here / "adapter", here / "my-model")
    result = audit(
        "--loss", "dpop", "--beta", "0.3", "--lam", "2", "--adapter", "adapter", "--reference", "my-model", "--dtype",
        "float64", "--device", "cpu", "--max-length", "64", "--max-pairs", "3", "--seed", "5", "--no-add-eos",
        "--truncation-mode", "keep_end", "--batch-size", "2", "--memory-budget", "64MiB", "--engine", "func",
        "--by-module", "--token-pairs", "2", "--report", "--no-attribution",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = read_summary("out/summary.json")
    assert summary["loss"] == {"name": "dpop", "beta": 0.3, "lam": 2.0}
    assert (summary["model"]["adapter"], summary["model"]["dtype"]) == ("adapter", "float64")
    assert summary["reference"] == {"kind": "model", "source": "my-model"}
    asked = {
        "max_length": 64, "max_pairs": 3, "seed": 5, "add_eos": False, "batch_size": 2, "memory_budget": "64MiB",
        "engine": "func", "dtype": "float64", "device": "cpu", "skip_bad_rows": False, "split": "train",
        "token_pairs": 2, "by_module": True, "attribution": False, "checkpoints": "all",
        "truncation_mode": "keep_end", "max_prompt_length": None, "max_completion_length": None,
    }  # fmt: skip
    assert summary["settings"] == asked
    assert summary["modules"] and summary["data"]["measured"] == 3
    assert summary["tokens"] and summary["tokens"]["pairs"] == 2
    assert f"{summary['cosine']['p50']:+.3f}" in result.stdout
    assert "Which tokens entangle: 2 pairs" in result.stdout
    assert (
        "Wrote out/report.html, out/pairs.parquet, out/sample.parquet, out/modules.parquet, out/tokens.parquet and "
        in result.stdout
    )


def test_without_tokens_there_is_no_word_of_them(here) -> None:
    result = audit()
    assert "Which tokens" not in result.stdout and "tokens.parquet" not in result.stdout
    assert "Wrote out/pairs.parquet, out/sample.parquet, out/steps.parquet, out/modules.parquet and " in result.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data(kind, here) -> None:
    KINDS[kind](here / kind, FORMATS["messages"])
    assert audit("--max-pairs", "2", data=kind).exit_code == 0


def run_python(*arguments: str, here: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gradent", *arguments],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_a_real_process_ends_with_2_and_without_a_traceback(here) -> None:
    rows({**PAIRS[0], "chosen": None})(here)
    done = run_python("audit", "my-model", "--data", "pairs.jsonl", "--out", "out", here=here)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-2].startswith("  pairs.jsonl:3: chosen is null")
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_a_real_process_prints_tables_and_nothing_of_other_libraries(here) -> None:
    save_lora(here / "adapter", here / "my-model")
    KINDS["folder"](here / "folder", PAIRS)
    done = run_python("audit", "adapter", "--data", "folder", "--out", "out", here=here)
    assert done.returncode == 0, done.stderr
    assert "Cosine of the gradients" in done.stdout and "ideal" in done.stdout
    assert all(line.startswith("note: ") for line in done.stderr.splitlines())


def test_version_and_help() -> None:
    assert gradent("--version").stdout.strip() == f"gradent {__version__}"
    for arguments in (["--help"], ["audit", "--help"], ["demo", "--help"]):
        assert gradent(*arguments).exit_code == 0
    assert "--skip-bad-rows" in gradent("audit", "--help").stdout


@pytest.mark.parametrize(
    "arguments", [["audit"], ["audit", "my-model"], ["audti"], ["audit", "my-model", "--dat", "x"]]
)
def test_usage_errors(arguments) -> None:
    assert gradent(*arguments).exit_code == 2
