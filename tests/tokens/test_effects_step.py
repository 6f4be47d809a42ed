"""`token_effects` toward the optimizer's step: a prediction of what the step does, that leaves everything alone."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from gradent.errors import GradentWarning, InputError, NonFiniteError
from gradent.pairs.batch import PairBatch
from gradent.tokens.effects import token_effects
from tests.adapters import build_adapted
from tests.batches import ragged
from tests.truth import call, untouched
from tests.zoo import build


def logps(model: nn.Module, batch: PairBatch) -> Tensor:
    """Log-probs of all completion tokens, float64 `[T]`."""
    parts = []
    with torch.no_grad():
        for row in range(2 * len(batch)):
            ids, marks = batch.row(row)
            scores = call(model, ids[None])[0, :-1].double().log_softmax(-1)
            parts.append(scores.gather(1, ids[1:, None])[:, 0][marks[1:]])
    return torch.cat(parts)


def with_gradients(model: nn.Module, batch: PairBatch) -> nn.Module:
    model.zero_grad()
    for row in range(len(batch)):
        call(model, batch.row(row)[0][None]).log_softmax(-1)[..., 3].sum().backward()
    return model


OPTIMIZERS = {
    "SGD": lambda parameters, lr: torch.optim.SGD(parameters, lr=1e-3 * lr, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1),
    "Adam, in a loop": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, foreach=False, amsgrad=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "build_model", [lambda: build("gpt2"), lambda: build_adapted("LoRA on Conv1D")], ids=["gpt2", "LoRA"]
)
def test_the_prediction_of_a_step(name, build_model):
    batch, errors = ragged(), []
    for lr in (1e-3, 1e-4):
        model = with_gradients(build_model(), batch)
        optimizer = OPTIMIZERS[name]([parameter for parameter in model.parameters() if parameter.requires_grad], lr)
        optimizer.step()  # so that it has a state
        with_gradients(model, batch)
        before = logps(model, batch)
        state = copy.deepcopy(optimizer.state_dict())
        with untouched(model):
            effects = token_effects(model, batch, "step", optimizer=optimizer)
        torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
        optimizer.step()
        moved = logps(model, batch) - before
        errors.append(float((moved - effects).norm() / moved.norm()))
    assert errors[0] <= 0.2 and errors[1] <= 0.2 * errors[0]  # first order: a step of a tenth, a tenth of the error


def test_nobody_else_is_stepped():
    model, batch = with_gradients(build("gpt2"), ragged()), ragged()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)  # puts its own `step` on the optimizer
    calls = []
    with untouched(model):
        want = token_effects(model, batch, "step", optimizer=optimizer)
        wrapped = Accelerator(cpu=True).prepare(optimizer)
        assert type(wrapped) is not type(optimizer)
        assert torch.equal(token_effects(model, batch, "step", optimizer=wrapped), want)
        hook = optimizer.register_step_pre_hook(lambda *args: calls.append(args))
        with pytest.warns(GradentWarning, match="1 step hooks"):
            assert torch.equal(token_effects(model, batch, "step", optimizer=optimizer), want)
    hook.remove()
    assert calls == [] and not optimizer.state and scheduler.last_epoch == 0
    assert want.abs().max() > 0


def test_parameters_outside_the_optimizer_stay():
    model, batch = with_gradients(build("llama"), ragged()), ragged()
    some = {name: parameter for name, parameter in model.named_parameters() if "mlp" in name}
    stranger = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([{"params": [stranger]}, {"params": list(some.values()), "lr": 0.5}], lr=1.0)
    vector = {name: -0.5 * parameter.grad for name, parameter in some.items()}
    got = token_effects(model, batch, "step", optimizer=optimizer)
    torch.testing.assert_close(got, token_effects(model, batch, vector))
    for parameter in some.values():
        parameter.grad = None
    next(iter(some.values())).grad = torch.zeros_like(next(iter(some.values())))
    assert torch.equal(token_effects(model, batch, "step", optimizer=optimizer), torch.zeros_like(got))


class Extra(torch.optim.SGD):
    """An optimizer with an attribute that torch's own copying loses."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, lr=1.0)
        self.scale = 0.25

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(self.scale * parameter.grad)


def test_an_optimizer_with_attributes_of_its_own():
    model, batch = with_gradients(build("gpt2"), ragged()), ragged()
    vector = {name: -0.25 * parameter.grad for name, parameter in model.named_parameters()}
    got = token_effects(model, batch, "step", optimizer=Extra(model.parameters()))
    torch.testing.assert_close(got, token_effects(model, batch, vector))


MODEL = build("llama, biases, tied")
TOTAL = sum(parameter.numel() for parameter in MODEL.parameters())
NORM = "model.norm.weight"

REFUSED = {
    "another word": ("loser", r"toward='loser' is unknown; accepted are 'rejected', 'chosen', 'margin'.*'step'"),
    "another type": (3, r"toward is a int; accepted are 'rejected'"),
    "a flat vector too short": (torch.zeros(TOTAL - 1), rf"toward has shape \[{TOTAL - 1}\].*has shape \[{TOTAL}\]"),
    "a matrix": (torch.zeros(1, TOTAL), rf"toward has shape \[1, {TOTAL}\]"),
    "an unknown name": ({"norm": torch.zeros(1)}, r"toward names 'norm': no trainable parameter.*'model.embed_tokens"),
    "a tied name": ({"lm_head.weight": torch.zeros(1)}, r"'lm_head.weight'.*under its first name"),
    "another shape": ({NORM: torch.zeros(3)}, rf"toward\['{NORM}'\] is torch.float32 \[3\].*shape \[32\]"),
    "integers": ({NORM: torch.zeros(32, dtype=torch.int64)}, r"is torch.int64 \[32\]; accepted is a floating-point"),
    "no tensor": ({NORM: [0.0] * 32}, rf"toward\['{NORM}'\] is list"),
    "nan": ({NORM: torch.full((32,), torch.nan)}, rf"toward holds a nan or an inf for '{NORM}'"),
    "no optimizer": ("step", r"toward='step' needs the optimizer"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_directions_that_are_refused(what):
    toward, message = REFUSED[what]
    with untouched(MODEL), pytest.raises(InputError, match=message):
        token_effects(MODEL, ragged(), toward)


def test_optimizers_that_are_refused():
    model, batch = build("gpt2"), ragged()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD(build("gpt2").parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"optimizer= goes with toward='step' alone; received toward='margin'"):
        token_effects(model, batch, "margin", optimizer=optimizer)
    with pytest.raises(InputError, match=r"received toward=a dict"):
        token_effects(model, batch, {}, optimizer=optimizer)
    with pytest.raises(InputError, match=r"optimizer is a str; accepted is a torch.optim.Optimizer"):
        token_effects(model, batch, "step", optimizer="AdamW")
    with pytest.raises(InputError, match=r"has a \.grad.*loss\.backward\(\)"):
        token_effects(model, batch, "step", optimizer=optimizer)
    with_gradients(model, batch)
    with pytest.raises(InputError, match=r"none of the optimizer's \d+ parameters is a trainable parameter"):
        token_effects(model, batch, "step", optimizer=other)
    with pytest.raises(InputError, match=r"a copy of the optimizer \(LBFGS\) cannot be stepped: .*toward=\{name"):
        token_effects(model, batch, "step", optimizer=torch.optim.LBFGS(model.parameters()))
    model.lm_head.weight.grad[0, 0] = torch.nan
    with untouched(model), pytest.raises(NonFiniteError, match=r"SGD would move 'transformer.wte.weight'"):
        token_effects(model, batch, "step", optimizer=optimizer)
