"""What token-masked DPO exports, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig

from gradent.errors import InputError
from gradent.losses.token_masked import soft_mask
from gradent.record.masks import read_masks
from gradent.report.tokens.masks import write_mask_report
from gradent.trainer.token_masking.config import TokenMaskedDPOConfig
from gradent.trainer.token_masking.trainer import TokenMaskedDPOTrainer
from tests.trainer.runs import data_for, llama, preferences, with_lora
from tests.trainer.test_masked import make, stirred


def test_export(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trainer = make(with_lora(llama()), tiny_tokenizer, tmp_path, mask_threshold=0.1, per_device_eval_batch_size=3)
    stirred(trainer.mask_head)
    trainer.model.train()
    rows = preferences(8)
    rows[5]["chosen"] = " <img>\n‮é屋"
    path = trainer.export_masks(Dataset.from_list(rows), tmp_path / "masks.parquet")
    assert trainer.model.training
    table = read_masks(path).to_pydict()
    for pair, row in enumerate(rows):
        for side in ("chosen", "rejected"):
            owners = zip(table["pair"], table["side"], strict=True)
            places = [place for place, owner in enumerate(owners) if owner == (pair, side)]
            ids = [table["token_id"][place] for place in places]
            assert tiny_tokenizer.decode(ids) == row[side] + "<eos>"
            assert [table["position"][place] for place in places] == list(range(len(ids)))
            prompt = tiny_tokenizer(row["prompt"])["input_ids"]
            whole = torch.tensor([prompt + ids])
            trainer.model.eval()
            with torch.no_grad():
                hidden = trainer.model(input_ids=whole, output_hidden_states=True).hidden_states[-1]
                scores = trainer.mask_head(hidden[0, len(prompt) - 1 : -1])
            assert [table["score"][place] for place in places] == pytest.approx(scores.tolist(), abs=1e-5)
    masks, scores = torch.tensor(table["mask"]), torch.tensor(table["score"])
    assert torch.allclose(masks, soft_mask(scores, threshold=0.1, k=1.0), atol=1e-6)
    assert table["kept"] == [score >= 0.1 for score in table["score"]] and len(set(table["kept"])) == 2
    html = write_mask_report(path).read_text("utf-8")
    assert "\u202e" not in html and "<img>" not in html and "Pair 7, rejected" in html


def test_export_takes_what_the_trainer_takes(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [*preferences(3), {"prompt": "x" * 200, "chosen": " yes", "rejected": " no"}, *preferences(1)]
    trainer = make(llama(), tiny_tokenizer, tmp_path, max_length=64, mask_freeze=True, mask_eta=0.0)
    found = read_masks(trainer.export_masks(rows, tmp_path / "list.parquet")).to_pydict()
    assert sorted(set(found["pair"])) == [0, 1, 2, 4]  # TRL leaves out the pair whose prompt is too long
    assert set(found["mask"]) == {1.0} and set(found["kept"]) == {True}
    batch = next(iter(trainer.get_train_dataloader()))
    found = read_masks(trainer.export_masks(batch, tmp_path / "batch.parquet")).to_pydict()
    assert len(found["pair"]) == int(batch["completion_mask"].sum())
    owners = [*dict.fromkeys(zip(found["pair"], found["side"], strict=True))]
    assert owners[:3] == [(0, "chosen"), (0, "rejected"), (1, "chosen")]
    trainer.export_masks(trainer.train_dataset, tmp_path / "tokenized.parquet")
    for data in ([], "rows.jsonl", None, {"input_ids": [1]}):
        with pytest.raises(InputError, match=r"export_masks: received .*; accepted are a Dataset"):
            trainer.export_masks(data, tmp_path / "x.parquet")
    with pytest.raises(InputError, match="holds no rows"):
        trainer.export_masks(data_for("dpo").select([]), tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precompute_ref_log_probs": True}, "masks need those of its tokens"),
        ({"padding_free": True}, "many responses into one row"),
        ({"use_liger_kernel": True}, "parts of the model that the head reads"),
        ({"ld_alpha": 0.5}, "by their position"),
        ({"ld_alpha": 0.0}, "by their position"),
        ({"use_weighting": True}, "log-probs of whole responses"),
        ({"torch_compile": True}, "in a compiled model"),
        ({"loss_type": ["ipo"]}, "no token-masked form of ipo, since it divides by the length"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}, "it is no function of log-ratios"),
        ({"loss_type": ["aot"]}, "Accepted are sigmoid, hinge"),
        ({"optim": "lomo"}, "takes no parameters beside the model's"),
        ({"mask_anneal": "cosine"}, "accepted are 'linear', 'exponential', 'none'"),
        ({"mask_eta": -1.0}, r"mask_eta=-1.0; accepted is a finite number >= 0"),
        ({"mask_eta": "much"}, r"mask_eta='much'; accepted is"),
        ({"mask_k_start": 0.0}, "a finite number > 0"),
        ({"mask_k_end": math.inf}, "a finite number > 0"),
        ({"mask_threshold": math.nan}, "mask_threshold=nan; accepted is a finite number"),
        ({"mask_init": 1.0}, "above 0.5 and below 1"),
        ({"mask_learning_rate": -1.0}, "None or a finite number >= 0"),
        ({"mask_hidden": 2.5}, "accepted is a whole number >= 0"),
        ({"mask_freeze": True, "mask_eta": 0.1}, "Set mask_eta=0"),
    ],
)
def test_refused_options(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        TokenMaskedDPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **arguments)


def test_refused_arguments(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="args is a DPOConfig; accepted is a TokenMaskedDPOConfig"):
        TokenMaskedDPOTrainer(llama(), args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))


def test_an_old_trl_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr("trl.trainer.utils.add_fused_lm_head")
    with pytest.raises(InputError, match=r"lacks the fused head.*token masking needs TRL 1\.15"):
        TokenMaskedDPOConfig(output_dir=str(tmp_path))
