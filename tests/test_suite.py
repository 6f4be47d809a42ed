"""The suite about itself: what is made once, what is owed, what took too long, and mutants that a test must notice."""

from __future__ import annotations

import ast
import itertools
import json
from pathlib import Path

import pytest

from scripts import mutants, proven
from tests.budgets import BUDGETS, over_budget
from tests.covering import covering_rows
from tests.shared import folder_once, value_once
from tests.zoo import MEASURABLE
from tests.zoo_prints import chosen, print_of, zoo


def test_what_is_made_once_is_made_once_and_again_after_a_failure(request) -> None:
    made = []

    def make() -> list[int]:
        made.append(len(made))
        if len(made) == 1:
            raise OSError("not yet")
        return made

    key = request.node.nodeid
    with pytest.raises(OSError, match="not yet"):
        value_once(key, make)
    assert value_once(key, make) == value_once(key, make) == [0, 1]
    assert folder_once(key, lambda _: None) != folder_once((key, 2), lambda folder: folder.mkdir())


def test_every_fingerprint_has_one_daily_family() -> None:
    daily = [name for name in zoo() if isinstance(name, str)]
    assert sorted(daily) == sorted(chosen())
    assert sorted(print_of()[name] for name in daily) == sorted(set(print_of().values()))
    assert len(zoo()) == len(MEASURABLE)


def test_a_new_family_is_a_daily_one(monkeypatch) -> None:
    known = dict(print_of())
    del known["mistral"]
    monkeypatch.setattr("tests.zoo_prints.print_of", lambda: known)
    assert "mistral" in chosen()


def test_files_over_their_budgets_are_named_whatever_the_machine() -> None:
    budgets = {"a.py": 10.0, "b.py": 30.0, "c.py": 60.0}
    for speed in (0.5, 1.0, 4.0):
        took = {name: speed * seconds for name, seconds in budgets.items()}
        assert over_budget(took, budgets) == []
        assert len(over_budget({**took, "new.py": 6.0}, budgets)) == 1
    (line,) = over_budget({**budgets, "a.py": 60.0}, budgets)
    assert line.startswith("a.py: 60 s, 15 s budgeted")


def test_budgets_are_of_files_that_exist() -> None:
    root = Path(__file__).parents[1]
    assert [name for name in json.loads(BUDGETS.read_text()) if not (root / name).is_file()] == []


def test_long_tests_are_owed_until_they_passed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(proven, "ROOT", tmp_path)
    monkeypatch.setattr(proven, "PROVEN", tmp_path / "proven.json")
    (tmp_path / "gradent" / "kernels").mkdir(parents=True)
    kernel = tmp_path / "gradent" / "kernels" / "gram.py"
    kernel.write_text("1")
    assert proven.owed() == ["test-all"]
    assert proven.record(list(proven.GROUPS), ["false"]) == 1
    assert proven.owed() == ["test-all"]
    assert proven.record(list(proven.GROUPS), ["true"]) == 0
    assert proven.owed() == ["test"]
    (tmp_path / "README.md").write_text("new")
    assert proven.owed() == ["test-docs", "test"]
    kernel.write_text("2")
    assert proven.owed() == ["test-all"]
    kernel.write_text("1")
    assert proven.record(["docs"], ["true"]) == 0
    assert proven.owed() == ["test"]


def test_mutants_differ_by_one_change_each(tmp_path) -> None:
    source = (
        'def f(a, b=1):\n    """1 < 2"""\n    if a < b and not b:\n        raise E(f"{a + 1}")\n    return -a * 2\n'
    )
    path = tmp_path / "module.py"
    path.write_text(source)
    changed = [(mutant.before, mutant.after) for mutant in mutants.mutants(path)]
    assert changed == [
        ("1", "2"),
        ("if a < b and (not b):", "if not (a < b and (not b)):"),
        ("a < b and (not b)", "a < b or not b"),
        ("a < b", "a <= b"),
        ("not b", "b"),
        ("raise E(f'{a + 1}')", "pass"),
        ("-a * 2", "-a / 2"),
        ("-a", "a"),
        ("2", "3"),
    ]
    assert all(ast.unparse(mutant.tree) != ast.unparse(ast.parse(source)) for mutant in mutants.mutants(path))


@pytest.mark.parametrize(
    ("sizes", "most"), [((3, 2, 2, 3), 10), ((6, 3, 2), 18), ((2, 9, 2), 18), ((4, 4, 4, 4), 24), ((2,) * 8, 9)]
)
def test_a_covering_array_has_every_pair(sizes, most) -> None:
    rows = covering_rows(sizes)
    for one, other in itertools.combinations(range(len(sizes)), 2):
        pairs = set(itertools.product(range(sizes[one]), range(sizes[other])))
        assert {(row[one], row[other]) for row in rows} == pairs
    assert len(rows) <= most
