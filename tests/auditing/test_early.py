"""What an audit refuses at once: from names alone, before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from gradent import losses
from gradent.auditing.early import check_early
from gradent.auditing.state.config import LOSS_NAMES, AuditConfig
from gradent.auditing.state.journal import LOCK
from gradent.errors import DataFileError, InputError
from gradent.losses.trl import NOT_OF_PAIRS, TRL_TYPES


def config(place: Path, **given: object) -> AuditConfig:
    (place / "pairs.jsonl").write_text("{}\n")
    (place / "run").mkdir(exist_ok=True)
    return AuditConfig(
        **{"model": str(place / "run"), "data": str(place / "pairs.jsonl"), "out": place / "out", **given}
    )


def check(asked: AuditConfig) -> None:
    check_early(asked.loss, asked.data, asked.model, asked.out, quiet=asked.quiet)


def test_the_names_are_those_of_the_losses() -> None:
    known = {*losses.LOSSES, *losses.DESIGNS, *TRL_TYPES, *NOT_OF_PAIRS}
    assert set(LOSS_NAMES) == known and len(LOSS_NAMES) == len(known)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"loss": "dop"}, InputError, r"--loss dop: unknown loss; did you mean 'dpo'\? Accepted: dpo, rdpo"),
        ({"data": "nofile.jsonl"}, DataFileError, r"nofile\.jsonl: there is no such file or directory\. Accepted: a"),
        ({"model": "./no/such/run"}, InputError, r"no/such/run: there is no such directory"),
        ({"model": __file__}, InputError, "is a file; give the directory"),
    ],
)
def test_what_is_refused(given: dict[str, object], error: type[Exception], said: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=said):
        check(config(tmp_path, **given))


def test_what_is_right_passes_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for loss in (None, "dpo", "hinge", losses.get("dpo")):
        check(config(tmp_path, loss=loss))
    assert capsys.readouterr().err == ""


def test_a_name_that_is_left_to_the_hub_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(config(tmp_path, model="owner/my-runn"))
    assert capsys.readouterr().err == "note: there is no directory owner/my-runn here; it is looked for on the hub.\n"
    check(config(tmp_path, model="owner/my-runn", quiet=True))
    assert capsys.readouterr().err == ""


def test_a_directory_that_another_audit_holds(tmp_path: Path) -> None:
    asked = config(tmp_path)
    (asked.out / "journal").mkdir(parents=True)
    with FileLock(asked.out / LOCK), pytest.raises(InputError, match="another audit or scan is writing there now"):
        check(asked)
    check(asked)


@pytest.mark.parametrize("command", ["audit", "scan"])
def test_a_typo_is_told_without_torch(command: str, tmp_path: Path) -> None:
    source = (
        "import sys\nfrom gradent.cli.app import app\n"
        f"try:\n    app([{command!r}, {str(tmp_path)!r}, '--data', 'x.jsonl', '--out', 'o', '--loss', 'dop'])\n"
        "except SystemExit as end:\n    print(end.code, sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "2 []" and "did you mean 'dpo'?" in done.stderr
