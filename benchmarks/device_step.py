"""The part of benchmarks/device.py that trains: what gradent adds to a step, and its own pass beside plain backwards.

A Llama with random weights, bfloat16, LoRA of rank 16 on every linear layer (written here: nothing but torch and
transformers is needed) or all parameters. Letters: k pairs, rows 0..k-1 chosen and k..2k-1 rejected, T tokens of a row.
"""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.device_bench import Bench, Times
from gradent import PairBatch, attach, measure
from gradent.kernels import availability
from gradent.pair_gram import PairGram
from gradent.recorder import WeightGrad

__all__ = ["LoraLinear", "train"]

ROUNDS = 30
BOUNDS = {"LoRA, watched": 1.03, "full, watched": 1.35, "full, shared": 1.08}
"""Most that a measured step may take, as a multiple of a plain one; what issue 5 asks for."""

AGREE = 0.05
"""Most that entries read off a step may differ from `measure`'s, by the norms' product: the two passes round to
bfloat16 in other places. It would show a wrong row or layer; exactness has tests of its own."""


@dataclass(frozen=True)
class Sizes:
    """Of the model and the batch."""

    width: int = 2048
    inner: int = 5632
    layers: int = 8
    heads: int = 16
    words: int = 32000
    tokens: int = 1024
    pairs: int = 2
    rank: int = 16


TOY = Sizes(width=16, inner=24, layers=1, heads=2, words=31, tokens=12, pairs=2, rank=4)


class LoraLinear(nn.Module):
    """A frozen linear layer and its two factors, `base(x) + 2 B A x`; B starts small, not at zero, as after some steps.

    Args:
        base: the layer, without bias.
        rank: r.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        here: dict[str, Any] = {"device": base.weight.device, "dtype": base.weight.dtype, "bias": False}
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, **here)
        self.lora_B = nn.Linear(rank, base.out_features, **here)
        nn.init.normal_(self.lora_B.weight, std=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """Of `[..., in]`, `[..., out]`."""
        return self.base(x) + 2.0 * self.lora_B(self.lora_A(x))


def build(kind: str, sizes: Sizes, device: torch.device) -> nn.Module:
    """The model, in eval mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.words, hidden_size=sizes.width, intermediate_size=sizes.inner, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=max(1, sizes.heads // 2),
        max_position_embeddings=max(64, sizes.tokens), bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.device(device):
        model: nn.Module = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).eval()
    if kind == "LoRA":
        model.requires_grad_(False)
        for block in model.model.layers.modules():  # type: ignore[union-attr, operator]
            for name, layer in list(block.named_children()):
                if isinstance(layer, nn.Linear) and not isinstance(block, LoraLinear):
                    setattr(block, name, LoraLinear(layer, sizes.rank))
    return model


class Job:
    """A model, its pairs and its optimizer, and what can be done with them.

    Args:
        kind: "LoRA" or "full".
        sizes: of both.
        device: where.
    """

    def __init__(self, kind: str, sizes: Sizes, device: torch.device) -> None:
        self.model = build(kind, sizes, device)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self.parameters, lr=1e-9, fused=device.type == "cuda")
        draw = torch.Generator().manual_seed(1)
        third = sizes.tokens // 3  # of a row is the prompt
        ids = torch.randint(0, sizes.words, (sizes.pairs, 2 * sizes.tokens - third), generator=draw).tolist()
        self.batch = PairBatch.from_tokens(
            [(row[:third], row[third : sizes.tokens], row[sizes.tokens :]) for row in ids]
        )
        rows = [self.batch.row(index) for index in range(2 * sizes.pairs)]
        self._ids, self._marks = (torch.stack(column).to(device) for column in zip(*rows, strict=True))
        with torch.no_grad():
            self._reference = self._logps(slice(None))
        self.overhead_s: dict[WeightGrad | None, list[float]] = defaultdict(list)

    def _logps(self, rows: slice) -> Tensor:
        """`log π(y|x)` of rows, `[R]` float32."""
        ids, marks = self._ids[rows], self._marks[rows]
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        targets = ids[:, 1:].masked_fill(~marks[:, 1:], -100)
        losses = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return -losses.view(targets.shape).sum(1)

    def step(self, then: Callable[[], Any] = lambda: None) -> None:
        """Forward, backward of DPO's loss and the optimizer's step; the reference's log-probs are there already."""
        pairs = len(self.batch)
        margins = self._logps(slice(None)) - self._reference
        (-nn.functional.logsigmoid(0.1 * (margins[:pairs] - margins[pairs:])).mean()).backward()
        then()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def watched(self, weight_grad: WeightGrad | None = None) -> PairGram:
        """The same step, with gradent attached to it; the entries that it read."""
        with attach(self.model, mode="piggyback", weight_grad=weight_grad) as recorder:
            found = []
            self.step(lambda: found.append(recorder.harvest()))
        assert found[0] is not None
        self.overhead_s[weight_grad].append(found[0].overhead_s)
        return found[0].gram

    def two_backwards(self) -> Tensor:
        """The paper's way: one backward a row, a pair's two gradients multiplied and let go of; `[k, 3]` float32."""
        pairs, found = len(self.batch), []
        for pair in range(pairs):
            sides = [
                torch.autograd.grad(self._logps(slice(row, row + 1))[0], self.parameters)
                for row in (pair, pair + pairs)
            ]
            flat = [(chosen.flatten(), rejected.flatten()) for chosen, rejected in zip(*sides, strict=True)]
            dots = [torch.stack((a @ a, b @ b, a @ b)).float() for a, b in flat]
            found.append(torch.stack(dots).sum(0))
        return torch.stack(found)


def train(bench: Bench) -> None:
    """Rows of a plain step, a watched one, a pass of `measure` and two backwards a pair, taking turns.

    Raises:
        RuntimeError: what a watched step read differs from what `measure` finds.
    """
    sizes, wrong = TOY if bench.toy else Sizes(), []
    for number, kind in enumerate(("LoRA", "full")):
        if bench.left <= 0:
            bench.say(f"out of time: {kind} is left out.")
            break
        wrong += _run(bench, kind, sizes, seconds=bench.left / (2 - number) / 2)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    if wrong:
        raise RuntimeError(f"entries differ from measure's: {'; '.join(wrong)}")


def _run(bench: Bench, kind: str, sizes: Sizes, seconds: float) -> list[str]:
    """All of one kind of training; what is wrong with it."""
    job = Job(kind, sizes, bench.device)
    steps: dict[str, Callable[[], Any]] = {kind: job.step, f"{kind}, watched": job.watched}
    errors: dict[str, float] = {}
    truth = measure(job.model, job.batch)
    errors[f"{kind}, watched"] = _error(job.watched(), truth)
    if kind == "full":
        steps["full, shared"] = lambda: job.watched("shared")
        errors["full, shared"] = _error(job.watched("shared"), truth)
    job.overhead_s.clear()
    times = bench.turns(steps, rounds=ROUNDS, seconds=seconds, wall=True)
    peaks = {name: bench.peak(step) for name, step in steps.items()}
    path = availability.path(bench.device, torch.bfloat16)
    given = {"dtype": "bfloat16", "tokens": sizes.tokens, "pairs": sizes.pairs, "path": path}
    for name, taken in times.items():
        note = ""
        if name in BOUNDS:
            own = statistics.median(job.overhead_s["shared" if "shared" in name else None]) * 1e3
            note = f"asked for: {BOUNDS[name]}; gradent's own clock: {own:.3g} ms"
        _put(bench, name, taken, times[kind], kind, given, peaks[name] - peaks[kind], note, errors.get(name))
    passes = {f"{kind}, measure": lambda: measure(job.model, job.batch), f"{kind}, two backwards": job.two_backwards}
    slow = bench.turns(passes, rounds=ROUNDS // 2, seconds=seconds / 2, wall=True)
    base = f"{kind}, two backwards"
    for name, taken in slow.items():
        note = f"{taken.median / times[kind].median:.2f} plain steps"
        _put(bench, name, taken, slow[base], base, given, bench.peak(passes[name]), note, None)
    return [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= AGREE]


def _put(
    bench: Bench,
    name: str,
    taken: Times,
    base: Times,
    against: str,
    given: dict[str, Any],
    peak: int,
    note: str,
    error: float | None,
) -> None:
    bench.put(
        name,
        **given,
        **taken.columns,
        ratio=taken.median / base.median,
        against=against,
        peak_mib=peak / 2**20,
        note=note,
        error="" if error is None else error,
    )


def _error(found: PairGram, truth: PairGram) -> float:
    """Largest difference of an entry, by the norms' product."""
    scale = (truth.chosen_sq * truth.rejected_sq).sqrt()
    parts = (
        (found.chosen_sq - truth.chosen_sq) / truth.chosen_sq,
        (found.rejected_sq - truth.rejected_sq) / truth.rejected_sq,
        (found.inner - truth.inner) / scale,
    )
    return float(torch.stack(parts).abs().max())
