"""Models that are given more than tokens: read off where rows can be told apart, no pass without those inputs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from gradent import attach
from gradent.model.inputs import find_further_inputs
from tests.batches import ragged
from tests.trainer.runs import llama
from tests.trainer_steps import dpo

IMAGE, SIZE, PATCHES = 250, 8, 4


def llava() -> LlavaForConditionalGeneration:
    """A LLaVA of two layers, an image of which is four tokens."""
    vision = CLIPVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=4,
        projection_dim=12,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config).float()


def tune(model: nn.Module, *parts: str) -> None:
    """Leave these parts' attention projections trainable."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts) and "q_proj.weight" in name)


def batch_of(images: list[int], pixels: str = "random") -> dict[str, Tensor]:
    """Pairs, the prompt of each holding so many images; chosen rows, then rejected rows."""
    torch.manual_seed(1)
    rows, marks = [], []
    for side in range(2):
        for pair, count in enumerate(images):
            torch.manual_seed(10 * pair + 5)
            prompt = torch.randint(3, 240, (4,))
            torch.manual_seed(100 * side + pair)
            response = torch.randint(3, 240, (5 + side,))
            rows.append(torch.cat([prompt, torch.full((count * PATCHES,), IMAGE), response]))
            marks.append(len(response))
    length = max(map(len, rows))
    ids = torch.stack([nn.functional.pad(row, (0, length - len(row))) for row in rows])
    mask = torch.stack([torch.arange(length) < len(row) for row in rows]).long()
    is_marked = torch.stack(
        [
            (torch.arange(length) >= len(row) - size) & (torch.arange(length) < len(row))
            for row, size in zip(rows, marks, strict=True)
        ]
    )
    torch.manual_seed(2)
    pictures = torch.randn(sum(images), 3, SIZE, SIZE)
    return {"ids": ids, "mask": mask, "marks": is_marked, "pixels": torch.cat([pictures, pictures])}


def logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = model(input_ids=batch["ids"], attention_mask=batch["mask"], pixel_values=batch["pixels"])
    found = output.logits[:, :-1].log_softmax(-1).gather(-1, batch["ids"][:, 1:, None])[..., 0]
    return (found * batch["marks"][:, 1:]).sum(1)


def truth(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """All products of the rows, by one backward of the whole batch a row."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = []
    for row in range(len(batch["ids"])):
        found = torch.autograd.grad(logps(model, batch)[row], parameters, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
        gradients.append(torch.cat([part.flatten().double() for part in parts]))
    stacked = torch.stack(gradients)
    return stacked @ stacked.T


def error(gram: Any, products: Tensor) -> float:
    count = len(gram.inner)
    norms = products.diagonal().sqrt()
    off = (gram.inner - products.diagonal(count)).abs() / (norms[:count] * norms[count:])
    squares = (torch.cat([gram.chosen_sq, gram.rejected_sq]) - products.diagonal()).abs() / products.diagonal()
    return float(torch.cat([off, squares]).max())


@pytest.mark.parametrize("images", [[1, 1, 1], [2, 0, 1], [2, 1, 1], [3, 0, 0]], ids=str)
@pytest.mark.parametrize("parts", [("language_model",), ("language_model", "vision")], ids=["language", "all"])
def test_images(parts: tuple[str, ...], images: list[int], caplog: pytest.LogCaptureFixture) -> None:
    model, batch = llava(), batch_of(images)
    tune(model, *parts)
    expected = truth(model, batch)
    with caplog.at_level(logging.WARNING), attach(model, pairing="halves", trusted=True) as recorder:
        dpo(*logps(model, batch).chunk(2)).backward()
        found = recorder.harvest()
    if parts == ("language_model",) or images == [1, 1, 1]:
        assert found is not None
        assert found.source == "piggyback"
        assert error(found.gram, expected) < 5e-6
        assert found.further == ("pixel_values",)
    else:  # as many images as rows, but not one a row, or another number: nothing is claimed
        assert found is None
        assert "a pass of gradent's own gets tokens alone, while the model was given pixel_values too" in caplog.text


@pytest.mark.parametrize("mode", ["measure", "auto"])
def test_no_pass_without_the_images(mode: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = llava(), batch_of([1, 1])
    tune(model, "language_model")
    with caplog.at_level(logging.WARNING), attach(model, mode=mode, pairing="halves", trusted=True) as recorder:
        found = logps(model, batch)
        loss = dpo(*found.chunk(2))
        if mode == "auto":  # ld_alpha and its like: tokens weigh differently
            output = model(input_ids=batch["ids"], attention_mask=batch["mask"], pixel_values=batch["pixels"])
            each = output.logits[:, :-1].log_softmax(-1).gather(-1, batch["ids"][:, 1:, None])[..., 0]
            weighed = each * batch["marks"][:, 1:] * torch.linspace(0.1, 1, each.shape[1])
            recorder.disarm()
            recorder.arm()
            output = model(input_ids=batch["ids"], attention_mask=batch["mask"], pixel_values=batch["pixels"])
            each = output.logits[:, :-1].log_softmax(-1).gather(-1, batch["ids"][:, 1:, None])[..., 0]
            weighed = each * batch["marks"][:, 1:] * torch.linspace(0.1, 1, each.shape[1])
            loss = dpo(*weighed.sum(1).chunk(2))
        loss.backward()
        assert recorder.harvest() is None
    assert "gets tokens alone" in caplog.text


def test_positions_that_say_nothing_new() -> None:
    ids, mask = torch.arange(12).view(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    model = llama()

    def names(**kwargs: Any) -> tuple[str, ...]:
        return find_further_inputs(model, (), {"input_ids": ids, "attention_mask": mask, **kwargs}, ids, mask).names

    default = (mask.cumsum(1) - 1).clamp_min(0)
    assert names(labels=ids, use_cache=False) == ()
    assert names(position_ids=default) == names(position_ids=torch.arange(6)) == ()
    assert names(position_ids=default + 3) == ("position_ids",)
    assert names(token_type_ids=torch.zeros_like(ids)) == ()
    assert names(token_type_ids=mask) == ("token_type_ids",)
    assert names(attention_mask=torch.ones(2, 1, 6, 6)) == ("attention_mask",)
    assert names(pixel_values=torch.ones(2, 3, 8, 8), image_grid_thw=torch.ones(2, 3)) == (
        "image_grid_thw", "pixel_values",
    )  # fmt: skip


class Copied(nn.Module):
    """A wrapper that computes with a copy of its parameters, as FSDP 1 does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in inner.parameters()]))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        named, start = {}, 0
        for name, parameter in self.inner.named_parameters():
            named[name] = self.flat[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
        return torch.func.functional_call(self.inner, named, (), {"input_ids": input_ids})


def test_no_zeros_for_parameters_that_are_not_reached(caplog: pytest.LogCaptureFixture) -> None:
    inner = llama()
    wrapper, batch = Copied(inner), ragged()
    watched = nn.Module()
    watched.forward = wrapper.forward  # type: ignore[method-assign]
    watched.inner = inner  # its own parameters, none of which the forward computes with
    with caplog.at_level(logging.WARNING), attach(watched, mode="piggyback", pairing="halves") as recorder:
        output = watched(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        found = output.logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        dpo(*(found * batch.completion_mask[:, 1:]).sum(1).chunk(2)).backward()
        with pytest.raises(Exception, match="which is none of the model's own parameters"):
            recorder.harvest()
