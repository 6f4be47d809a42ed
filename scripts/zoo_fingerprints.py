"""Write tests/zoo_fingerprints.json: families whose graph is new are held to every truth first.

python -m scripts.zoo_fingerprints
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from rich.console import Console

from tests.zoo import MEASURABLE, build
from tests.zoo_prints import COMMITTED, facts, fingerprint, print_of

TRUTHS = ("tests/test_zoo.py", "tests/tokens/test_matrix.py", "tests/tokens/test_effects.py")


class _Only:
    """Of the tests over every family, leaves those of some families."""

    def __init__(self, families: set[str]) -> None:
        self.families = families

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Deselect the others."""
        kept = [item for item in items if self._wanted(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept

    def _wanted(self, item: pytest.Item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return parameters.get("name") in self.families and "fingerprint" not in item.name


def main() -> int:
    """Compare, test, write; 1 where a family fails."""
    console, old = Console(), print_of()
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: {"families": [], "facts": []})
    fresh: set[str] = set()
    for name in MEASURABLE:
        found = facts(build(name))
        key = fingerprint(found)
        groups[key]["families"].append(name)
        groups[key]["facts"] = found
        if old.get(name) != key:
            fresh.add(name)
    console.print(f"{len(MEASURABLE)} families, {len(groups)} fingerprints, new or changed: {sorted(fresh) or 'none'}")
    if fresh and pytest.main(["-q", *TRUTHS], plugins=[_Only(fresh)]):
        console.print("Not written: a family with a new fingerprint fails.")
        return 1
    COMMITTED.write_text(json.dumps(dict(sorted(groups.items())), indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
