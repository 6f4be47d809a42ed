"""What a run's files say of how it tokenized: its TRL, its limits, its day; and that an audit goes by it."""

from __future__ import annotations

import os
import pickle
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import trl

from gradent.loading.training_args import read_trained
from tests.auditing.made import FORMATS
from tests.loading.test_prepare import run

CARD = "### Framework versions\n\n- TRL: {}\n- Transformers: 4.57.6\n"


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("trapped",)


def write_args(directory: Path, **options: Any) -> None:
    args = trl.DPOConfig(str(directory), report_to="none", bf16=False, use_cpu=True, **options)
    torch.save(args, directory / "training_args.bin")


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 77, "truncation_mode": "keep_end"},
        {"max_length": None, "truncation_mode": "keep_start"},
        {"max_length": 1024, "truncation_mode": "keep_end", "run_name": "keep_start"},
    ],
)
def test_limits_are_read_from_the_arguments(options, tmp_path) -> None:
    write_args(tmp_path, **options)
    found = read_trained([str(tmp_path)]).limits
    assert (found["max_length"], found["truncation_mode"]) == (options["max_length"], options["truncation_mode"])


def test_nothing_is_run_while_they_are_read(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"max_length": 5, "trap": Trap()}, tmp_path / "training_args.bin")
    assert read_trained([str(tmp_path)]).limits == {"max_length": 5}
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("content", [b"", b"no zip", pickle.dumps({"max_length": 3})])
def test_what_cannot_be_read_says_nothing(content, tmp_path) -> None:
    (tmp_path / "training_args.bin").write_bytes(content)
    assert read_trained([str(tmp_path), "owner/name"]).limits == {}


def test_a_run_s_release_is_in_its_card(tmp_path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (tmp_path / "README.md").write_text(CARD.format("0.24.0"), "utf-8")
    assert read_trained([str(checkpoint)]).release == "0.24.0"
    assert read_trained([str(tmp_path / "checkpoint-4")]).release is None


def test_an_audit_goes_by_the_arguments_of_its_run(local_model) -> None:
    write_args(local_model, max_length=40, truncation_mode="keep_end")
    rows = [{"prompt": 60 * "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": 60 * "a", "rejected": "b"}]
    ready, told = run(local_model, rows)
    how = ready.material.how
    assert (how.max_length, how.truncation_mode) == (40, "keep_end")
    assert "max_length is 40, as the run's training_args.bin says" in told
    assert "truncation_mode is keep_end, as the run's training_args.bin says" in told
    assert "3 of 4 rows lost their beginning to max_length 40, as in TRL with truncation_mode='keep_end'." in told
    assert [pair.longest for pair in ready.material.pairs.pairs] == [40, 40]
    first = ready.material.pairs.pairs[1]
    assert (first.prompt_ids, first.rejected_prompt_ids, len(first.chosen_ids)) != ([], None, 40)
    assert len(first.prompt_ids) == 1 and len(first.chosen_ids) == 39  # nothing predicts its first token
    ready, told = run(local_model, rows[1:], truncation_mode="keep_start", max_length=50)
    assert (ready.material.how.truncation_mode, ready.material.max_length) == ("keep_start", 50)
    assert "training_args" not in told


def test_an_older_release_has_its_own_tokens(local_model) -> None:
    (local_model / "README.md").write_text(CARD.format("0.24.0"), "utf-8")
    ready, told = run(local_model)
    assert "tokenized as TRL 0.24.0 did it" in told or trl.__version__.startswith("0.24")
    assert ready.material.how.max_prompt_length == 512 and ready.material.how.truncation_mode == "keep_end"
    assert all(pair.prompt_ids[:1] != [1] for pair in ready.material.pairs.pairs)  # no BOS there


def test_a_date_in_the_template_is_that_of_the_run(local_model, tiny_tokenizer) -> None:
    tiny_tokenizer.chat_template = "{{ strftime_now('%d %b %Y %H:%M:%S') }} " + tiny_tokenizer.chat_template
    tiny_tokenizer.save_pretrained(local_model)
    state = local_model / "trainer_state.json"
    state.write_text('{"global_step": 3, "log_history": []}', "utf-8")
    day = datetime(2026, 3, 4, 5, 6, 7).timestamp()
    os.utime(state, (day, day))
    ready, told = run(local_model, FORMATS["messages"])
    assert "The chat template prints the date: it is 2026-03-04 05:06 here, when the run saved its first state" in told
    (first, *_) = ready.material.pairs.pairs
    assert "04 Mar 2026 05:06:07" in ready.material.tokenizer.decode(first.prompt_ids)
    assert run(local_model, FORMATS["messages"])[0].material.pairs == ready.material.pairs
    _, told = run(local_model)  # strings need no template
    assert "prints the date" not in told
