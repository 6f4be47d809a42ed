"""`gradent plan` as a user meets it: tables, options, refusals."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import Result
from transformers import GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

from gradent.cli.app import app
from gradent.kernels.common.budget import parse_budget
from tests.auditing.made import save_lora
from tests.zoo import build


@pytest.fixture(autouse=True)
def here(local_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`my-model` in the current directory, a console of 140 columns, other libraries let be."""
    monkeypatch.chdir(local_model.parent)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr("gradent.cli.console._quieten_others", lambda: None)
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
    costs = next(line for line in result.stdout.splitlines() if line.startswith("costs "))
    assert re.search(
        r"\d% of a forward and backward \([\d.]+ kFLOP of [\d.]+ [kM]FLOP\), and up to .* of scratch", costs
    )
    assert result.stdout.index("costs ") < result.stdout.index("model.embed_tokens"), "the answer comes first"
    shares = [float(share) for share in re.findall(r"(\d+\.\d)%\s*$", result.stdout, flags=re.MULTILINE)]
    assert sum(shares) == pytest.approx(100, abs=1)


def test_a_name_is_broken_at_its_dots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = plan("--tokens", "1024").stdout.splitlines()
    first = next(place for place, line in enumerate(lines) if "self_attn.q_proj" in line)
    assert lines[first - 1].startswith(" model.layers.*.  ") and lines[first].startswith(" self_attn.q_proj ×2  ")


def test_longer_rows_take_outer() -> None:
    assert line_of(plan("--tokens", "1024"), "model.layers.*.mlp.gate_proj")[3] == "outer"


def test_it_says_where_autograd_forms_the_gradients(here) -> None:
    save_lora(here / "adapter", here / "my-model")
    said = "the backward itself forms the gradients"
    result = plan("--adapter", "adapter", "--tokens", "110")
    assert said in " ".join(result.stdout.split())
    line = line_of(result, "model.layers.*.self_attn.q_proj.lora_A")
    assert line[1:5] == ["×2", "4×16", "4", "whole"]
    # 768 numbers: two rows' gradients, three times.
    assert line[6:8] == ["1.5", "KiB"] and "Largest scratch: 18 KiB" in result.stdout
    for options in (["--tokens", "90"], ["--tokens", "110", "--memory-budget", "4KiB"], ["--dtype", "bfloat16"]):
        assert said not in " ".join(plan("--adapter", "adapter", "--tokens", "110", *options).stdout.split()), options
    assert said not in plan("--tokens", "110").stdout, "all of it is trained"


def test_an_explicit_gradient_that_the_budget_refuses_is_told(tmp_path: Path) -> None:
    build("mamba", dtype=torch.float32).save_pretrained(tmp_path / "mamba")
    told = "measure will refuse the explicit gradients of backbone.layers.*.mixer.A_log"
    for budget, refused in (("128B", True), ("1MiB", False), (None, False)):
        options = [] if budget is None else ["--memory-budget", budget]
        result = plan("--tokens", "20", *options, model=str(tmp_path / "mamba"))
        assert (told in " ".join(result.stdout.split())) is refused, result.output


def test_a_tied_head_is_a_second_line(tiny_gpt2: GPT2LMHeadModel) -> None:
    tiny_gpt2.float().save_pretrained("gpt2")
    result = plan("--tokens", "8", model="gpt2")
    lines = [line.split()[2] for line in result.stdout.splitlines() if line.split()[:1] == ["transformer.wte"]]
    assert lines == ["lookup", "gram"]
    assert "transformer.h.*.attn.c_attn.bias" in result.stdout


def test_an_adapter(here) -> None:
    save_lora(here / "adapter", here / "my-model")
    for result in (plan("--tokens", "90", model="adapter"), plan("--tokens", "90", "--adapter", "adapter")):
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


def on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("GRADENT_KERNELS", "triton")


def kernel_bytes(tokens: int, pairs: int) -> list[str]:
    """Scratch of the outer kernel for `my-model`'s gate_proj, by its own account, as the table prints it."""
    from gradent.kernels.common.triton_operands import Spans  # noqa: PLC0415  (imports Triton, which is optional)
    from gradent.kernels.outer.triton import outer_scratch  # noqa: PLC0415

    u, v = (torch.empty(pairs * tokens, size) for size in (24, 16))
    return [str(outer_scratch(u, v, u, v, Spans.padded(pairs, tokens))), "B"]


def test_kernels_have_tiles_and_scratch_of_their_own(monkeypatch) -> None:
    torch_line = line_of(plan("--tokens", "64"), "model.layers.*.mlp.gate_proj")
    assert torch_line[3:5] == ["outer", "24×16"], "one tile of torch: the weight's own sides"
    on_the_kernels(monkeypatch)
    result = plan("--tokens", "64")
    assert result.exit_code == 0, result.output
    assert "reduced by triton" in result.stdout
    line = line_of(result, "model.layers.*.mlp.gate_proj")
    assert line[3:6] == ["outer", "triton", "32×16"], "one tile of the kernel: powers of two, 16 or more"
    assert line[7:9] == kernel_bytes(64, 1)
    assert line_of(plan("--tokens", "4"), "model.layers.*.mlp.gate_proj")[3:6] == ["gram", "triton", "16×16"]
    assert "lines of products" not in result.stdout and "held whole" not in result.stdout


def test_pairs_in_one_launch(monkeypatch) -> None:
    on_the_kernels(monkeypatch)
    line = line_of(plan("--tokens", "64", "--pairs", "3"), "model.layers.*.mlp.gate_proj")
    assert line[4:8] == ["triton", "32×16,", "6", "rows"]
    assert line[9:11] == kernel_bytes(64, 3)


def test_a_budget_below_the_kernels_says_what_reduces_instead(monkeypatch) -> None:
    on_the_kernels(monkeypatch)
    result = plan("--tokens", "64", "--memory-budget", "16")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert re.search(r"torch in 8 of 8 lines of products: .* would take up to \d+ B, more than the budget", said), said
    assert line_of(result, "model.layers.*.mlp.gate_proj")[3:6] == ["outer", "torch", "1×2"]
    for line in result.stdout.splitlines():
        scratch = re.search(r"(\d+) B +\d+\.\d%", line)
        if scratch and int(scratch[1]) > 16:
            assert " sum " in line and "sum: the two gradients of a bias or a norm are held whole" in said, line
    some = plan("--tokens", "64", "--memory-budget", "100")
    assert "torch in 1 of 8 lines" in " ".join(some.stdout.split()), "the head alone has more tiles than that"
    assert line_of(some, "lm_head")[2:4] == ["outer", "torch"]
    assert line_of(some, "model.layers.*.mlp.gate_proj")[4] == "triton"


def test_torch_has_no_column_of_paths() -> None:
    result = plan("--memory-budget", "16")
    assert " path " not in result.stdout and "lines of products" not in result.stdout


def test_the_weights_are_not_read(here) -> None:
    (here / "my-model" / "model.safetensors").write_bytes(b"damaged")
    assert plan().exit_code == 0


def test_a_configuration_is_enough(here) -> None:
    (here / "my-model" / "model.safetensors").unlink()
    assert plan().exit_code == 0


def test_rows_longer_than_the_model_takes_are_remarked(here) -> None:
    remark = "max_position_embeddings"
    longest = json.loads((here / "my-model" / "config.json").read_text())[remark]
    assert remark not in plan("--tokens", str(longest)).stdout
    assert remark in plan("--tokens", str(longest + 1)).stdout


@pytest.mark.parametrize("budget", ["64KiB", "200KB", "1MiB"])
@pytest.mark.parametrize("tokens", ["8", "60"])
def test_the_total_is_within_the_budget_or_remarked(budget, tokens, here) -> None:
    told = " ".join(plan("--memory-budget", budget, "--tokens", tokens, "--pairs", "3").stdout.split())
    largest, given = re.search(r"scratch: (\S+ \S+), of a budget of (\S+ \S+)\. ", told).groups()
    over = parse_budget(largest.replace(" ", "")) > 1.01 * parse_budget(given.replace(" ", ""))
    assert not over or "wait to be reduced together" in told


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
    "no config": (no_config, [], "other", "cannot be loaded.*no config.json"),
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


def test_of_a_run_it_is_about_the_last_model(here: Path) -> None:
    for step in (10, 20):
        shutil.copytree(here / "my-model", here / "run" / f"checkpoint-{step}")
    result = plan("--tokens", "4", model="run")
    assert result.exit_code == 0, result.output
    told = " ".join(result.stdout.split())
    assert "run is a run; this is about its last model, run/checkpoint-20." in told
    assert line_of(result, "model.norm")[1:3] == ["16", "sum"]
    refused = plan("--tokens", "4", "--adapter", "adapter", model="run")
    assert refused.exit_code != 0 and "Leave --adapter out" in " ".join(refused.output.split())
