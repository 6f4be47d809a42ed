"""Read off a trainer's own backward, the entries are those of plain autograd, whatever the trainer did around it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from trl.trainer.utils import add_fused_lm_head

from gradent.hooks.piggyback import Piggyback
from gradent.kernels.dispatch import reduce_pair
from gradent.model import trainable
from gradent.pairs import PairBatch
from tests.adapters import adapt, build_adapted, lora, lora_everywhere
from tests.batches import ragged, square
from tests.hooks.watching import CHECKPOINTING, WAYS, error, prepare, set_up, watch
from tests.odd_models import build_odd
from tests.trainer_steps import dpo, labels_of, through_logits
from tests.truth import TOLERANCE, Truth, truth
from tests.zoo import build


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama, biases, tied"])
def test_entries_are_those_of_autograd(name: str, lora: bool, way: str, checkpointing: str) -> None:
    model, batch, true, limit = set_up(name, lora=lora, way=way, checkpointing=checkpointing)
    (passed,) = watch(model, lambda: WAYS[way](model, batch))
    assert error(passed, true) <= limit
    torch.testing.assert_close(passed.logps, torch.cat([true.chosen_logp, true.rejected_logp]), rtol=1e-6, atol=1e-5)
    c = coefficients(true, dpo)
    torch.testing.assert_close(passed.c, c, rtol=1e-5, atol=1e-9)


def coefficients(true: Truth, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    chosen, rejected = (part.clone().requires_grad_() for part in (true.chosen_logp, true.rejected_logp))
    return torch.cat(torch.autograd.grad(loss(chosen, rejected), (chosen, rejected)))


ADAPTED = ["DoRA", "LoRA on embeddings", "saved head", "saved embeddings of a tied model", "IA3", "LoRA on Conv1D"]


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters(name: str) -> None:
    model, batch = build_adapted(name), ragged()
    true = truth(model, batch)
    prepare(model)
    (passed,) = watch(model, lambda: through_logits(model, batch))
    if passed.problem is None:
        assert error(passed, true) <= TOLERANCE[true.arithmetic]
    else:  # what cannot be read off a batched backward is said, and measured in another way
        assert "no rule can tell the rows apart" in passed.problem
        assert name == "LoRA on embeddings"


@pytest.mark.parametrize("family", ["phi", "opt", "qwen2", "qwen3", "gemma", "olmo2", "stablelm", "gpt_neox", "falcon"])
def test_families(family: str) -> None:
    model, batch = build(family, dtype=torch.float32), ragged()
    true = truth(model, batch)
    prepare(model, reentrant=False)
    (passed,) = watch(model, lambda: through_logits(model, batch))
    assert error(passed, true) <= TOLERANCE["float32"]


@pytest.mark.parametrize("scale", [1e-4, 2.0**16, 1e-17, 1e-28])
def test_coefficients_of_any_size_are_divided_out(scale: float) -> None:
    """A gradient scaler, a mean over a large batch, a pair that the model has learnt by heart."""
    model, batch = build("llama", dtype=torch.float32), ragged()
    true = truth(model, batch)
    prepare(model)
    (passed,) = watch(
        model, lambda: scale * (through_logits(model, batch, lambda chosen, rejected: (rejected - chosen).sum()))
    )
    assert error(passed, true) <= TOLERANCE["float32"]
    torch.testing.assert_close(passed.c / scale, torch.tensor([-1.0] * 3 + [1.0] * 3).double(), rtol=1e-4, atol=0)


def test_autocast() -> None:
    model, batch = build("llama", dtype=torch.float32), ragged()
    with torch.autocast("cpu", torch.bfloat16):
        true = truth(model, batch)
        prepare(model)
        (passed,) = watch(model, lambda: through_logits(model, batch))
    assert error(passed, true) <= 2e-2


def hinged(margin: float, chosen: Tensor, rejected: Tensor) -> Tensor:
    return F.relu(margin - (chosen - rejected)).sum()


def test_offloaded_activations() -> None:
    model, batch = build("llama"), ragged()
    true = truth(model, batch)
    prepare(model)

    def step() -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return through_logits(model, batch)

    (passed,) = watch(model, step)
    assert error(passed, true) <= TOLERANCE[true.arithmetic]


def test_pairs_that_the_loss_does_not_move() -> None:
    model, batch = prepare(build("gpt2")), ragged()
    true = truth(model, batch)
    margin = float((true.chosen_logp - true.rejected_logp).sort().values[1])
    hinge = partial(hinged, margin - 1e-3)
    (passed,) = watch(model, lambda: through_logits(model, batch, hinge))
    still = (true.chosen_logp - true.rejected_logp) >= margin - 1e-3
    assert still.sum() == 2
    assert ((passed.c[:3] == 0) == still).all()
    moved = int((~still).nonzero())
    got = sum(passed.entries.values())[moved]
    want = torch.stack([true.chosen_sq, true.rejected_sq, true.inner])[:, moved]
    assert ((got - want).abs() / want.abs()).max() < 1e-9


def test_chosen_and_rejected_in_two_forwards() -> None:
    model, batch = build("llama"), ragged()
    true = truth(model, batch)
    prepare(model)

    def step() -> Tensor:
        sides = []
        for rows in (slice(0, 3), slice(3, 6)):
            logits = model(input_ids=batch.input_ids[rows], attention_mask=batch.attention_mask[rows]).logits
            logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[rows, 1:, None])[..., 0]
            sides.append((logps * batch.completion_mask[rows, 1:]).sum(1))
        return dpo(*sides)

    (passed,) = watch(model, step)
    assert error(passed, true) <= TOLERANCE[true.arithmetic]


def test_rows_in_any_order_are_told_by_the_sign() -> None:
    model, batch = build("llama"), ragged()
    order = [4, 0, 2, 3, 1, 5]
    true = truth(model, PairBatch.from_rows([batch.row(row) for row in (0, 2, 1, 4, 3, 5)]))
    prepare(model)
    signs = torch.tensor([1.0 if row >= 3 else -1.0 for row in order])

    def step() -> Tensor:
        ids, mask = batch.input_ids[order], batch.attention_mask[order]
        logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        logps = logps.gather(-1, ids[:, 1:, None])[..., 0] * batch.completion_mask[order, 1:]
        return (signs * logps.sum(1)).mean()

    (passed,) = watch(model, step, pairing="signs")
    assert error(passed, true) <= TOLERANCE[true.arithmetic]


def test_a_third_block_belongs_to_no_pair() -> None:
    model, batch = build("llama"), ragged()
    true = truth(model, batch)
    prepare(model)

    def step() -> Tensor:
        three = PairBatch.from_rows([batch.row(row) for row in (0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2)][:6])
        ids = torch.cat([three.input_ids, three.input_ids[:3]])
        marks = torch.cat([three.completion_mask, three.completion_mask[:3]])
        mask = torch.cat([three.attention_mask, three.attention_mask[:3]])
        logits = model(input_ids=ids, attention_mask=mask).logits
        logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        sums = (logps * marks[:, 1:]).sum(1)
        return dpo(sums[:3], sums[3:6]) - sums[6:].mean()

    (passed,) = watch(model, step, pairing="thirds")
    assert passed.unpaired == 3
    assert error(passed, true) <= TOLERANCE[true.arithmetic]


def weighted_tokens(model: nn.Module, batch: PairBatch) -> Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    weights = torch.linspace(0.5, 1.5, logps.shape[1]) * batch.completion_mask[:, 1:]
    return dpo(*(logps * weights).sum(1).chunk(2))


def extra(kind: str) -> Callable[[nn.Module, PairBatch], Tensor]:
    """DPO with a term on the logits that is no log-prob of the responses."""

    def step(model: nn.Module, batch: PairBatch) -> Tensor:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        marks = batch.completion_mask[:, 1:].bool()
        scores = logits[:, :-1].log_softmax(-1)
        logps = scores.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        loss = dpo(*(logps * marks).sum(1).chunk(2))
        terms = {
            "z-loss": lambda: logits[:, :-1].logsumexp(-1)[marks].square().mean(),
            "entropy": lambda: (scores.exp() * scores).sum(-1)[marks].mean(),
            "label smoothing": lambda: -scores.mean(-1)[marks].mean(),
        }
        return loss + 0.01 * terms[kind]()

    return step


def entropy_of_the_fused_head(model: nn.Module, batch: PairBatch) -> Tensor:
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    output = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels_of(batch), fused_lm_head=True
    )
    return dpo(*output.log_probs.sum(1).chunk(2)) + 0.01 * output.entropy.mean()


def with_logits(change: Callable[[Tensor], Tensor], **options: bool) -> Callable[[nn.Module, PairBatch], Tensor]:
    """DPO on logits that something is done to, or beside other outputs."""

    def step(model: nn.Module, batch: PairBatch) -> Tensor:
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
        logps = change(output.logits)[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        loss = dpo(*(logps * batch.completion_mask[:, 1:]).sum(1).chunk(2))
        return loss + (0.1 * output.hidden_states[-1].square().mean() if options else 0.0)

    return step


def rare_token_penalised(model: nn.Module, batch: PairBatch) -> Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    return dpo(*(logps * batch.completion_mask[:, 1:]).sum(1).chunk(2)) + 0.01 * logits[:, :-1, 95].square().mean()


REFUSED = {
    "hidden states": (lambda: build("llama"), with_logits(lambda x: x, output_hidden_states=True), "hidden_states"),
    "rare token": (lambda: build("llama"), rare_token_penalised, "weighs the tokens"),
    "z-loss": (lambda: build("llama"), extra("z-loss"), "weighs the tokens"),
    "entropy bonus": (lambda: build("llama"), extra("entropy"), "weighs the tokens"),
    "label smoothing": (lambda: build("llama"), extra("label smoothing"), "weighs the tokens"),
    "entropy of the fused head": (lambda: build("llama"), entropy_of_the_fused_head, "passes the log-probs by"),
    "tokens weighed differently": (lambda: build("llama"), weighted_tokens, "weighs the tokens"),
    "fused experts": (lambda: build("mixtral"), through_logits, "no rule can tell the rows apart"),
    "einsum": (lambda: build_odd("einsum projections"), None, "no rule can tell the rows apart"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_off_is_said(name: str) -> None:
    make, way, reason = REFUSED[name]
    model, batch = prepare(make()), ragged()

    def bare_logits() -> Tensor:
        logps = model(batch.input_ids)[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        return dpo(*(logps * batch.completion_mask[:, 1:]).sum(1).chunk(2))

    (passed,) = watch(model, bare_logits if way is None else lambda: way(model, batch))
    assert passed.broken is None
    assert reason in (passed.problem or "")
    assert len(passed.rows) == 6


def test_a_pass_without_gradient_is_no_step() -> None:
    model, batch = prepare(build("gpt2")), ragged()

    def step() -> Tensor:
        with torch.no_grad():
            reference = through_logits(model, batch)
        return through_logits(model, batch) + 0 * reference

    assert len(watch(model, step)) == 1


def test_accumulated_batches_are_kept_apart() -> None:
    model = prepare(build("gpt2"))
    batches = (ragged().select([0, 1]), ragged().select([2]))
    trues = [truth(model, batch) for batch in batches]
    watcher = Piggyback(model, trainable(model), budget=2**24)
    watcher.arm()
    for batch in batches:
        (through_logits(model, batch) / 2).backward()
    passed = watcher.take()
    watcher.disarm()
    assert [error(one, true) <= 1e-9 for one, true in zip(passed, trues, strict=True)] == [True, True]


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_trainers_gradients_are_the_same_to_the_bit(reentrant: bool | None) -> None:
    def gradients(watched: bool) -> list[Tensor]:
        model, batch = prepare(build("llama", dtype=torch.float32), reentrant), ragged()
        torch.manual_seed(1)
        if watched:
            watch(model, lambda: through_logits(model, batch))
        else:
            through_logits(model, batch).backward()
        return [*(p.grad for p in model.parameters() if p.grad is not None), torch.rand(3)]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)


def test_an_error_of_its_own_does_not_reach_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("out of order")

    model, batch = prepare(build("gpt2")), ragged()
    monkeypatch.setattr("gradent.hooks.capture.Capture._record", broken)
    (passed,) = watch(model, lambda: through_logits(model, batch))
    assert "out of order" in (passed.problem or "")
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_check_can_fail() -> None:
    model, batch = prepare(build("gpt2")), ragged()
    true = truth(model, batch)
    swapped = PairBatch.from_rows([batch.row(row) for row in (1, 0, 2, 3, 4, 5)])
    (passed,) = watch(model, lambda: through_logits(model, swapped))
    assert error(passed, true) > 1e-2


def test_an_auxiliary_loss_is_noticed() -> None:
    model = adapt(build("mixtral", dtype=torch.float32), lora(target_modules=["q_proj", "v_proj"]))
    batch = ragged()
    prepare(model)

    def step() -> Tensor:
        output = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, output_router_logits=True
        )
        logps = output.logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        return dpo(*(logps * batch.completion_mask[:, 1:]).sum(1).chunk(2)) + 0.01 * output.aux_loss

    watcher = Piggyback(model, trainable(model), budget=2**24)  # transformers puts hooks of its own on the routers
    watcher.arm()
    step().backward()
    (passed,) = watcher.take()
    watcher.disarm()
    assert "auxiliary loss" in (passed.problem or "")
    assert passed.broken is None


def test_logits_changed_in_place_are_not_read() -> None:
    model, batch = prepare(build("llama")), ragged()
    (passed,) = watch(model, lambda: with_logits(lambda logits: logits.div_(0.7))(model, batch))
    assert "changed in place" in (passed.broken or "")


def test_two_batches_below_one_backward_are_not_taken_for_two_sides() -> None:
    model, batch = prepare(build("llama")), ragged()
    (passed,) = watch(model, lambda: through_logits(model, batch) + through_logits(model, batch))
    assert "two forwards" in (passed.broken or "")


def test_parameters_that_become_trainable_are_noticed() -> None:
    model, batch = prepare(build("llama")), ragged()
    model.lm_head.weight.requires_grad_(False)
    watcher = Piggyback(model, trainable(model), budget=2**24)
    watcher.arm()
    model.lm_head.weight.requires_grad_(True)
    through_logits(model, batch).backward()
    (passed,) = watcher.take()
    watcher.disarm()
    assert "other parameters are trainable" in (passed.broken or "")


def test_a_batch_that_the_loop_changes_afterwards() -> None:
    model, batch = prepare(lora_everywhere("llama")), ragged()
    ids = batch.input_ids.clone()

    def step() -> Tensor:
        logits = model(input_ids=ids, attention_mask=batch.attention_mask).logits
        ids[:, 0] = 1
        logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        return dpo(*(logps * batch.completion_mask[:, 1:]).sum(1).chunk(2))

    model.get_input_embeddings().weight.requires_grad_(False)
    (passed,) = watch(model, step)
    for row, (kept, _) in enumerate(passed.rows):
        assert torch.equal(kept, batch.row(row)[0])


def test_logits_are_let_go_of_once_they_are_read() -> None:
    model, batch = prepare(build("llama")), ragged()
    watcher = Piggyback(model, trainable(model), budget=2**24)
    watcher.arm()
    roots = []
    for _ in range(3):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        roots.append(weakref.ref(logits))
        logps = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        loss = dpo(*(logps * batch.completion_mask[:, 1:]).sum(1).chunk(2))
        del logits, logps
        gc.collect()
        assert roots[-1]() is not None, "they are still to be read"
        loss.backward()
        del loss
    gc.collect()
    assert [root() for root in roots] == [None] * 3
    assert [one.problem for one in watcher.take()] == [None] * 3
    watcher.disarm()


class Looking(nn.Module):
    """Every position sees the mean of all, those after it and the padding's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(99, 6), nn.Linear(6, 6), nn.Linear(6, 99)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> SimpleNamespace:
        hidden = self.mix(self.embed(input_ids)).tanh()
        return SimpleNamespace(logits=self.head(hidden + hidden.mean(1, keepdim=True)))


def pair_by_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have matrices reduced as large ones are, however small they are."""
    monkeypatch.setattr("gradent.hooks.ledger.pairs_together", lambda *args, **options: None)
    monkeypatch.setattr("gradent.hooks.ledger.pairs_pay", lambda *args, **options: False)
    monkeypatch.setattr("gradent.hooks.ledger.product_pays", lambda *args, **options: False)


def test_padding_that_gets_a_gradient_is_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pair_by_pair(monkeypatch)
    batch = ragged()
    torch.manual_seed(0)
    model = Looking().double()
    parameters = list(trainable(model).values())
    logits = model(batch.input_ids).logits[:, :-1].log_softmax(-1)
    logps = (logits.gather(-1, batch.input_ids[:, 1:, None])[..., 0] * batch.completion_mask[:, 1:]).sum(1)
    rows = [torch.autograd.grad(logp, parameters, retain_graph=True) for logp in logps]
    flat = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in rows])
    chosen, rejected = flat[:3], flat[3:]
    want = torch.stack([(chosen**2).sum(1), (rejected**2).sum(1), (chosen * rejected).sum(1)], 1)
    (passed,) = watch(model, lambda: through_logits(model, batch))
    assert passed.problem is None
    torch.testing.assert_close(sum(passed.entries.values()), want, rtol=1e-9, atol=0)
    # Where one does not wait for the answer, it is found out at the end, and there are no entries.
    monkeypatch.setattr("gradent.hooks.forward.waits", lambda device: False)
    (passed,) = watch(model, lambda: through_logits(model, batch))
    assert "padding" in (passed.problem or "")


@pytest.mark.parametrize("waits", [True, False])
def test_a_shared_weight_gradient_leaves_nothing_out_that_is_not_zero(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradent.hooks.forward.waits", lambda device: waits)
    monkeypatch.setattr("gradent.kernels.shared.products_fit", lambda *args: False)
    gradients = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, batch = Looking().double(), ragged()
        if watched:
            assert watch(model, lambda: through_logits(model, batch), share=True)[0].shared == 2  # noqa: B023
        else:
            through_logits(model, batch).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, shared in zip(*gradients, strict=True):
        torch.testing.assert_close(shared, plain, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_padding_takes_no_part(way: str, lora: bool, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the head the responses alone, of other matrices the rows up to their ends."""
    monkeypatch.setattr("gradent.hooks.forward.waits", lambda device: waits)
    reduced: list[tuple[int, int]] = []

    def reduce(u_w: Tensor, v_w: Tensor, u_l: Tensor, v_l: Tensor, **options: object) -> Tensor:
        reduced.append((len(u_w), len(u_l)))
        return reduce_pair(u_w, v_w, u_l, v_l, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("gradent.hooks.ledger.reduce_pair", reduce)
    pair_by_pair(monkeypatch)
    model, batch, true, limit = set_up("llama", lora=lora, way=way, checkpointing="kept")
    batch = ragged()
    (passed,) = watch(model, lambda: WAYS[way](model, batch))
    assert error(passed, true) <= limit
    ends = batch.attention_mask.sum(1)
    whole = {(int(ends[pair]), int(ends[pair + 3])) for pair in range(3)}
    answers = batch.completion_mask.sum(1)
    last = 1 if way == "logits" else 0  # with the position after the last token that is predicted
    heads = {(int(answers[pair]) + last, int(answers[pair + 3]) + last) for pair in range(3)}
    assert set(reduced) <= whole | heads
    assert whole <= set(reduced)
    assert lora or heads <= set(reduced)


class Picking(nn.Module):
    """Two experts, each of which gets every token, in an order of its own; or the tokens as they are."""

    def __init__(self, *, picks: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(99, 6), nn.Linear(6, 99)
        self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.picks = picks

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> SimpleNamespace:
        hidden = self.embed(input_ids).tanh()
        flat = hidden.view(-1, 6)
        count = len(flat)
        orders = [torch.arange(count).flip(0), torch.arange(count).roll(3)]
        total = torch.zeros_like(flat)
        for expert, order in zip(self.experts, orders, strict=True):
            if self.picks:
                total = total.index_add(0, order, expert(flat[order]).tanh())
            else:
                total = total + expert(flat).tanh()
        return SimpleNamespace(logits=self.head(total.view(hidden.shape)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("picks", [False, True])
def test_tokens_that_an_expert_gets_in_another_order(picks: bool, frozen: bool) -> None:
    """As many as there are in the batch, and yet not row after row; with and without a graph behind them."""
    torch.manual_seed(0)
    model, batch = Picking(picks=picks).double(), ragged()
    model.embed.requires_grad_(not frozen)
    true = truth(model, batch)
    (passed,) = watch(model, lambda: through_logits(model, batch))
    if picks:
        assert "no rule can tell the rows apart" in (passed.problem or "")
        assert "experts.0.weight" in (passed.problem or "")
    else:
        assert error(passed, true) <= 1e-9


class Reentered(nn.Module):
    """A weight that is used in two ways, one of which no rule knows, behind reentrant checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.block = nn.Embedding(99, 6), nn.Linear(6, 99), Twice()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> SimpleNamespace:
        hidden = checkpoint(self.block, self.embed(input_ids), use_reentrant=True)
        return SimpleNamespace(logits=self.head(hidden))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight).tanh() + torch.einsum("rti,oi->rto", hidden, self.weight).tanh()


def test_a_use_that_a_reentrant_region_hides() -> None:
    torch.manual_seed(0)
    model, batch = Reentered().double().train(), ragged()
    (passed,) = watch(model, lambda: through_logits(model, batch))
    assert "no rule can tell the rows apart where the model uses block.weight" in (passed.problem or "")


class TokensFirst(nn.Module):
    """Activations `[L, R, ...]`, as some models written by hand have them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(99, 6), nn.Linear(6, 6), nn.Linear(6, 99)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object) -> SimpleNamespace:
        hidden = self.mix(self.embed(input_ids).transpose(0, 1)).tanh()
        return SimpleNamespace(logits=self.head(hidden).transpose(0, 1))


def test_as_many_rows_as_tokens() -> None:
    """No matter where rows are known to come first; else nothing tells the axes apart."""
    batch = PairBatch.from_rows([square().row(row) for row in (0, 1, 2, 4, 5, 6)])
    assert batch.input_ids.shape == (6, 6)
    model = build("gpt2")
    true = truth(model, batch)
    prepare(model)
    (passed,) = watch(model, lambda: through_logits(model, batch))
    assert error(passed, true) <= 1e-9
    torch.manual_seed(0)
    other = TokensFirst().double()
    (passed,) = watch(other, lambda: through_logits(other, batch))
    assert "as many rows as tokens" in (passed.problem or "")
