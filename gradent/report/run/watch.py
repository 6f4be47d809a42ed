"""A run's page, served on this machine alone while the run goes on: it looks for new records, and shows them."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from gradent.errors import DataFileError, InputError
from gradent.report.page.html import Page, render_page
from gradent.report.run.page import run_page, waiting_page
from gradent.report.run.records import find_files, read_run

__all__ = ["HOST", "RunServer", "watch_run"]

HOST = "127.0.0.1"
EVERY = 3
"""Seconds between two looks at the records."""

# The page lies in a frame, so that it is the very page that `gradent report` writes. A new one is drawn behind the old
# one and then takes its place, scrolled and unfolded as that was.
_SHELL = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>%(title)s</title>
<style>
html, body { height: 100%%; margin: 0; overflow: hidden; }
iframe { border: 0; height: 100%%; inset: 0; position: absolute; width: 100%%; }
iframe:not(.shown) { visibility: hidden; }
p { background: Canvas; border: 1px solid; bottom: 0; font: 14px system-ui, sans-serif; left: 0; margin: .5rem;
  padding: .3rem .6rem; position: absolute; z-index: 1; }
p:empty { display: none; }
</style>
</head>
<body>
<p role="status"></p>
<script>
"use strict";
const status = document.querySelector("p");
let shown = null, version = null, loading = false;
function take(next) {
  loading = true;
  const frame = document.createElement("iframe");
  frame.title = "The run's page";
  frame.onload = () => {
    const inside = frame.contentWindow, folds = page => [...page.document.querySelectorAll("details")];
    if (shown) {
      const before = folds(shown.contentWindow), open = before.map(fold => fold.open);
      if (open.some(Boolean)) folds(inside).forEach((fold, index) => { if (open[index]) fold.open = true; });
      inside.scrollTo(0, shown.contentWindow.scrollY);
    }
    const old = shown;
    shown = frame; version = next; loading = false;
    document.title = inside.document.title;
    // Its charts are drawn one after the other; until then the old page is seen.
    setTimeout(() => { frame.className = "shown"; if (old) old.remove(); }, old ? 600 : 0);
  };
  frame.src = "page";
  document.body.prepend(frame);
}
async function look() {
  try {
    const answer = await fetch("version", {cache: "no-store"});
    const next = await answer.text();
    status.textContent = "";
    if (answer.ok && next !== version && !loading) take(next);
  } catch {
    status.textContent = "gradent watch has ended; this is what it showed last.";
  }
  setTimeout(look, %(every)d);
}
look();
</script>
</body>
</html>
"""
_SHELL_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; frame-src 'self'"
)
_TEXT, _HTML = "text/plain; charset=utf-8", "text/html; charset=utf-8"


class RunServer(ThreadingHTTPServer):
    """Serves the page of a directory's records at `url`, to this machine.

    Args:
        directory: what `EntanglementCallback(out=...)` writes into; it need not be there yet.
        port: of 127.0.0.1; 0 for any that is free.

    Raises:
        InputError: the port is taken or not allowed, or `directory` is a file.
    """

    daemon_threads = True

    def __init__(self, directory: Path, port: int) -> None:
        if directory.exists() and not directory.is_dir():
            raise InputError(
                f"{directory}: not a directory. Name the one that EntanglementCallback(out=...) was given."
            )
        self.directory = directory
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"--port {port}: cannot be served ({getattr(error, 'strerror', None) or error}). --port 0 takes any "
                "that is free."
            ) from error

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    def version(self) -> str:
        """What changes when the records do."""
        found = []
        for path in find_files(self.directory):
            state = path.stat()
            found.append(f"{path.name}:{state.st_mtime_ns}:{state.st_size}")
        return " ".join(found) or "nothing"

    def page(self) -> Page:
        """The page of the file that was written last."""
        paths = find_files(self.directory)
        if not paths:
            return waiting_page(self.directory)
        try:
            records = read_run(max(paths, key=lambda path: path.stat().st_mtime_ns))
        except DataFileError as error:
            return waiting_page(self.directory, str(error))
        return run_page(records) if records.rows else waiting_page(self.directory)


class _Handler(BaseHTTPRequestHandler):
    server: RunServer
    server_version, sys_version = "gradent", ""

    def do_GET(self) -> None:
        """Answer a browser on this machine; another site that a browser was made to take for it is refused."""
        hosts = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}
        if self.headers.get("Host") not in hosts:
            self._answer(HTTPStatus.FORBIDDEN, _TEXT, f"Open {self.server.url} itself.")
            return
        path = self.path.split("?")[0]
        answers: dict[str, tuple[str, Callable[[], str]]] = {
            "/": (_HTML, self._shell), "/page": (_HTML, lambda: render_page(self.server.page())),
            "/version": (_TEXT, self.server.version),
        }  # fmt: skip
        if path not in answers:
            self._answer(HTTPStatus.NOT_FOUND, _TEXT, "There is nothing here.")
            return
        kind, make = answers[path]
        self._answer(HTTPStatus.OK, kind, make())

    def _shell(self) -> str:
        return _SHELL % {"title": escape(f"gradent watch {self.server.directory}"), "every": 1000 * EVERY}

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        headers = {
            "Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        }  # fmt: skip
        if self.path == "/":
            headers["Content-Security-Policy"] = _SHELL_POLICY
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not printed."""


def watch_run(directory: Path, *, port: int, say: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C; `say` is told where it is, and that it has ended."""
    with RunServer(directory, port) as server:
        render_page(server.page())  # what is missing is said before a browser is opened
        say(f"Watching {directory} at {server.url} (Ctrl-C ends it).")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("Stopped watching. The run goes on; `gradent report` writes the page into a file.")
