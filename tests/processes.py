"""Processes of their own for tests, forked from one that has imported everything: torch and its kin take 12 seconds.

How a command really starts is for tests/cli/ to see, which start the interpreter anew, and torchrun
for examples/two_processes.py.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

__all__ = ["call", "heed_ctrl_c", "launch", "start"]

PRELOADED = [
    "trl.trainer.dpo_trainer",
    "peft",
    "pyarrow.parquet",
    "gradent.trainer",
    "gradent.auditing.pipeline",
]
PATIENCE = 600


def heed_ctrl_c() -> None:
    """What a shell starts in the background ignores SIGINT, and so does what that starts in turn."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(function: Callable[..., Any], *arguments: Any) -> ForkServerProcess:
    """Call a function of a module in a process of its own, without waiting for it.

    Args:
        function: found by its name there.
        arguments: what pickle takes.

    Returns:
        The process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def call(
    function: Callable[..., Any],
    *arguments: Any,
    here: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Call a function as if it were a command.

    Args:
        function: as for `start`; what it raises, `SystemExit` included, ends the process as usual.
        arguments: as for `start`.
        here: working directory; None for this one.
        environment: what is set beside this process's variables.

    Returns:
        Exit status, output and errors.
    """
    (done,) = _together(function, arguments, here, [environment or {}])
    return done


def launch(function: Callable[..., Any], ranks: int, *arguments: Any) -> None:
    """Call a function on some ranks, with the variables that torchrun sets; fails with what they printed.

    Args:
        function: as for `start`.
        ranks: 1 for a process that knows of no ranks.
        arguments: as for `start`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks),
              "LOCAL_WORLD_SIZE": str(ranks)}  # fmt: skip
    each = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)] if ranks > 1 else [{}]
    for rank, done in enumerate(_together(function, arguments, None, each)):
        if done.returncode:
            pytest.fail(f"rank {rank} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def _together(
    function: Callable[..., Any], arguments: Sequence[Any], here: Path | None, environments: Sequence[Mapping[str, str]]
) -> list[subprocess.CompletedProcess[str]]:
    with tempfile.TemporaryDirectory() as folder:
        outputs = [
            tuple(Path(folder, f"{number}.{name}") for name in ("out", "err")) for number in range(len(environments))
        ]
        processes = []
        for (out, err), environment in zip(outputs, environments, strict=True):
            variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
            told = (out, err, here or Path.cwd(), {**variables, **environment})
            processes.append(start(_call, function, arguments, *told))
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                for each in processes:
                    each.kill()
                pytest.fail(f"{function.__module__}.{function.__name__} took more than {PATIENCE} s: {_read(outputs)}")
        return [
            subprocess.CompletedProcess(function.__name__, process.exitcode or 0, out.read_text(), err.read_text())
            for process, (out, err) in zip(processes, outputs, strict=True)
        ]


def _read(outputs: Sequence[tuple[Path, ...]]) -> str:
    return "\n".join(path.read_text() for paths in outputs for path in paths if path.exists())


def _call(
    function: Callable[..., Any], arguments: Sequence[Any], out: Path, err: Path, here: Path, variables: dict[str, str]
) -> None:
    """In the process: its output to files, its place and variables those that it was told."""
    for path, descriptor in ((out, 1), (err, 2)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(here)
    gc.freeze()  # this and the next as in tests/conftest.py
    torch.set_num_threads(1)
    function(*arguments)
