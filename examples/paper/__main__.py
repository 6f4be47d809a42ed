"""`python -m examples.paper`."""

from examples.paper.cli import app

app(prog_name="python -m examples.paper")
