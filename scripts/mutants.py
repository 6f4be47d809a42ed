"""Does a test notice? Changes one operator, number or branch of a module at a time and runs the module's tests.

Run as `make mutants`, or `python -m scripts.mutants conditions losses`. A survivor, a change that every test passes, is
to be killed by a new test or explained in docs/mutants.md; one that is not there makes the exit status 1.

mutmut (3.8) was tried first. It leaves decorated functions and class bodies alone, which here are the properties of
Condition 2, the table of hyperparameters and the losses' defaults, and most of its survivors are words of messages.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib.machinery
import os
import resource
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
EXPLAINED = ROOT / "docs" / "mutants.md"
PATIENCE = 120
"""Seconds of the processor's that a mutant may take before it counts as killed."""

TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "conditions": (
        ("gradent/theory/conditions.py",),
        ("tests/theory/test_conditions.py", "tests/losses/test_designs.py"),
    ),
    "losses": (
        ("gradent/losses/*.py",),
        (
            "tests/losses/test_refusals.py",
            "tests/losses/test_token_masked.py",
            "tests/losses/test_losses.py",
            "tests/losses/test_designs.py",
        ),
    ),
    "coefficients": (
        ("gradent/hooks/piggyback/coefficients.py",),
        ("tests/hooks/piggyback/test_coefficients.py", "tests/hooks/piggyback/test_watcher.py"),
    ),
    "decide": (
        ("gradent/kernels/strategy.py",),
        (
            "tests/kernels/test_strategy_torch.py",
            "tests/kernels/test_strategy_kernels.py",
            "tests/kernels/test_strategy.py",
        ),
    ),
}
"""Name to (where the code is, the tests that should notice)."""

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip

NAMES = {
    "min": "max", "max": "min", "all": "any", "any": "all", "clamp_min": "clamp_max", "clamp_max": "clamp_min",
    "chosen_sq": "rejected_sq", "rejected_sq": "chosen_sq", "chosen_logp": "rejected_logp",
    "rejected_logp": "chosen_logp", "chosen_len": "rejected_len", "rejected_len": "chosen_len",
    "d_w": "d_l", "d_l": "d_w",
}  # fmt: skip
"""Attributes and names that are easily taken for one another."""


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    path: Path
    place: str
    line: int
    before: str
    after: str
    tree: ast.Module

    @property
    def key(self) -> str:
        """How docs/mutants.md names it."""
        return f"`{self.place}`: `{self.before}` → `{self.after}`"


def mutants(path: Path) -> Iterator[Mutant]:
    """Every mutant of a module."""
    tree = ast.parse(path.read_text("utf-8"))
    for trail in _places(tree, []):
        for change in _changes(_at(tree, trail)):
            changed = copy.deepcopy(tree)
            parent, (field, index) = _at(changed, trail[:-1]), trail[-1]
            if index is None:
                setattr(parent, field, change)
            else:
                getattr(parent, field)[index] = change
            yield Mutant(
                path, _function(tree, trail), _line(tree, trail), _shown(_at(tree, trail)), _shown(change),
                ast.fix_missing_locations(changed),
            )  # fmt: skip


Trail = list[tuple[str, "int | None"]]


def _places(node: ast.AST, trail: Trail) -> Iterator[Trail]:
    """Ways down to every node that is code: not to annotations, docstrings, f-strings, messages, lists of names."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.JoinedStr, ast.Import, ast.ImportFrom)):
                continue
            way = [*trail, (field, index)]
            yield way
            if not isinstance(child, ast.Raise) and not _names_only(child):
                yield from _places(child, way)


def _names_only(node: ast.AST) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)


def _at(tree: ast.AST, trail: Trail) -> ast.AST:
    for field, index in trail:
        tree = getattr(tree, field) if index is None else getattr(tree, field)[index]
    return tree


def _changes(node: ast.AST) -> Iterator[ast.AST]:
    """What a node is changed into."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            yield _with(node, ops=[SWAPS[type(op)]()])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in SWAPS:
            yield _with(node, op=SWAPS[type(op)]())
        case ast.UnaryOp(operand=operand):
            yield operand
        case ast.If(test=test) | ast.IfExp(test=test) if not isinstance(test, (ast.Compare, ast.UnaryOp)):
            yield _with(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.Raise():
            yield ast.Pass()
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Attribute(attr=name) if name in NAMES:
            yield _with(node, attr=NAMES[name])
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMES:
            yield _with(node, id=NAMES[name])


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _shown(node: ast.AST) -> str:
    text = ast.unparse(node).splitlines()[0]
    return text if len(text) <= 70 else f"{text[:69]}…"


def _line(tree: ast.AST, trail: Trail) -> int:
    return max(getattr(_at(tree, trail[:depth]), "lineno", 0) for depth in range(len(trail) + 1))


def _function(tree: ast.AST, trail: Trail) -> str:
    kinds = (ast.FunctionDef, ast.ClassDef)
    nodes = [_at(tree, trail[:depth]) for depth in range(len(trail) + 1)]
    return ".".join(node.name for node in nodes if isinstance(node, kinds)) or "module"


def survives(mutant: Mutant | None, tests: tuple[str, ...], loaded: Path | None = None) -> bool:
    """Whether the tests pass with the mutant (None: as it is), in a process that may note which modules they load."""
    child = os.fork()
    if not child:
        _run(mutant, tests, loaded)
    _, status = os.waitpid(child, 0)
    return status == 0


def _run(mutant: Mutant | None, tests: tuple[str, ...], loaded: Path | None) -> None:
    """In the process: the mutant in place of its module, the tests up to the first that fails; never returns."""
    resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    honest = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: importlib.machinery.SourceFileLoader, name: str) -> types.CodeType | None:
        if mutant is not None and Path(self.path).resolve() == mutant.path:
            return compile(mutant.tree, self.path, "exec")
        return honest(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not nightly", *tests]))
    if loaded is not None:
        loaded.write_text("\n".join(sys.modules))
    os._exit(status)


def _passes_as_it_is(tests: tuple[str, ...]) -> bool:
    """Whether the tests pass; what they load beside gradent is imported here, before the mutants' processes fork."""
    with tempfile.NamedTemporaryFile() as file:
        passed = survives(None, tests, Path(file.name))
        for name in Path(file.name).read_text().split():
            if name.split(".")[0] not in ("gradent", "tests", "scripts", "conftest", "__main__"):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
    return passed


def main(names: list[str]) -> int:
    """Try every mutant of the targets (all by default); 1 where one survives that docs/mutants.md does not explain."""
    console, known = Console(soft_wrap=True), EXPLAINED.read_text("utf-8")
    unexplained = 0
    for name in names or TARGETS:
        patterns, tests = TARGETS[name]
        paths = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
        tests = tuple(str(ROOT / test) for test in tests if (ROOT / test).exists())
        if not paths or not tests:
            console.print(f"{name}: not there")
            continue
        if not _passes_as_it_is(tests):
            console.print(f"{name}: its tests fail without any change")
            return 1
        every = [mutant for path in paths for mutant in mutants(path)]
        left = 0
        for mutant in every:
            if survives(mutant, tests):
                left += 1
                news = mutant.key not in known
                unexplained += news
                where = f"{mutant.path.relative_to(ROOT)}:{mutant.line}"
                console.print(f"  {'NEW ' if news else ''}{where} {mutant.key}", markup=False, highlight=False)
        console.print(f"{name}: {len(every)} mutants, {len(every) - left} killed, {left} survive")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
