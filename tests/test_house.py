"""The house rules: imports run one way, the public names are pinned, importing is cheap, no file names a machine."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import gradent
from scripts import house

ROOT, PACKAGE = house.ROOT, house.PACKAGE
ROOMS = house.rooms()

MOST_FILES = 12
"""Files in a folder, beside its `__init__.py`."""

# Beyond the floors: what a part may not import, not even through another part of gradent.
BARRED: dict[str, frozenset[str]] = {
    "report": frozenset({"torch", "transformers", "peft", "trl", "gradent.measurement", "gradent.hooks"}),
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
    "RowBatch",
    "RowGram",
    "TokenGram",
    "TokenInfluence",
    "Verdict",
    "__version__",
    "attach",
    "audit",
    "losses",
    "measure",
    "measure_rows",
    "measure_tokens",
    "proxies",
    "scan",
    "select",
    "token_effects",
    "token_influence",
    "verdict",
}

MACHINE_PATH = re.compile(r"(?<![A-Za-z0-9.*$}>-])/(?:work|farm|root|home|tmp|Users)/")


def module_file(module: str) -> Path | None:
    """The file of a module of gradent; None for what is no module."""
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imported(source: str, name: str, *, types: bool = True) -> Iterator[str]:
    """Absolute names of the modules that a module imports, in functions too; without `types`, those it runs."""
    tree = ast.parse(source)
    for guard in () if types else [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
        if ast.unparse(guard.test) == "TYPE_CHECKING":
            guard.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import of {node.module}"
            module = node.module or ""
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield inner if module == "gradent" or module_file(inner) else module


def room_of_module(module: str) -> str | None:
    """`gradent.hooks.rules.norm` -> `hooks.rules`; None for what is not gradent's."""
    if not module.startswith("gradent."):
        return None
    path = module_file(module)
    if path is None:  # a public name of `gradent` itself
        path = module_file(gradent._HOME[module.removeprefix("gradent.")])  # noqa: SLF001
    assert path is not None, module
    return house.room_of(path)


def climbs(room: str, imports: Iterable[str]) -> list[str]:
    """Imports of a room that do not go down the house."""
    floor = {name: level for level, names in enumerate(house.FLOORS) for name in names}
    return sorted(
        module
        for module in set(imports)
        if (other := room_of_module(module)) is not None and other != room and floor[other] <= floor[room]
    )


def imports_of(path: Path, *, types: bool = True) -> set[str]:
    return set(imported(path.read_text("utf-8"), path.stem, types=types))


def test_every_room_has_one_floor():
    floors = [name for names in house.FLOORS for name in names]
    assert sorted(floors) == sorted(ROOMS), "give it a floor in scripts/house.py"


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_says_what_it_is_for(room):
    assert len(house.purpose(room)) > 20


def test_contributing_shows_the_rooms():
    assert house.table() in (ROOT / "CONTRIBUTING.md").read_text("utf-8"), "run: python -m scripts.house"


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_imports_run_one_way(room):
    wrong = {path.relative_to(ROOT).as_posix(): up for path in ROOMS[room] if (up := climbs(room, imports_of(path)))}
    assert wrong == {}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that reach each other by imports."""

    def reach(start: str) -> set[str]:
        seen, queue = set(), [start]
        while queue:
            for below in graph[queue.pop()] - seen:
                seen.add(below)
                queue.append(below)
        return seen

    below = {file: reach(file) for file in graph}
    return sorted({tuple(sorted(other for other in below[file] if file in below[other])) for file in graph} - {()})


def test_no_circle_of_files():
    files = [path for paths in ROOMS.values() for path in paths]
    graph = {
        str(path.relative_to(ROOT)): {
            str(below.relative_to(ROOT))
            for module in imports_of(path)
            if module.startswith("gradent.") and (below := module_file(module)) in files and below != path
        }
        for path in files
    }
    assert circles(graph) == []


def test_the_check_of_circles_can_fail():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [("a", "b", "c")]


def test_folders_are_small():
    listed = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    sizes: dict[str, int] = {}
    for path in listed:
        if path.name != "__init__.py":
            folder = path.parent.relative_to(ROOT).as_posix()
            sizes[folder] = sizes.get(folder, 0) + 1
    assert {folder: size for folder, size in sizes.items() if size > MOST_FILES} == {}


def test_no_module_has_the_name_of_a_public_function():
    assert [name for name in sorted(PUBLIC - {"losses", "proxies"}) if module_file(f"gradent.{name}")] == []


@pytest.mark.parametrize("room", sorted(BARRED))
def test_barred_imports(room):
    queue = [path for name, paths in ROOMS.items() if name == room or name.startswith(f"{room}.") for path in paths]
    reached, seen = set(), set(queue)
    while queue:
        for module in imports_of(queue.pop(), types=False):
            reached.add(module)
            below = module_file(module) if module.startswith("gradent.") else None
            if below is not None and below not in seen:
                seen.add(below)
                queue.append(below)
    barred = BARRED[room]
    assert sorted(m for m in reached if m in barred or any(m.startswith(f"{name}.") for name in barred)) == []


@pytest.mark.parametrize(
    ("room", "source", "caught"),
    [
        ("hooks.capture", "from gradent.measurement import measure", ["gradent.measurement"]),
        ("kernels", "def f():\n    import gradent.hooks.rules", ["gradent.hooks.rules"]),
        ("losses", "from gradent import verdict", ["gradent.verdict"]),
        ("pairs", "from gradent.losses import get", ["gradent.losses"]),
        ("errors", "from gradent import PairBatch", ["gradent.PairBatch"]),
        ("hooks.uses", "from gradent.hooks.capture import capture", ["gradent.hooks.capture.capture"]),
        ("measurement", "import torch\nfrom gradent.hooks.capture import capture\nfrom gradent import losses", []),
    ],
)
def test_the_check_of_directions_can_fail(room, source, caught):
    assert climbs(room, imported(source, room)) == caught


def test_public_names_are_pinned():
    assert set(gradent.__all__) == PUBLIC
    assert len(gradent.__all__) == len(PUBLIC)
    assert set(dir(gradent)) >= PUBLIC


def run_python(source: str) -> str:
    """What a fresh interpreter, started in the repository, prints."""
    done = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
