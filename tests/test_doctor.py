"""`gradent doctor`: it tells the truth about this installation, tells nothing personal, and can fail."""

from __future__ import annotations

import getpass
import json
import platform
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from gradent import doctor
from gradent.cli.app import app
from gradent.measurement import measure
from gradent.version import __version__


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("gradent.cli.console._quieten_others", lambda: None)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("HOME", str(tmp_path / "home-of-somebody"))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_this_installation_is_sound() -> None:
    result = run("--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passed"] is True
    assert report["versions"]["gradent"] == __version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["python"] == platform.python_version()
    assert report["threads"] == torch.get_num_threads()
    assert report["devices"][0]["device"] == "cpu"
    assert {kernels["dtype"] for kernels in report["kernels"]} == {"float32", "bfloat16", "float64"}
    assert all(kernels["path"] for kernels in report["kernels"])
    assert [(check["limit"], check["failure"]) for check in report["checks"]] == [
        (1e-12, None),
        (5e-6, None),
        (1e-2, None),
    ]
    assert all(0 <= check["error"] <= check["limit"] for check in report["checks"])


def test_words() -> None:
    result = run()
    assert result.exit_code == 0, result.output
    assert result.stdout.count("pass ") == 3 and "FAIL" not in result.stdout
    assert "reduced by" in result.stdout and "transformers" in result.stdout
    last = result.stdout.strip().splitlines()[-1]
    assert last == "This installation is fine: all 3 checks against plain autograd passed."


def test_nothing_personal(monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    told = run("--json").stdout + run().stdout
    for private in ("a-secret", "home-of-somebody", str(Path.cwd()), socket.gethostname(), getpass.getuser()):
        assert private not in told


def test_a_wrong_measurement_fails(monkeypatch) -> None:
    def wrong(*given: Any, **options: Any) -> Any:
        gram = measure(*given, **options)
        return replace(gram, inner=gram.inner * (1 + 1e-4))

    monkeypatch.setattr(doctor, "measure", wrong)
    result = run()
    assert result.exit_code == 1
    assert result.stdout.count("FAIL") == 2
    last = " ".join(result.stdout.split("\n\n")[-1].split())
    assert last.startswith(
        "Not to be trusted: 2 of 3 checks failed. Please report it with the output of `gradent doctor"
    )
    report = run("--json")
    assert report.exit_code == 1
    assert [check["passed"] for check in json.loads(report.stdout)["checks"]] == [False, False, True], (
        "1e-4 is below the rounding of bfloat16"
    )


@pytest.mark.parametrize("value", [torch.nan, 0.0])
def test_nan_and_zeros_fail(value, monkeypatch) -> None:
    def wrong(*given: Any, **options: Any) -> Any:
        gram = measure(*given, **options)
        return replace(gram, **{name: getattr(gram, name) * value for name in ("chosen_sq", "rejected_sq", "inner")})

    monkeypatch.setattr(doctor, "measure", wrong)
    assert run().exit_code == 1
    assert "NaN" not in run("--json").stdout, "which is no JSON"


def test_a_measurement_that_breaks_is_reported(monkeypatch) -> None:
    def broken(*given: Any, **options: Any) -> Any:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(doctor, "measure", broken)
    result = run("--json")
    assert result.exit_code == 1
    checks = json.loads(result.stdout)["checks"]
    assert [check["failure"] for check in checks] == ["RuntimeError: no kernel image"] * 3
    assert [check["error"] for check in checks] == [None] * 3


def test_a_check_that_cannot_be_run_is_no_wrong_measurement(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    result = run()
    assert result.exit_code == 1
    told = " ".join(result.stdout.split())
    assert "pip install peft" in told and "FAIL" not in told and "ot to be trusted" not in told
    assert "What could be checked is fine (2 of 3 checks); the rest needs the packages above." in told


def test_a_wrong_choice_of_kernels_is_reported(monkeypatch) -> None:
    monkeypatch.setenv("GRADENT_KERNELS", "foo")
    result = run()
    assert result.exit_code == 1
    assert "transformers" in result.stdout and "GRADENT_KERNELS='foo'" in result.stdout


def test_what_is_missing_is_said(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    assert json.loads(run("--json").stdout)["versions"]["no-such-package"] == "not installed"


def test_random_numbers_stay() -> None:
    before = torch.random.get_rng_state()
    doctor.examine()
    assert torch.equal(torch.random.get_rng_state(), before)
