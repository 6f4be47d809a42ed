"""A training that is broken off leaves nothing on the model, and nothing in the records of the one that follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer

from gradent import EntanglementCallback
from gradent.record.stream import read_stream
from tests.hooks.piggyback.watching import own_hooks
from tests.trainer import runs
from tests.trainer.runs import llama, make_trainer, weights_of

BREAKS: dict[str, Any] = {"Ctrl-C": KeyboardInterrupt, "an error": ValueError}


@pytest.mark.parametrize("where", ["before the forward", "after the forward", "after the backward"])
@pytest.mark.parametrize("kind", BREAKS)
def test_nothing_is_left_behind(
    kind: str, where: str, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(DPOTrainer):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == 1 and where == "before the forward":
                raise BREAKS[kind]
            loss = super().compute_loss(*args, **kwargs)
            if self.state.global_step == 1 and where == "after the forward":
                raise BREAKS[kind]
            return loss

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            if self.state.global_step == 1:
                raise BREAKS[kind]
            return loss

    monkeypatch.setitem(runs.TRAINERS, "dpo", (Broken, runs.TRAINERS["dpo"][1]))
    model, callback = llama(), EntanglementCallback(every=1, alert=None, on_error="raise")
    trainer = make_trainer("dpo", model, tiny_tokenizer, tmp_path, [callback])
    with pytest.raises(BREAKS[kind]):
        trainer.train()
    assert own_hooks(model) == [] and "training_step" not in vars(trainer)
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks  # noqa: SLF001
    assert [record.step for record in callback.records] == [1]


def test_a_batch_size_that_is_found(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto_find_batch_size` starts again with fewer pairs after a step: the records are those of the last start."""

    class Full(DPOTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if len(inputs["input_ids"]) > 4 and self.state.global_step >= 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    found = []
    for name, watched in (("watched", True), ("bare", False)):
        monkeypatch.setitem(runs.TRAINERS, "dpo", (Full, runs.TRAINERS["dpo"][1]))
        model = llama()
        callback = EntanglementCallback(every=1, alert=None, on_error="raise", out=tmp_path / name)
        make_trainer(
            "dpo", model, tiny_tokenizer, tmp_path, [callback] if watched else [], auto_find_batch_size=True
        ).train()
        assert own_hooks(model) == []
        found.append(weights_of(model))
        if watched:
            assert [(record.step, len(record.gram)) for record in callback.records] == [(1, 2), (2, 2)]
            rows = read_stream(tmp_path / name / "pairs.jsonl")
            assert (rows["step"], rows["pair"]) == ([1, 1, 2, 2], [0, 1, 0, 1])
            cosines = torch.cat([record.gram.cosine for record in callback.records])
            assert torch.allclose(torch.tensor(rows["cosine"], dtype=torch.float64), cosines)
            lines = (tmp_path / name / "pairs.jsonl").read_text().splitlines()
            assert len(lines) == 1 + 4, "the broken-off attempt's rows are off the file too"
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
