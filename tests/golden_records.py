"""The golden audit: a small run made by hand, audited, its records and its page freed of what varies.

`make golden` writes both into tests/golden/; tests/test_golden.py holds today's reader, writer and page to them.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from gradent import audit
from gradent.record import (
    read_modules,
    read_pairs,
    read_sample,
    read_steps,
    read_summary,
    read_tokens,
    write_modules,
    write_pairs,
    write_sample,
    write_steps,
    write_tokens,
)
from gradent.report import write_audit_report
from tests.auditing.made import write_jsonl
from tests.auditing.runs import write_state
from tests.auditing.trained import make_base

GOLDEN = Path(__file__).with_name("golden")
RECORDS, PAGE = GOLDEN / "audit", GOLDEN / "page.txt"

TABLES = {
    "pairs": (read_pairs, write_pairs),
    "sample": (read_sample, write_sample),
    "steps": (read_steps, write_steps),
    "modules": (read_modules, write_modules),
    "tokens": (read_tokens, write_tokens),
}

SOMEWHERE = "/somewhere"


def audited(place: Path) -> Path:
    """Records of an audit of two adapters, with nothing in them that is this place's, this version's or this hour's."""
    base = make_base(place / "base")
    for step in (2, 4):
        with torch.random.fork_rng():
            torch.manual_seed(step)
            config = LoraConfig(
                task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False
            )
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        model.save_pretrained(place / "run" / f"checkpoint-{step}")
        logged = [
            {"step": at, "loss": 0.7 - at / 20, "logps/chosen": -9.0 - at, "logps/rejected": -9.5 - 2 * at}
            for at in range(1, step + 1)
        ]
        write_state(place / "run" / f"checkpoint-{step}", step, log_history=logged)
    data = write_jsonl(place / "pairs.jsonl", _pairs())
    audit(place / "run", data, out=place / "out", token_pairs=2, device="cpu", report=False, quiet=True)
    return _without_place(place / "out", place)


def _pairs() -> list[dict[str, str]]:
    """Twelve pairs, no two alike: equal ones tie, and rounding would then decide their order."""
    things, ends = ("film", "soup", "book"), ("truly good .", "quite warm .", "a quiet joy !", "felt a bore .")
    return [
        {"prompt": f"the {thing} was", "chosen": f" bright {end}", "rejected": f" dull {end}"}
        for end in ends
        for thing in things
    ]


def _without_place(records: Path, place: Path) -> Path:
    summary = json.loads((records / "summary.json").read_text("utf-8").replace(str(place), SOMEWHERE))
    summary |= {"seconds": 1.5, "gradent_version": "0"}
    (records / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", "utf-8")
    columns = TABLES["sample"][0](records / "sample.parquet").to_pydict()
    columns["where"] = [where.replace(str(place), SOMEWHERE) for where in columns["where"]]
    TABLES["sample"][1](records / "sample.parquet", columns)
    return records


def contents(records: Path) -> dict[str, Any]:
    """All that a record directory holds, as plain values, by today's readers."""
    tables = {name: read(records / f"{name}.parquet").to_pydict() for name, (read, _) in TABLES.items()}
    return {"summary": dict(read_summary(records / "summary.json")), **tables}


class _Text(HTMLParser):
    """The page as lines, numbers masked: a heading, a paragraph, a row of a table each; no scripts, no drawings."""

    HIDDEN = frozenset({"script", "style", "svg"})
    INLINE = frozenset({"a", "abbr", "b", "code", "em", "i", "small", "span", "strong", "sub", "sup", "td", "th"})
    NUMBER = re.compile(r"[-−+]?\d[\d,]*(\.\d+)?([eE][-−+]?\d+)?")

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._block, self._text, self._hidden = "", "", 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in self.HIDDEN
        if tag in ("td", "th"):
            self._text += " | "
        elif tag not in self.INLINE:
            self._end(tag)
        told = [value for name, value in attrs if name in ("id", "alt", "aria-label", "href") and value]
        if told and not self._hidden:
            self._text += f" [{' '.join(told)}] "

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in self.HIDDEN
        if tag not in self.INLINE:
            self._end("")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._text += data

    def _end(self, block: str) -> None:
        line = f"{self._block}: {self.NUMBER.sub('#', ' '.join(self._text.split()))}"
        if self._text.strip() and line not in self.lines[-1:]:  # rows that differ by their numbers alone are one line
            self.lines.append(line)
        self._block, self._text = block, ""


def page_of(records: Path) -> str:
    """What the page of these records says, numbers masked."""
    write_audit_report(records)
    reader = _Text()
    reader.feed((records / "report.html").read_text("utf-8"))
    return "\n".join(reader.lines) + "\n"


def main() -> int:
    """Renew tests/golden/: records first, then the page of them."""
    with tempfile.TemporaryDirectory() as folder:
        made = audited(Path(folder))
        RECORDS.mkdir(parents=True, exist_ok=True)
        for name in ("summary.json", *(f"{name}.parquet" for name in TABLES)):
            (RECORDS / name).write_bytes((made / name).read_bytes())
        PAGE.write_text(page_of(made), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
