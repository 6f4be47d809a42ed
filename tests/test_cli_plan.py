"""`gradent plan` as a user meets it: tables, options, refusals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import Result
from transformers import GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from gradent.cli import app
from tests.audit.made import save_lora


@pytest.fixture(autouse=True)
def here(local_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`my-model` in the current directory, a console of 140 columns, other libraries let be."""
    monkeypatch.chdir(local_model.parent)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr("gradent.cli._quieten_others", lambda: None)
    return local_model.parent


def plan(*arguments: str, model: str = "my-model") -> Result:
    return CliRunner().invoke(app, ["plan", model, *arguments])


def line_of(result: Result, name: str) -> list[str]:
    (found,) = [line.split() for line in result.stdout.splitlines() if line.split()[:1] == [name]]
    return found


def test_every_kind_of_layer_has_a_line() -> None:
    result = plan("--tokens", "4")
    assert result.exit_code == 0, result.output
    assert line_of(result, "model.embed_tokens")[1:3] == ["259×16", "lookup"]
    assert line_of(result, "model.layers.*.mlp.gate_proj")[1:5] == ["×2", "24×16", "gram", "4×4"]
    assert line_of(result, "model.norm")[1:3] == ["16", "sum"]
    assert "6·P·T" in result.stdout and "of a budget of 256 MiB" in result.stdout
    shares = [float(share) for share in re.findall(r"(\d+\.\d)%\s*$", result.stdout, flags=re.MULTILINE)]
    assert sum(shares) == pytest.approx(100, abs=1)


def test_longer_rows_take_outer() -> None:
    assert line_of(plan("--tokens", "1024"), "model.layers.*.mlp.gate_proj")[3] == "outer"


def test_a_tied_head_is_a_second_line(tiny_gpt2: GPT2LMHeadModel) -> None:
    tiny_gpt2.float().save_pretrained("gpt2")
    result = plan("--tokens", "8", model="gpt2")
    lines = [line.split()[2] for line in result.stdout.splitlines() if line.split()[:1] == ["transformer.wte"]]
    assert lines == ["lookup", "gram"]
    assert "transformer.h.*.attn.c_attn.bias" in result.stdout


def test_an_adapter(here) -> None:
    save_lora(here / "adapter", here / "my-model")
    for result in (plan(model="adapter"), plan("--adapter", "adapter")):
        assert result.exit_code == 0, result.output
        assert line_of(result, "model.layers.*.self_attn.q_proj.lora_A")[1:5] == ["×2", "4×16", "4", "outer"]
        assert "mlp.gate_proj" not in result.stdout, "frozen"
        assert "4·P·T for those that are frozen" in " ".join(result.stdout.split())


def test_options() -> None:
    result = plan("--pairs", "3", "--memory-budget", "2KiB", "--dtype", "bfloat16", "--device", "cpu", "--tokens", "64")
    assert result.exit_code == 0, result.output
    assert "3 pairs, 64 tokens a row" in result.stdout
    assert "of a budget of 2 KiB" in result.stdout
    assert "bfloat16, reduced by torch" in result.stdout


def test_the_weights_are_not_read(here) -> None:
    (here / "my-model" / "model.safetensors").write_bytes(b"damaged")
    assert plan().exit_code == 0


def encoder_decoder(here: Path) -> None:
    config = T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(here / "other")


def no_config(here: Path) -> None:
    (here / "other").mkdir()
    (here / "other" / "model.safetensors").touch()


def nothing(here: Path) -> None:
    """Leaves no `./other` behind."""


REFUSALS = {
    "no such directory": (nothing, ["--tokens", "8"], "./other", "no such directory"),
    "no config": (no_config, [], "other", "cannot be loaded"),
    "encoder-decoder": (encoder_decoder, [], "other", "encoder-decoder"),
    "a dtype": (nothing, ["--dtype", "int8"], "my-model", "float32, float64, bfloat16"),
    "a device": (nothing, ["--device", "abacus"], "my-model", "Try --device cpu"),
    "no size": (nothing, ["--memory-budget", "lots"], "my-model", "512MiB"),
    "a size too small": (nothing, ["--memory-budget", "1"], "my-model", r"needs \d+ bytes"),
    "no adapter": (nothing, ["--adapter", "my-model"], "my-model", "no adapter_config.json"),
}


@pytest.mark.parametrize(("prepare", "options", "model", "message"), REFUSALS.values(), ids=list(REFUSALS))
def test_refusals(prepare, options, model, message, here) -> None:
    prepare(here)
    result = plan(*options, model=model)
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert re.search(r"^error \(\w+Error\)\n  ", result.stderr, flags=re.MULTILINE)
    assert re.search(message, result.stderr), result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("options", [["--tokens", "0"], ["--pairs", "-1"], ["--token", "many"]])
def test_usage_errors(options) -> None:
    assert plan(*options).exit_code == 2
