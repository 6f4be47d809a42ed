"""The page of token masks, from its parquet file alone: every mask where it belongs, every token as text."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gradent.errors import DataFileError, InputError
from gradent.record.masks import MASK_COLUMNS, mask_schema, read_masks, write_masks
from gradent.record.schema import TOKENS
from gradent.report.tokens.masks import write_mask_report
from tests.report.test_page import read
from tests.report.test_tokens_page import blocks
from tests.report.token_records import HOSTILE


def columns(pairs: list[tuple[list[str], list[str]]], masks: list[float]) -> dict[str, list[Any]]:
    """Rows of these tokens, with the masks one after the other, over and over."""
    made: dict[str, list[Any]] = {name: [] for name in MASK_COLUMNS}
    for pair, sides in enumerate(pairs):
        for side, texts in zip(("chosen", "rejected"), sides, strict=True):
            for position, text in enumerate(texts):
                mask = masks[len(made["pair"]) % len(masks)]
                row = (pair, side, position, position + 3, text, 4 * mask - 2, mask, mask >= 0.5)
                for name, value in zip(MASK_COLUMNS, row, strict=True):
                    made[name].append(value)
    return made


def page(place: Path, made: dict[str, list[Any]], **options: Any) -> str:
    write_masks(place / "masks.parquet", made)
    return write_mask_report(place / "masks.parquet", **options).read_text("utf-8")


def test_the_file_is_one_of_its_kind(tmp_path: Path) -> None:
    made = columns([(["a", "b"], ["c"])], [0.9, 0.25])
    write_masks(tmp_path / "masks.parquet", made)
    table = read_masks(tmp_path / "masks.parquet")
    assert table.to_pydict() == made
    assert table.schema.equals(mask_schema(), check_metadata=True)
    with pytest.raises(InputError, match=r"write_masks: missing columns \['kept'\]"):
        write_masks(tmp_path / "x.parquet", {name: made[name] for name in MASK_COLUMNS if name != "kept"})


def test_colours_and_weight_say_the_mask(tmp_path: Path) -> None:
    html = page(tmp_path, columns([(["The", " film"], [" was", " long"]), (["A"], ["B"])], [1.0, 0.25, 0.6, 0.0]))
    texts = [[span["text"] for span in block] for block in blocks(html)]
    assert texts == [["The", " film"], [" was", " long"], ["A"], ["B"]]
    spans = [span for block in blocks(html) for span in block]
    assert [span["class"] for span in spans] == [
        "above blue strong", "below red", "above blue strong", "below red", "above blue strong", "below red",
    ]  # fmt: skip
    assert [span["style"] for span in spans][:4] == ["--depth:1.00", "--depth:0.71", "--depth:0.45", "--depth:1.00"]
    assert spans[1]["title"] == "1 · ␣film: left out, mask 0.250, score -1.00"
    text = read(html).text
    assert "66.7% of the chosen and 33.3% of the rejected tokens" in text
    assert "Pair 0, chosen" in text and "Pair 1, rejected" in text


def test_what_is_kept_most_often(tmp_path: Path) -> None:
    made = columns([(["x", "y", "x"], ["x", "y", "z"])], [0.9, 0.1, 0.9, 0.2, 0.1, 0.1])
    text = re.sub(r"\s+", " ", read(page(tmp_path, made)).text)
    assert re.search(r"Mean mask x2366\.7%0\.667 The tokens most often left out", text)
    assert re.search(r"y22100\.0%0\.100 x1333\.3%0\.667 z11100\.0%0\.100", text)  # cells follow without a space
    nothing = page(tmp_path, columns([(["x"], ["y"])], [0.1]))
    assert "No token is kept." in read(nothing).text


def test_where_all_are_kept_the_page_says_so_and_stops(tmp_path: Path) -> None:
    dpo = page(tmp_path, columns([(["x"] * 40, ["y"])] * 60, [1.0]))
    assert "<h1>All tokens are kept, with masks of 1: this run was DPO</h1>" in dpo
    assert not blocks(dpo) and "most often" not in dpo and "100.0%" in dpo
    soft = page(tmp_path, columns([(["x"], ["y"])], [0.9, 0.75]))
    assert "<h1>All tokens are kept: masks lie between 0.750 and 0.900</h1>" in soft and not blocks(soft)


def test_hostile_tokens(tmp_path: Path) -> None:
    html = page(tmp_path, columns([([*HOSTILE, " one"], [" zero", *HOSTILE])], [0.9, 0.2, 0.5]))
    shown = read(html)
    assert shown.tags.count("script") == 1  # the page's own
    assert not {"img", "b", "br", "link", "iframe"} & set(shown.tags)
    assert shown.loads == [] and shown.policy.startswith("default-src 'none'")
    assert not set("\u202e\x00\x1b") & set(html)
    assert "{{7*7}}" in shown.text and "$x$" in shown.text
    texts = [span["text"] for span in blocks(html)[0]]
    assert texts[:5] == ["</script><img src=x onerror=alert(1)>", "<b>", "{{7*7}}", "$x$", "\\u202eabc"]
    assert texts[5:10] == ["\\x00", "⏎\n", "\t", " ", "(empty)"]
    assert {name for block in blocks(html) for span in block for name in span} == {"class", "style", "title", "text"}


def test_only_some_pairs_are_shown_and_the_page_says_so(tmp_path: Path) -> None:
    made = columns([(["a"], ["b"])] * 7, [0.9, 0.1])
    html = page(tmp_path, made, pairs=2)
    assert len(blocks(html)) == 4
    assert "The first 2 of 7 pairs are shown" in read(html).text and "14 response tokens" in read(html).text
    assert "Not all pairs" not in read(page(tmp_path, made)).text


def test_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pairs=0; accepted is a number of pairs >= 1"):
        write_mask_report(tmp_path / "masks.parquet", pairs=0)
    with pytest.raises(DataFileError, match="no such file"):
        write_mask_report(tmp_path / "masks.parquet")
    write_masks(tmp_path / "masks.parquet", columns([], [0.5]))
    with pytest.raises(DataFileError, match="holds no token"):
        write_mask_report(tmp_path / "masks.parquet")
    TOKENS.write(tmp_path / "tokens.parquet", {name: [] for name in TOKENS.columns})
    with pytest.raises(DataFileError, match=r"not one of gradent's records of masks \(its schema is 'tokens'\)"):
        write_mask_report(tmp_path / "tokens.parquet")


def test_the_page_needs_no_torch(tmp_path: Path) -> None:
    write_masks(tmp_path / "masks.parquet", columns([(["a"], ["b"])], [0.9]))
    source = (
        "import sys\nfrom gradent.report.tokens.masks import write_mask_report\n"
        f"write_mask_report({str(tmp_path / 'masks.parquet')!r}, {str(tmp_path / 'other.html')!r})\n"
        "print({'torch', 'transformers', 'trl'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert (tmp_path / "other.html").is_file() and not (tmp_path / "masks.html").exists()
