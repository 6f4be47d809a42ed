"""One config object: `audit` takes its fields, and the command line's options are made from it."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import typer.main

from gradent import audit
from gradent.auditing.state.config import AuditConfig, TokenConfig
from gradent.cli.app import app
from gradent.cli.options import options, read_options

HYPERPARAMETERS = {"beta", "lam", "alpha", "gamma", "delta", "lambda_w", "lambda_l", "z_ref", "label_smoothing"}
HYPERPARAMETERS |= {"length_normalized"}


def test_audit_takes_the_fields_of_its_config_with_their_defaults() -> None:
    defaults = {
        field.name: inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(AuditConfig)
    }
    assert {name: each.default for name, each in inspect.signature(audit).parameters.items()} == defaults


@pytest.mark.parametrize(
    ("command", "config", "missing"),
    [
        ("audit", AuditConfig, {"quiet", "hyperparameters"}),
        ("tokens", TokenConfig, {"quiet", "max_pairs", "seed", "skip_bad_rows"}),
    ],
)
def test_every_field_but_some_is_an_option(command, config, missing) -> None:
    group: Any = typer.main.get_command(app)
    names = {each.name for each in group.commands[command].params} - HYPERPARAMETERS - {"help"}
    fields = {field.name for field in dataclasses.fields(config)} - missing
    assert names == {"no_add_eos" if name == "add_eos" else name for name in fields}


def test_what_typer_reads_becomes_what_the_config_holds() -> None:
    defaults = {each.name: each.default for each in options(AuditConfig) if each.default is not inspect.Parameter.empty}
    assert (defaults["max_pairs"], defaults["no_add_eos"], defaults["memory_budget"]) == ("256", False, None)
    given = {"model": "m", "data": "d", "out": Path("o")}
    assert AuditConfig(**read_options(AuditConfig, {**defaults, **given})) == AuditConfig(
        model="m", data="d", out=Path("o")
    )
    changed = read_options(AuditConfig, {"max_pairs": "all", "no_add_eos": True, "checkpoints": "0,2"})
    assert changed == {"max_pairs": None, "add_eos": False, "checkpoints": "0,2"}
