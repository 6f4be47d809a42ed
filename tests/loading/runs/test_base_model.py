"""What runs started from: bases that adapters and model cards name, lost, broken and hostile ones, and --base."""

from __future__ import annotations

import shutil

import pytest

from gradent.errors import InputError
from gradent.loading.runs.discover import choose, find_run
from tests.auditing.runs import make_adapter, make_full, make_run, problem, write_json


def test_an_explicit_base_wins(adapters, base, tmp_path) -> None:
    shutil.rmtree(base)
    other = make_full(tmp_path / "other")
    found = find_run(adapters, base=str(other))
    assert found.base == str(other) and [each.problem for each in found.checkpoints] == [None, None]


def test_a_base_that_is_lost(adapters, base) -> None:
    shutil.rmtree(base)
    for each in find_run(adapters).checkpoints:
        assert f"{each.path}: the base that it names, {str(base)!r}, does not exist here" in str(each.problem)
        assert f"Run: gradent audit {adapters} --base DIR" in str(each.problem)


def test_a_base_that_is_broken(adapters, base) -> None:
    (base / "model.safetensors").write_bytes(b"")
    for each in find_run(adapters).checkpoints:
        said = str(each.problem)
        assert "its base cannot be used" in said and "base/model.safetensors: is no whole" in said
        assert "--base DIR" in said


def test_a_base_that_is_an_adapter(adapters, base) -> None:
    shutil.rmtree(base)
    make_adapter(base, "owner/name")
    assert "is a PEFT adapter (by its adapter_config.json)" in str(find_run(adapters).checkpoints[0].problem)


@pytest.mark.parametrize("name", ["owner/name", "name"])
def test_a_base_on_the_hub(name, adapters) -> None:
    for step in (2, 4):
        write_json(adapters / f"checkpoint-{step}" / "adapter_config.json", {"base_model_name_or_path": name})
    found = find_run(adapters)
    assert found.base == name and [each.problem for each in found.checkpoints] == [None, None]


@pytest.mark.parametrize("name", [None, 7, ""])
def test_an_adapter_that_names_no_base(name, adapters) -> None:
    write_json(adapters / "checkpoint-4" / "adapter_config.json", {"base_model_name_or_path": name})
    assert "its adapter_config.json names no base model" in problem(adapters)
    assert f"gradent audit {adapters} --base DIR" in problem(adapters)


def test_a_run_of_adapters_none_of_which_names_a_base(adapters) -> None:
    for step in (2, 4):
        write_json(adapters / f"checkpoint-{step}" / "adapter_config.json", {})
    found = find_run(adapters)
    assert found.base is None and all("names no base model" in str(each.problem) for each in found.checkpoints)


@pytest.mark.parametrize(
    "name", ["../base", "a/../../base", "\x1b[31m\n<script>" + "x" * 9999, "a\0b", "~/base", "a/b/c"]
)
def test_a_base_that_is_hostile(name, adapters, monkeypatch) -> None:
    monkeypatch.chdir(adapters)
    for step in (2, 4):
        write_json(adapters / f"checkpoint-{step}" / "adapter_config.json", {"base_model_name_or_path": name})
    for each in find_run(adapters).checkpoints:
        said = str(each.problem)
        assert "the base that it names" in said and "--base DIR" in said
        assert said.isprintable() and len(said) < 1500
        if ".." in name:
            assert "is a path out of here, and is not followed" in said


def test_the_base_that_the_user_gives_may_be_a_path_upwards(adapters, monkeypatch) -> None:
    monkeypatch.chdir(adapters)
    assert [each.problem for each in find_run(".", base="../base").checkpoints] == [None, None]


def test_an_adapter_for_another_base(tmp_path, base) -> None:
    run = make_run(tmp_path / "run", steps=(2, 4, 6), base=base)
    write_json(run / "checkpoint-6" / "adapter_config.json", {"base_model_name_or_path": "owner/name"})
    assert "an adapter for another base, 'owner/name'" in problem(run, 6)
    assert "--base DIR" in problem(run, 6) and find_run(run).base == str(base)
    assert [each.problem for each in find_run(run, base=str(base)).checkpoints] == [None] * 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("./gone", "there is no such directory, and it is no hub id"),
        ("run", "base cannot be used: run: no weights in it"),
        ("run/checkpoint-4", "is a PEFT adapter"),
    ],
)
def test_a_given_base_that_cannot_be_one(given, said, adapters, monkeypatch) -> None:
    monkeypatch.chdir(adapters.parent)
    with pytest.raises(InputError, match=rf"(?s){said}.*--base"):
        find_run("run", base=given)


@pytest.mark.parametrize("written", ["base_model: owner/name", "base_model:\n- owner/name"])
def test_the_base_in_the_model_card(written, run) -> None:
    (run / "README.md").write_text(f"---\n{written}\ntags: [trl]\n---\n# Card\n")
    found = find_run(run)
    assert found.base == "owner/name" and found.notes == []
    assert [each.step for each in choose(found, "all")] == [0, 2, 4]


@pytest.mark.parametrize(
    ("card", "why"),
    [
        (b"# no front matter", "its model card names no base_model"),
        (b"---\n---\n", "its model card names no base_model"),
        (b"---\nbase_model: [a, b]\n---\n", "is not a single name"),
        (b"---\nbase_model: 3\n---\n", "is not a single name"),
        (b"---\n- a\n---\n", "cannot be read"),
        (b"---\na: [\n---\n", "cannot be read"),
        (b"---\na: !!python/object/apply:os.getcwd []\n---\n", "cannot be read"),
        (b"---\na: \xff\n---\n", "cannot be read"),
        (b"---\na: " + b"[" * 20_000 + b"\n---\n", "cannot be read"),
        (b"---\nbase_model: ../base\n---\n", "is no model that can be used here"),
        (b'---\nbase_model: "\\e[31m<script>"\n---\n', "is no model that can be used here"),
        (b"x" * 300_000, "is larger than 256 KiB"),
    ],
)
def test_a_model_card_that_names_no_base(card, why, run, base, monkeypatch) -> None:
    monkeypatch.chdir(run)
    (run / "README.md").write_bytes(card)
    found = find_run(run)
    assert found.base is None and found.start is None
    (note,) = found.notes
    assert "(step 0) is left out: " in note and why in note
    assert "--base DIR" in note and "\x1b" not in note
