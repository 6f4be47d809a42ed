"""The house rules: imports run one way, the public names are pinned, importing is cheap, no file names a machine."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gradent

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gradent"

# The house, top floor first. What stands on a floor may import from the floors below it and from nothing else.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("demo",),
    ("trainer",),
    ("planning",),
    ("audit",),
    ("report",),
    ("recorder", "doctor"),
    ("measure", "tokens", "effects"),
    ("token_tangents",),
    ("verdict", "theory"),
    ("stream",),
    ("losses", "pairs", "record"),
    ("hooks",),
    ("traits",),
    ("metric", "model", "directions", "forward_mode"),
    ("kernels", "layers"),
    ("gram", "token_gram"),
    ("token_figure",),
    ("files", "token_text"),
    ("errors",),
    ("version",),
)

# Beyond the floors: what a part may not import, not even through another part of gradent.
BARRED: dict[str, frozenset[str]] = {
    "report": frozenset({"torch", "transformers", "peft", "trl", "gradent.measure", "gradent.hooks"}),
    "record": frozenset({"torch", "transformers"}),
    "errors": frozenset({"torch", "transformers", "rich", "typer"}),
    "kernels": frozenset({"transformers", "peft", "trl"}),
    "model": frozenset({"trl", "rich", "typer"}),
    "hooks": frozenset({"trl", "rich", "typer"}),
    "losses": frozenset({"transformers", "trl"}),
}

PUBLIC = {
    "EntanglementCallback",
    "GradentError",
    "GradentWarning",
    "PairBatch",
    "PairGram",
    "TokenGram",
    "Verdict",
    "__version__",
    "attach",
    "audit",
    "losses",
    "measure",
    "measure_tokens",
    "token_effects",
    "verdict",
}

MACHINE_PATH = re.compile(r"(?<![A-Za-z0-9.*$}>-])/(?:work|farm|root|home|tmp|Users)/")


def imported(source: str, package: str) -> Iterator[str]:
    """Absolute names that a module imports, in functions too; `from gradent import x` counts as `gradent.x`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{package}: relative import of {node.module}"
            module = node.module or ""
            if module == "gradent":
                yield from (f"gradent.{alias.name}" for alias in node.names)
            else:
                yield module


def part_of(module: str) -> str | None:
    """`gradent.hooks.rules.norm` -> `hooks`; None for what is not gradent's."""
    head, _, rest = module.partition(".")
    return rest.split(".")[0] if head == "gradent" else None


def climbs(part: str, imports: Iterator[str] | list[str]) -> list[str]:
    """Imports of `part` that do not go down the house."""
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    return sorted(
        module
        for module in imports
        if (other := part_of(module)) is not None and other != part and floor.get(other, -1) <= floor[part]
    )


def parts() -> dict[str, list[Path]]:
    """Part -> its files. The root `__init__`, which gathers the public names, is no part."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        if inside.as_posix() != "__init__.py":
            found.setdefault(inside.parts[0].removesuffix(".py"), []).append(path)
    return found


PARTS = parts()


def imports_of(part: str) -> set[str]:
    return {module for path in PARTS[part] for module in imported(path.read_text("utf-8"), path.stem)}


def test_every_part_has_a_floor():
    assert set(PARTS) - {name for names in FLOORS for name in names} == set(), "give it a floor in FLOORS"


@pytest.mark.parametrize("part", sorted(set(PARTS) - {"__main__"}))
def test_contributing_shows_every_part(part):
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert f"`gradent/{part}/`" in text or f"`gradent/{part}.py`" in text


@pytest.mark.parametrize("part", sorted(PARTS))
def test_imports_run_one_way(part):
    wrong = {
        path.relative_to(ROOT).as_posix(): up
        for path in PARTS[part]
        if (up := climbs(part, list(imported(path.read_text("utf-8"), path.stem))))
    }
    assert wrong == {}


@pytest.mark.parametrize("part", sorted(BARRED))
def test_barred_imports(part):
    reached, queue = set(), [part]
    while queue:
        now = queue.pop()
        for module in imports_of(now):
            reached.add(module)
            below = part_of(module)
            if below in PARTS and f"gradent.{below}" not in reached:
                reached.add(f"gradent.{below}")
                queue.append(below)
    barred = BARRED[part]
    assert sorted(m for m in reached if m in barred or any(m.startswith(f"{name}.") for name in barred)) == []


@pytest.mark.parametrize(
    ("part", "source", "caught"),
    [
        ("hooks", "from gradent.measurement import measure", ["gradent.measure"]),
        ("kernels", "def f():\n    import gradent.hooks.rules", ["gradent.hooks.rules"]),
        ("losses", "from gradent import verdict", ["gradent.verdict"]),
        ("pairs", "from gradent.losses import get", ["gradent.losses"]),
        ("errors", "from gradent import PairBatch", ["gradent.PairBatch"]),
        ("measure", "import torch\nfrom gradent.hooks import capture\nfrom gradent.pair_gram import PairGram", []),
    ],
)
def test_the_check_of_directions_can_fail(part, source, caught):
    assert climbs(part, imported(source, part)) == caught


def test_public_names_are_pinned():
    assert set(gradent.__all__) == PUBLIC
    assert len(gradent.__all__) == len(PUBLIC)
    assert set(dir(gradent)) >= PUBLIC


def run_python(source: str) -> str:
    """What a fresh interpreter, started in the repository, prints."""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["audit", "measure", "verdict"])
def test_a_public_function_is_not_shadowed_by_its_module(name):
    # `gradent.measure` is a module and a function: whatever was imported before, the public name is the function.
    source = f"import gradent.{name}\nimport gradent\nfrom gradent import {name}\n"
    source += f"print(type({name}).__name__, gradent.{name} is {name})"
    assert run_python(source).split() == ["function", "True"]


HEAVY = {"datasets", "jinja2", "matplotlib", "peft", "plotly", "pyarrow", "torch", "transformers", "trl", "wandb"}


def loaded_by(source: str) -> set[str]:
    return set(run_python(f"import sys\n{source}\nprint(*sorted({HEAVY} & set(sys.modules)))").split())


@pytest.mark.parametrize("module", ["gradent", "gradent.cli.app", "gradent.record", "gradent.report"])
def test_importing_is_cheap(module):
    assert loaded_by(f"import {module}") == set()


def test_measuring_loads_no_optional_package():
    names = ", ".join(sorted(PUBLIC))
    assert loaded_by(f"from gradent import {names}") <= loaded_by("import torch, transformers, peft, accelerate")


def test_no_file_names_a_machine_path():
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of the repository's own files")
    listed = subprocess.run(
        [git, "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert "pyproject.toml" in listed
    named = []
    for name in listed:
        content = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b""
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), 1):
            if MACHINE_PATH.search(line):
                named.append(f"{name}:{number}: {line.strip()[:100]}")
    assert named == []


@pytest.mark.parametrize("line", ["see /{}/main", '"/{}/x"', "path=/{}/me", "/{}/.cache"])
@pytest.mark.parametrize("folder", ["work", "root", "home", "tmp"])
def test_the_check_of_paths_can_fail(line, folder):
    assert MACHINE_PATH.search(line.format(folder))
    assert not MACHINE_PATH.search(line.replace("/{}", "docs/{}").format(folder))
