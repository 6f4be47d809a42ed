"""`gradent doctor`: what a bug report needs, and whether this installation measures truly.

Nothing personal is in it: no host, no user, no environment, no path.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from gradent.errors import InputError
from gradent.kernels.availability import device_name, path
from gradent.measurement import measure
from gradent.pairs.batch import PairBatch
from gradent.record.parquet import first_line
from gradent.version import __version__

__all__ = ["Check", "Report", "examine", "print_report", "scaled_error"]

PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "triton", "wandb")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
LIMITS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2}
"""Scaled errors that pass. In float32 plain autograd itself is off by up to 2.5e-6 on these models. In bfloat16 it is
off by up to 0.2, so it is asked in bfloat16 too: it rounds its sums over tokens, by up to 1.3e-3; gradent does not."""

MISSING = "not run, for something is not installed"
"""Begins the failure of a check that says nothing about gradent."""

PAIR = ([3, 17, 4, 9], [11, 5, 30, 8, 2, 21], [11, 6, 1])
"""Token ids of the self-check's pair: prompt, chosen, rejected."""


class Check(TypedDict):
    """One model of the self-check."""

    model: str
    error: float | None
    limit: float
    passed: bool
    failure: str | None


class Report(TypedDict):
    """What `gradent doctor` finds."""

    versions: dict[str, str]
    system: str
    threads: int
    devices: list[dict[str, Any]]
    kernels: list[dict[str, Any]]
    checks: list[Check]
    passed: bool


def examine() -> Report:
    """Look at the installation, and measure a pair on two tiny models; a failed check is reported, not raised."""
    places = [torch.device("cpu")] + [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    used = places if len(places) == 1 else [places[0], places[1 + torch.cuda.current_device()]]
    gpt2, llama = ("GPT-2", _gpt2), ("Llama with LoRA", _llama)
    models = (*gpt2, torch.float64), (*llama, torch.float32), (*gpt2, torch.bfloat16)
    checks = [_check(name, build, dtype, place) for place in used for name, build, dtype in models]
    versions = {"python": platform.python_version(), "gradent": __version__}
    return Report(
        versions=versions | {package: _version(package) for package in PACKAGES},
        system=f"{platform.system()} {platform.machine()}",
        threads=torch.get_num_threads(),
        devices=[{"device": str(place), "name": device_name(place), "memory": _memory(place)} for place in places],
        kernels=[_kernels(place, dtype) for place in places for dtype in DTYPES],
        checks=checks,
        passed=all(check["passed"] for check in checks),
    )


def print_report(report: Report, console: Console, *, as_json: bool = False) -> None:
    """Print a report of `examine`, or with `as_json` one JSON object."""
    if as_json:
        console.print(Text(json.dumps(report, indent=2, ensure_ascii=False)), soft_wrap=True)
        return
    facts = Table.grid(padding=(0, 2))
    facts.add_row("versions", ", ".join(f"{package} {version}" for package, version in report["versions"].items()))
    facts.add_row("system", f"{report['system']}, {report['threads']} threads of torch")
    for device in report["devices"]:
        memory = f", {device['memory'] / 2**30:.0f} GiB" if device["memory"] else ""
        facts.add_row(device["device"], f"{device['name']}{memory}")
    for kernels in report["kernels"]:
        facts.add_row(f"{kernels['device']} {kernels['dtype']}", f"reduced by {kernels['path']}")
    console.print(facts)
    console.print()
    for check in report["checks"]:
        is_run = _is_run(check)
        failed = ("FAIL", "bold red") if is_run else ("----", "bold yellow")
        verdict = Text("pass", "bold green") if check["passed"] else Text(*failed)
        result = check["failure"] or f"scaled error {check['error']:.1e}, limit {check['limit']:.0e}"
        console.print(verdict, Text(f"{check['model']}: measure against plain autograd: {result}"))
    console.print(Text(f"\n{_verdict(report['checks'])}", "bold"))


def _is_run(check: Check) -> bool:
    """Whether a check says something about gradent: not where a package that it needs is missing."""
    return not (check["failure"] or "").startswith(MISSING)


def _verdict(checks: Sequence[Check]) -> str:
    """What all checks come to, in a sentence or two."""
    run = [check for check in checks if _is_run(check)]
    failed = [check for check in run if not check["passed"]]
    if failed:
        return (
            f"Not to be trusted: {len(failed)} of {len(run)} checks failed. Please report it with the output of "
            "`gradent doctor --json`; GRADENT_KERNELS=torch rules the GPU's kernels out."
        )
    if len(run) < len(checks):
        return f"What could be checked is fine ({len(run)} of {len(checks)} checks); the rest needs the packages above."
    return f"This installation is fine: all {len(checks)} checks against plain autograd passed."


def scaled_error(gram: Any, truth: Tensor) -> float:
    """The largest distance of a pair's entries from the truth `[3]`, each divided by `‖g_i‖‖g_j‖`."""
    chosen, rejected = truth[:2].sqrt()
    scale = torch.stack([chosen**2, rejected**2, chosen * rejected])
    got = torch.stack([gram.chosen_sq[0], gram.rejected_sq[0], gram.inner[0]])
    return float(((got - truth).abs() / scale).max())


def _check(name: str, build: Callable[[], nn.Module], dtype: torch.dtype, place: torch.device) -> Check:
    """One pair on one model, in `dtype`, against plain autograd in float64, or in bfloat16 itself."""
    model_name = f"{name}, {str(dtype).removeprefix('torch.')}, on {place}"
    check = Check(model=model_name, error=None, limit=LIMITS[dtype], passed=False, failure=None)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build().eval()
        batch = PairBatch.from_tokens([PAIR])
        gram = measure(model.to(place, dtype), batch)
        error = scaled_error(gram, _truth(model if dtype == torch.bfloat16 else model.to("cpu", torch.float64), batch))
        if math.isfinite(error):
            check["error"], check["passed"] = error, error <= LIMITS[dtype]
        else:
            check["failure"] = f"what was measured is not finite: {gram.chosen_sq}, {gram.rejected_sq}, {gram.inner}"
    except ModuleNotFoundError as missing:
        check["failure"] = f"{MISSING}: pip install {missing.name}"
    except Exception as failure:  # noqa: BLE001  (whatever goes wrong is what the report is for)
        check["failure"] = f"{type(failure).__name__}: {first_line(failure)}"
    return check


def _truth(model: nn.Module, batch: PairBatch) -> Tensor:
    """Gram entries `[3]`, float64, by one backward a row, gradients flattened: nothing of gradent's own."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = []
    for row in range(2):
        ids, marks = (part.to(parameters[0].device) for part in batch.row(row))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        scores = (logits.float() if logits.dtype == torch.bfloat16 else logits).log_softmax(-1)
        logp = scores.gather(1, ids[1:, None])[:, 0][marks[1:]].sum()
        gradients.append(torch.cat([part.flatten().double().cpu() for part in torch.autograd.grad(logp, parameters)]))
    chosen, rejected = gradients
    return torch.stack([chosen @ chosen, rejected @ rejected, chosen @ rejected])


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415

    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def _llama() -> nn.Module:
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16,
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted: nn.Module = get_peft_model(LlamaForCausalLM(config), lora)
    return adapted


def _kernels(place: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    try:
        reducer = path(place, dtype)
    except InputError as error:  # GRADENT_KERNELS asks for what there is not: the checks fail for it
        reducer = f"nothing: {error}"
    return {"device": str(place), "dtype": str(dtype).removeprefix("torch."), "path": reducer}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _memory(place: torch.device) -> int:
    if place.type == "cuda":
        return int(torch.cuda.get_device_properties(place).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not every system says
        return 0
