"""An audit of a run that somebody else made: nothing pickled is loaded, and its texts do nothing on the page."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from gradent import audit
from tests.auditing.trained import Trained, train_run
from tests.report.browser import document, listening, needs_chromium


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("lora", [True, False])
def test_nothing_pickled_is_loaded(lora, tmp_path) -> None:
    made: Trained = train_run(tmp_path / "trained", lora=lora, data_rows=8)
    trap, proof = tmp_path / "ran", tmp_path / "proof"
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.exists()  # the trap works
    pickled = [path for path in made.run.rglob("*") if path.suffix in {".bin", ".pt", ".pth"}]
    assert any(path.name == "training_args.bin" for path in pickled)
    for path in [*pickled, *(path.parent / "pytorch_model.bin" for path in pickled)]:
        path.write_bytes(pickle.dumps(Payload(trap)))
    result = audit(made.run, made.pairs, base=made.base, out=tmp_path / "out", report=False, quiet=True)
    assert result.summary["left_out"] == []
    assert not trap.exists()


@needs_chromium
def test_texts_of_the_data_and_names_of_the_run_do_nothing_on_the_page(local_model, tmp_path) -> None:
    with listening() as (server, asked):
        call = "document.title='ran'"
        texts = [
            f"<script>{call}</script>", f"</script><script>{call}</script>", f"<img src={server}/i onerror={call}>",
            "{{ 7 * 7 }} {% raw %}", f'\u202e" onfocus="{call}" autofocus x="', f"<a href=javascript:{call}>ok</a>",
        ]  # fmt: skip
        rows = [{"prompt": text[:40], "chosen": f" a {text}", "rejected": f" b {text}"} for text in texts]
        data = tmp_path / "<img src=x onerror=alert(1)>.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        result = audit(local_model, data, out=tmp_path / "out", token_pairs=len(rows), quiet=True)
        assert result.report_path is not None
        shown = document(result.report_path, tmp_path / "profile")
        assert "<title>ran" not in shown and asked == []
        assert "&lt;script&gt;" in shown and "{{ 7 * 7 }}" in shown
        page = tmp_path / "bare.html"  # and a page that does not escape would have been caught
        page.write_text(f"<title>x</title>{texts[0]}")
        assert "<title>ran" in document(page, tmp_path / "profile")
