"""`share`: a backward that takes its weight gradients from the measured products has the gradients it had."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradent.hooks.piggyback.config import WatchConfig
from gradent.hooks.piggyback.observation import BackwardObservation
from gradent.hooks.piggyback.watcher import Piggyback
from gradent.model.parameters import trainable
from tests.batches import ragged
from tests.hooks.piggyback.watching import CHECKPOINTING, WAYS, error, prepare, set_up, watch
from tests.odd_skeleton import WIDTH, Skeleton, normal
from tests.trainer_steps import through_logits
from tests.truth import TOLERANCE, truth
from tests.zoo import build

Step = Callable[[], Tensor]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that a backward left; they are taken away."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name], parameter.grad = parameter.grad, None
    return found


def both_ways(model: nn.Module, step: Step, **options: object) -> tuple[BackwardObservation, float]:
    """What was read, and the largest relative error of a parameter's gradient against the plain backward's."""
    step().backward()
    want = gradients(model)
    (passed,) = watch(model, step, should_share=True, **options)
    got = gradients(model)
    assert want.keys() == got.keys()
    assert all(got[name].dtype == want[name].dtype and got[name].shape == want[name].shape for name in want)
    pairs = [(got[name].double(), want[name].double()) for name in want]
    worst = max(float((mine - theirs).norm() / theirs.norm().clamp_min(1e-300)) for mine, theirs in pairs)
    return passed, worst


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama, biases, tied"])
def test_entries_and_gradients(name: str, lora: bool, way: str, checkpointing: str) -> None:
    model, batch, true, limit = set_up(name, lora=lora, way=way, checkpointing=checkpointing)
    passed, worst = both_ways(model, lambda: WAYS[way](model, batch))
    assert error(passed, true) <= limit
    assert worst <= (1e-12 if way == "logits" and name == "gpt2" else 1e-6)
    assert passed.shared or checkpointing == "reentrant"  # whose regions are made again in the backward


def test_every_matrix_but_the_tied_one_is_shared() -> None:
    model, batch = prepare(build("gpt2")), ragged()
    passed, _ = both_ways(model, lambda: through_logits(model, batch))
    matrices = [name for name, one in model.named_parameters() if one.dim() == 2 and ".h." in name]
    assert passed.shared == len(matrices) > 0


@pytest.mark.parametrize("scale", [2.0**16, 1e-17, 1e-28])
def test_losses_of_any_size(scale: float) -> None:
    model, batch = build("llama", dtype=torch.float32), ragged()
    true = truth(model, batch)
    prepare(model)
    passed, worst = both_ways(
        model, lambda: scale * through_logits(model, batch, lambda chosen, rejected: (rejected - chosen).sum())
    )
    assert error(passed, true) <= TOLERANCE["float32"]
    assert worst <= 1e-5


@pytest.mark.parametrize("checkpointing", ["kept", "recomputed"])
def test_autocast(checkpointing: str) -> None:
    model, batch = build("llama", dtype=torch.float32), ragged()
    with torch.autocast("cpu", torch.bfloat16):
        true = truth(model, batch)
    prepare(model, CHECKPOINTING[checkpointing])

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return through_logits(model, batch)

    passed, worst = both_ways(model, step)
    assert error(passed, true) <= 2e-2
    assert worst <= 2e-2
    assert passed.shared


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters(dtype: torch.dtype) -> None:
    model, batch = prepare(build("llama", dtype=dtype)), ragged()
    passed, worst = both_ways(model, lambda: through_logits(model, batch))
    assert passed.no_entries_reason is None and passed.shared
    assert worst <= 2e-2


def test_the_loss_is_the_same_to_the_bit() -> None:
    model, batch = prepare(build("llama", dtype=torch.float32)), ragged()
    plain = through_logits(model, batch)
    watcher = Piggyback(WatchConfig(model=model, parameters=trainable(model), budget=2**24, should_share=True))
    watcher.arm()
    watched = through_logits(model, batch)
    watcher.disarm()
    assert torch.equal(plain, watched)


def test_a_loss_that_weighs_tokens_keeps_its_gradients() -> None:
    """Its entries cannot be read off: nothing is shared, and the backward is what it was."""
    model, batch = prepare(build("gpt2")), ragged()

    def step() -> Tensor:
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
        logps = logits[:, :-1].log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
        return (logps * torch.linspace(-1, 1, logps.numel()).view_as(logps) * batch.completion_mask[:, 1:]).sum()

    passed, worst = both_ways(model, step)
    assert passed.no_entries_reason is not None and not passed.shared
    assert worst <= 1e-12


class Hooked(Skeleton):
    """Its own code changes a cotangent after gradent has seen it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        if y.requires_grad:
            y.register_hook(lambda grad: 2 * grad)
        return torch.tanh(y)


class Recomputing(Skeleton):
    """A checkpointed region that runs no module: nothing tells gradent that it is computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = normal(WIDTH, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        return checkpoint(
            lambda x: torch.tanh(nn.functional.linear(torch.tanh(x), self.weight)), x, use_reentrant=False
        )


class Offloading(Skeleton):
    """Saved tensors are packed by hooks that are not checkpointing's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def block(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.clone(), lambda packed: packed):
            return torch.tanh(self.inner(x))


def odd_step(model: nn.Module) -> Step:
    batch = ragged()

    def step() -> Tensor:
        out = SimpleNamespace(logits=model(batch.input_ids))
        logps = out.logits[:, :-1].log_softmax(-1).gather(2, batch.input_ids[:, 1:, None])[..., 0]
        chosen, rejected = (logps * batch.completion_mask[:, 1:]).sum(1).chunk(2)
        return -nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()

    return step


@pytest.mark.parametrize("kind", [Hooked, Recomputing, Offloading])
def test_models_that_do_things_of_their_own(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().double()
    step = odd_step(model)
    step().backward()
    want = gradients(model)
    watcher = Piggyback(WatchConfig(model=model, parameters=trainable(model), budget=2**24, should_share=True))
    watcher.arm()
    step().backward()
    watcher.take()
    watcher.disarm()
    got = gradients(model)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-10, atol=1e-12)
