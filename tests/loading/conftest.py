"""Runs made by hand that several tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.auditing.runs import make_full, make_run


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of full models."""
    return make_run(tmp_path / "run")


@pytest.fixture
def base(tmp_path) -> Path:
    """A full model."""
    return make_full(tmp_path / "base")


@pytest.fixture
def adapters(tmp_path, base) -> Path:
    """A run of adapters for it."""
    return make_run(tmp_path / "run", base=base)
