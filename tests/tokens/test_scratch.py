"""`memory_budget` bounds what `measure_tokens` takes beyond the activations of one forward of each row.

The models are small, so budgets are; a budget counts where it leaves room for more than the least, two tokens at once.
"""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gradent.pairs.batch import PairBatch
from gradent.tokens.contractions import SharedFactor, shared_entries
from gradent.tokens.matrix import measure_tokens
from gradent.tokens.row_pass import RowPass
from gradent.tokens.synchronized import SynchronizedPasses
from tests.live import LiveBytes

SMALL = 32 * 1024
"""What is neither output gradient nor tile: the rows' ids, the matrix that is returned, the sums of blocks of it."""

VOCABULARY = 500


def gpt2(vocabulary: int = VOCABULARY, *, tied: bool = True) -> nn.Module:
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=64, n_layer=4, n_head=4, n_positions=512, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama(vocabulary: int = VOCABULARY) -> nn.Module:
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def lora() -> nn.Module:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(llama(), config)


class OneBlock(nn.Module):
    """One block of weights, eight times."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 64), nn.Linear(64, VOCABULARY, bias=False)
        self.wide, self.narrow = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for _ in range(8):
            mean = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
            x = x + self.narrow(torch.tanh(self.wide(mean)))
        return self.head(x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "GPT-2, tied": gpt2,
    "GPT-2, untied": lambda: gpt2(tied=False),
    "Llama": llama,
    "Llama, bfloat16": lambda: llama().bfloat16(),
    "Llama, LoRA": lora,
}

# Tokens of prompt, chosen and rejected, and MiB that all models can keep to with them.
CASES = {
    "all tokens": ((20, 40, 35), [16, 32]),
    "few tokens": ((20, 6, 5), [1, 4, 16]),
    "a long prompt": ((200, 5, 4), [4, 16]),
}
DAILY = {("all tokens", 16), ("few tokens", 1), ("a long prompt", 4)}
"""The tightest of each; looser ones bound less."""


def pair(prompt: int, chosen: int, rejected: int, vocabulary: int = VOCABULARY) -> PairBatch:
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, vocabulary, (size,), generator=draw).tolist() for size in (prompt, chosen, rejected)]
    return PairBatch.from_tokens([tuple(ids)])


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens that fitted, call by call."""
    seen: list[int] = []
    honest = SynchronizedPasses.block_size
    monkeypatch.setattr(SynchronizedPasses, "block_size", lambda self: seen.append(honest(self)) or seen[-1])
    return seen


def make(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def scratch(model: nn.Module, batch: PairBatch, budget: int) -> int:
    """Most bytes alive while a pair is measured, less what two forwards with their graphs keep."""
    logits = []
    with LiveBytes() as plain:
        for row in (0, 1):
            out = model(batch.row(row)[0][None])
            logits.append(out if isinstance(out, Tensor) else out.logits)
            del out
    del logits[:]
    assert plain.now == 0, "the graphs are gone, so all of it was theirs"
    with LiveBytes() as live:
        (gram,) = measure_tokens(model, batch, memory_budget=budget, progress=False)
    assert gram.inner.norm() > 0
    return live.peak - plain.peak


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("sizes", "budget"),
    [
        pytest.param(
            sizes, budget * 2**20, id=f"{name}, {budget} MiB",
            marks=() if (name, budget) in DAILY else pytest.mark.nightly,
        )
        for name, (sizes, budgets) in CASES.items()
        for budget in budgets
    ],
)  # fmt: skip
def test_a_pair_stays_inside_the_budget(name: str, sizes: tuple[int, int, int], budget: int, rooms: list[int]) -> None:
    taken = scratch(make(MODELS[name]), pair(*sizes), budget)
    assert rooms[0] > 2, "or the budget does not count"
    assert 0 < taken <= budget + SMALL


@pytest.mark.parametrize("tied", [True, False])
def test_a_wide_vocabulary(tied: bool, rooms: list[int]) -> None:
    """Nothing of size tokens × vocabulary but a head's own output gradients, of the tokens at hand."""
    budget = 8 * 2**20
    taken = scratch(make(lambda: gpt2(30000, tied=tied)), pair(20, 24, 20, 30000), budget)
    assert rooms[0] > 2
    assert 0 < taken <= budget + SMALL


def test_weights_that_are_used_again_and_again(rooms: list[int]) -> None:
    budget = 16 * 2**20
    taken = scratch(make(OneBlock), pair(20, 16, 16), budget)
    assert rooms[0] > 2
    assert 0 < taken <= budget + SMALL


@pytest.mark.parametrize("name", MODELS)
def test_the_bound_can_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SynchronizedPasses, "block_size", lambda self: 1000)
    monkeypatch.setattr("gradent.tokens.synchronized._Run._step", lambda self, row_pass, count: count)
    assert scratch(make(MODELS[name]), pair(20, 40, 35), 2**20) > 2 * 2**20


def test_what_arrives_is_gone_before_the_next_arrives(monkeypatch: pytest.MonkeyPatch, rooms: list[int]) -> None:
    """An adapter's output gradients are many times its gradients: a pass that collects them first takes more."""
    batch, budget = pair(200, 5, 4), 2 * 2**20
    honest = scratch(make(lora), batch, budget)
    assert rooms[0] > 2
    assert honest <= budget + SMALL
    advance = RowPass.advance

    def collecting(self: RowPass, start: int, stop: int, step: int, take: Callable[[object], None]) -> None:
        arrived: list[object] = []
        advance(self, start, stop, step, arrived.append)
        for one in arrived:
            take(one)

    monkeypatch.setattr(RowPass, "advance", collecting)
    assert scratch(make(lora), batch, budget) > max(budget + SMALL, 1.5 * honest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 64, 512])
def test_tiles(width: int, dtype: torch.dtype) -> None:
    budget, rows, counts = 2**20, (220, 215), (20, 15)
    blocks = [
        SharedFactor(side, range(count), torch.randn(count, length, 96).to(dtype), torch.randn(length, width).to(dtype))
        for side, (count, length) in enumerate(zip(counts, rows, strict=True))
    ]
    with LiveBytes() as live:
        shared_entries(blocks, counts, budget)
    between = 4 * rows[1] * (rows[0] + rows[1]) + (0 if dtype == torch.float32 else 2 * 4 * rows[0] * width)
    assert 0 < live.peak <= budget + between + SMALL


def test_the_count_is_of_whole_batches_under_vmap() -> None:
    values = torch.ones(7, 1000)
    with LiveBytes() as live:
        sums = torch.vmap(lambda lane: (2 * lane).sum())(values)
        assert sum(live.made) >= 7 * 1000 * 4
        assert live.peak >= 7 * 1000 * 4
        assert live.now == sums.nbytes


def test_the_count_knows_what_a_graph_saves() -> None:
    with LiveBytes() as live:
        total = torch.ones(1000, requires_grad=True).exp().sum()
        assert live.now >= 4000
        del total
        assert live.now == 0


def test_the_count_is_the_allocators() -> None:
    """A measurement's peak, against the sum of what the CPU's allocator says that it gave and took back."""
    model, batch, budget = make(gpt2), pair(20, 10, 8), 4 * 2**20
    measure_tokens(model, batch, memory_budget=budget, progress=False)
    with LiveBytes() as live:
        measure_tokens(model, batch, memory_budget=budget, progress=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        measure_tokens(model, batch, memory_budget=budget, progress=False)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    taken = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        peak = max(peak, taken)
    assert live.peak == pytest.approx(peak, rel=0.02)
