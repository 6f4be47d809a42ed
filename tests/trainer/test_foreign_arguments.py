"""TRL's trainers under arguments that are not TRL's, and reward models with a value head, as LLaMA-Factory has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import DPOTrainer, KTOTrainer
from trl.experimental.orpo import ORPOTrainer

from gradent import EntanglementCallback
from gradent.trainer.callback.implied_rows import implied_rows
from tests.batches import ragged
from tests.trainer.runs import llama


def kind_of(base: type) -> type:
    return type("CustomTrainer", (base,), {"__init__": lambda self: None})


def test_a_trainer_says_what_its_arguments_do_not(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    kto = implied_rows(args, kind_of(KTOTrainer)())
    assert (kto.pairing, kto.groups, kto.refusal) == ("rows", "batch", None)
    for base in (DPOTrainer, ORPOTrainer):
        assert implied_rows(args, kind_of(base)()).pairing == "halves"
    assert implied_rows(args, kind_of(Trainer)()).pairing is None
    assert implied_rows(args).pairing is None


class ValueHead(nn.Module):
    """TRL's `AutoModelForCausalLMWithValueHead` in small: logits, loss and values as a tuple."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.pretrained_model, self.v_head = inner, nn.Linear(16, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        output = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return output.logits, None, self.v_head(output.hidden_states[-1]).squeeze(-1)


class PairwiseTrainer(Trainer):
    """The last token's value is the response's reward."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        chosen, rejected = rewards(model, inputs["input_ids"], inputs["attention_mask"]).chunk(2)
        return -nn.functional.logsigmoid(chosen - rejected).mean()


def rewards(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    _, _, values = model(input_ids=ids, attention_mask=mask)
    return values.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]


def test_a_value_head_is_a_reward_model(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model, batch = ValueHead(llama()), ragged()
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    parameters = list(model.parameters())
    each = rewards(model, inputs["input_ids"], inputs["attention_mask"])
    gradients = []
    for reward in each:
        parts = torch.autograd.grad(reward, parameters, retain_graph=True, allow_unused=True)
        gradients.append(torch.cat([part.flatten().double() for part in parts if part is not None]))
    products = torch.stack(gradients) @ torch.stack(gradients).T
    callback = EntanglementCallback(every=1, on_error="raise")
    rows = [{key: value[row] for key, value in inputs.items()} for row in range(len(batch.input_ids))]
    trainer = PairwiseTrainer(
        model=model, train_dataset=rows, callbacks=[callback],  # type: ignore[arg-type]
        args=TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, max_steps=1, per_device_train_batch_size=len(rows),
            report_to="none", optim="sgd", learning_rate=0.0, save_strategy="no", disable_tqdm=True,
            remove_unused_columns=False,
        ),
    )  # fmt: skip
    sampler = torch.utils.data.SequentialSampler(rows)
    trainer._get_train_sampler = lambda *args: sampler  # type: ignore[method-assign]  # noqa: SLF001
    trainer.train()
    (record,) = callback.records
    count = len(batch)
    assert record.source == "piggyback"
    norms = products.diagonal().sqrt()
    assert bool(((record.gram.inner - products.diagonal(count)).abs() / (norms[:count] * norms[count:]) < 5e-6).all())
    assert bool(((record.gram.chosen_sq / products.diagonal()[:count] - 1).abs() < 5e-6).all())
    torch.testing.assert_close(record.gram.chosen_logp, each[:count].detach().double(), rtol=1e-5, atol=1e-5)
    wanted = torch.sigmoid(each[count:] - each[:count]).detach().double()
    torch.testing.assert_close(record.verdict.d_w, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(record.verdict.d_l, wanted, rtol=1e-5, atol=0)
