"""The rooms of the package, top floor first: what tests/test_house.py checks, and CONTRIBUTING's "The house".

python -m scripts.house    writes the table into CONTRIBUTING.md
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gradent"
PAGE = ROOT / "CONTRIBUTING.md"
START, END = "<!-- rooms: written by python -m scripts.house -->\n", "<!-- end of rooms -->\n"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("demo",),
    ("trainer",),
    ("trainer.adaptive_nll",),
    ("trainer.callback", "trainer.pairwise", "trainer.token_masking"),
    ("trainer.records", "trainer.common"),
    ("selecting",),
    ("scanning",),
    ("auditing",),
    ("auditing.analysis",),
    ("auditing.measuring",),
    ("auditing.state",),
    ("planning",),
    ("loading.runs",),
    ("loading",),
    ("loading.kinds",),
    ("report",),
    ("report.terminal",),
    ("report.compare", "report.run"),
    ("report.audit",),
    ("report.audit.sections", "report.tokens", "report.live"),
    ("report.page",),
    ("recorder", "doctor"),
    ("attribution",),
    ("proxies",),
    ("measurement",),
    ("tokens",),
    ("hooks.piggyback",),
    ("hooks.passes",),
    ("hooks.reduction",),
    ("hooks.capture",),
    ("hooks.rules",),
    ("hooks.uses",),
    ("hooks",),
    ("theory",),
    ("losses", "pairs"),
    ("model",),
    ("kernels",),
    ("kernels.gram", "kernels.outer"),
    ("kernels.common",),
    ("pair_gram", "row_gram"),
    ("record",),
    ("figures",),
    ("distributed", "notices", "text"),
    ("errors",),
    ("version",),
)
"""A room may import from rooms on lower floors and from nothing else. A room is a folder or a file of the root."""


def room_of(path: Path) -> str:
    """The room of a file of the package: its folder, or the file itself at the root."""
    inside = path.relative_to(PACKAGE)
    return ".".join(inside.parts[:-1]) if len(inside.parts) > 1 else inside.stem


def rooms() -> dict[str, list[Path]]:
    """Room -> its Python files. The root `__init__`, which gathers the public names, is no room."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != PACKAGE / "__init__.py":
            found.setdefault(room_of(path), []).append(path)
    return found


def place(room: str) -> Path:
    """The file whose docstring says what a room is for."""
    base = PACKAGE / room.replace(".", "/")
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def purpose(room: str) -> str:
    """The first paragraph of a room's docstring, in one line."""
    text = ast.get_docstring(ast.parse(place(room).read_text("utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def table() -> str:
    """The rooms as a Markdown table, top floor first."""
    lines = ["| room | what it is for |", "|---|---|"]
    for floor in FLOORS:
        for room in floor:
            path = f"gradent/{room.replace('.', '/')}"
            name = f"{path}/" if place(room).name == "__init__.py" else f"{path}.py"
            lines.append(f"| `{name}` | {purpose(room)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table between its two marks."""
    before, _, rest = PAGE.read_text("utf-8").partition(START)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{START}\n{table()}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
