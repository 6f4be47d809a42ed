"""`gradent watch`: a page on this machine alone, that follows the records of a run while it goes on."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast, TrainerCallback

from gradent import EntanglementCallback
from gradent.errors import InputError
from gradent.report.run.watch import HOST, RunServer
from tests.processes import heed_ctrl_c
from tests.report.browser import document_at, needs_chromium
from tests.report.run_records import pair_rows, write_pairs
from tests.trainer.runs import llama, make_trainer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunServer]:
    with RunServer(tmp_path / "records", 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(port: int, path: str, host: str | None = None) -> tuple[int, str, dict[str, str]]:
    connection = HTTPConnection(HOST, port, timeout=120)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, dict(answer.headers)


def title(server: RunServer) -> str:
    status, page, _ = ask(server.server_port, "/page")
    found = re.search("<title>(.*?)</title>", page)
    assert status == 200 and found is not None
    return found[1]


def test_it_waits_then_follows(server: RunServer) -> None:
    assert title(server) == "Waiting for the first measured step"
    _, before, _ = ask(server.server_port, "/version")
    write_pairs(server.directory, pair_rows(range(10, 130, 10), lambda s, p: 0.5, lambda s, p: -1.0))
    assert title(server) == "As meant, chosen rises and rejected falls: chosen +0.500, rejected -1.00 nats a step"
    _, between, _ = ask(server.server_port, "/version")
    write_pairs(server.directory, pair_rows(range(130, 250, 10), lambda s, p: -0.5, lambda s, p: -1.0))
    assert title(server) == "Both fall since step 130: chosen -0.500, rejected -1.00 nats a step"
    _, after, _ = ask(server.server_port, "/version")
    assert len({before, between, after}) == 3 and after == ask(server.server_port, "/version")[1]


def test_records_that_are_damaged_are_told(server: RunServer) -> None:
    path = write_pairs(server.directory, pair_rows(range(10, 30, 10), lambda s, p: 0.5, lambda s, p: -1.0))
    path.write_text(path.read_text().replace('"step": 10', '"stop": 10'))
    assert title(server) == "The records cannot be read" and "pairs.jsonl:2" in ask(server.server_port, "/page")[1]


def test_only_this_machine_is_answered(server: RunServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1"):
        status, text, _ = ask(server.server_port, "/page", host)
        assert status == 403 and server.url in text
    assert ask(server.server_port, "/page", f"localhost:{server.server_port}")[0] == 200
    assert ask(server.server_port, "/../pairs.jsonl")[0] == 404
    _, _, headers = ask(server.server_port, "/")
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "http" not in policy and "*" not in policy
    assert headers["Cache-Control"] == "no-store"


def test_a_port_that_is_taken(server: RunServer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"--port {server.server_port}: cannot be served.*--port 0"):
        RunServer(tmp_path, server.server_port)
    with pytest.raises(InputError, match="--port 70000: cannot be served"):
        RunServer(tmp_path, 70000)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a directory"):
        RunServer(tmp_path / "file", 0)


def test_while_a_training_runs(server: RunServer, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    seen: list[str] = []

    class Reader(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            page = ask(server.server_port, "/page")[1]
            seen.append(re.search(r"([\d]+) measured steps?", page)[1])

    callback = EntanglementCallback(every=1, out=server.directory, on_error="raise")
    trainer = make_trainer("dpo", llama(), tiny_tokenizer, tmp_path / "run", [callback, Reader()], max_steps=4)
    trainer.train()
    assert seen == ["1", "2", "3", "4"]


@needs_chromium
def test_a_browser_shows_the_finding(server: RunServer, tmp_path: Path) -> None:
    """The frame loads the page, whose title the window takes: scripts run under the page's own policy."""
    write_pairs(server.directory, pair_rows(range(10, 130, 10), lambda s, p: -0.5, lambda s, p: -1.0))
    shown = document_at(server.url, tmp_path / "profile")
    assert "<title>Both fall since step 10: chosen -0.500, rejected -1.00 nats a step</title>" in shown
    assert 'class="shown"' in shown
    inside = document_at(f"{server.url}page", tmp_path / "inside")
    assert inside.count('class="main-svg"') >= 1, "the chart is drawn"


def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "gradent", "watch", str(tmp_path), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"at http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends it\)", line)
    assert found is not None, process.communicate()
    assert ask(int(found[1]), "/version")[:2] == (200, "nothing")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and out.startswith("Stopped watching.") and not err
