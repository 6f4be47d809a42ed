"""What of the long tests is owed: which sources changed since their long tests last passed.

`tests/proven.json` holds, for each group of sources, a digest of its files as they were when its long tests passed; a
fresh clone needs no history to compare. `make check` runs the targets that are owed, `make test-all` pays for all.

    python -m scripts.proven owed                      # targets of make, the daily tests last
    python -m scripts.proven record rules -- command   # run it and, where it passes, remember the group's sources
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROVEN = ROOT / "tests" / "proven.json"

GROUPS: dict[str, tuple[str, ...]] = {
    "all": (
        "constraints.txt", "pyproject.toml", "gradent/hooks/rules", "gradent/hooks/uses*", "gradent/kernels",
        "tests/zoo*.py", "tests/zoo_fingerprints.json", "scripts/compile_kernels.py", "tests/kernels/launched.py",
    ),
    "oldest": ("constraints-oldest.txt", "gradent/trainer"),
    "trainer": ("gradent/trainer", "gradent/hooks/piggyback*", "gradent/attribution"),
    "tokens": ("gradent/tokens", "gradent/demo", "scripts/token_claims.py"),
    "docs": ("docs", "examples", "mkdocs.yml", "scripts/docs_site.py", "README.md"),
}  # fmt: skip
"""Group to its sources; `make test-<group>` runs its long tests, `test-all` those of every group."""


def digest(patterns: tuple[str, ...]) -> str:
    """One hash of the names and contents of all files that the patterns name, folders with all that is in them."""
    paths: set[Path] = set()
    for pattern in patterns:
        for path in ROOT.glob(pattern):
            paths |= {path} if path.is_file() else set(path.rglob("*"))
    total = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file() and path.suffix != ".pyc"):
        total.update(f"{path.relative_to(ROOT).as_posix()}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def proven() -> dict[str, str]:
    """Group to the digest of its sources when its long tests last passed."""
    return json.loads(PROVEN.read_text("utf-8")) if PROVEN.exists() else {}


def owed() -> list[str]:
    """The targets of make that a check has to run."""
    groups = [name for name, patterns in GROUPS.items() if proven().get(name) != digest(patterns)]
    return ["test-all"] if "all" in groups else [*(f"test-{name}" for name in groups), "test"]


def record(names: list[str], command: list[str]) -> int:
    """Run a command; where it succeeds, its groups are proven as they were when it began."""
    before = {name: digest(GROUPS[name]) for name in names}
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status == 0:
        PROVEN.write_text(json.dumps(dict(sorted((proven() | before).items())), indent=1) + "\n", "utf-8")
    return status


def main(arguments: list[str]) -> int:
    """The command line, as at the head of this file."""
    if arguments == ["owed"]:
        sys.stdout.write(" ".join(owed()) + "\n")
        return 0
    split = arguments.index("--")
    return record(arguments[1:split], arguments[split + 1 :])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
