"""The loss of a run is read off its training_args.bin, and what is judged is said where it is another."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Any

import pytest
import torch

from gradent import losses
from gradent.auditing.state.run_loss import RunLoss, choose_loss, read_run_loss
from gradent.errors import InputError

trl = pytest.importorskip("trl")


def save(place: Path, config: Any, release: str = "1.16.0") -> str:
    place.mkdir(parents=True, exist_ok=True)
    torch.save(config, place / "training_args.bin")
    (place / "README.md").write_text(f"### Framework versions\n\n- TRL: {release}\n")
    return str(place)


def dpo(place: Path, **arguments: Any) -> Any:
    return trl.DPOConfig(str(place), report_to="none", bf16=False, use_cpu=True, **arguments)


@pytest.mark.parametrize(
    ("arguments", "loss"),
    [
        ({}, losses.get("dpo", beta=0.1)),
        ({"beta": 0.3, "loss_type": ["sigmoid"]}, losses.get("dpo", beta=0.3)),
        ({"loss_type": ["ipo"]}, losses.get("ipo", beta=0.1, length_normalized=True)),
        ({"loss_type": ["robust"], "label_smoothing": 0.1}, losses.get("robust", beta=0.1, label_smoothing=0.1)),
        ({"label_smoothing": 0.1}, losses.get("dpo", beta=0.1)),  # which TRL has ignored in sigmoid since 0.29
        ({"f_divergence_type": "js_divergence"}, losses.from_trl("sigmoid", {"f_divergence_type": "js_divergence"})),
        ({"loss_type": ["sigmoid", "hinge"], "loss_weights": [0.8, 0.2]},
         losses.from_trl(("sigmoid", "hinge"), {"loss_weights": (0.8, 0.2)})),
    ],
)  # fmt: skip
def test_the_loss_of_a_dpo_run(arguments: dict[str, Any], loss: losses.Loss, tmp_path: Path) -> None:
    found = read_run_loss(save(tmp_path / "run" / "checkpoint-5", dpo(tmp_path, **arguments)))
    assert found is not None and found.loss is not None
    assert (found.loss.name, vars(found.loss)) == (loss.name, vars(loss))
    of_run = read_run_loss(str(tmp_path / "run"))
    assert of_run == found, "of the run, whose checkpoints hold it"


def test_sigmoid_smoothed_its_labels_before_release_0_29(tmp_path: Path) -> None:
    found = read_run_loss(save(tmp_path, dpo(tmp_path, label_smoothing=0.1), "0.24.0"))
    assert found is not None and found.loss == losses.from_trl("sigmoid", {"label_smoothing": 0.1, "beta": 0.1})


class FDivergenceType(enum.Enum):
    """As TRL up to 0.27 has it in the place of a text."""

    REVERSE_KL = "reverse_kl"
    JS_DIVERGENCE = "js_divergence"


@pytest.mark.parametrize(
    ("arguments", "loss"),
    [
        ({"f_divergence_type": FDivergenceType.REVERSE_KL, "f_alpha_divergence_coef": 1.0}, losses.get("dpo")),
        ({"f_divergence_type": FDivergenceType.REVERSE_KL, "loss_type": "ipo"},
         losses.get("ipo", beta=0.1, length_normalized=True)),
        ({"f_divergence_type": FDivergenceType.JS_DIVERGENCE},
         losses.from_trl("sigmoid", {"f_divergence_type": "js_divergence", "beta": 0.1})),
    ],
)  # fmt: skip
def test_the_arguments_of_earlier_releases(arguments: dict[str, Any], loss: losses.Loss, tmp_path: Path) -> None:
    config = dpo(tmp_path)
    vars(config).update(arguments)  # as its own `__post_init__` leaves them
    found = read_run_loss(save(tmp_path, config, "0.25.1"))
    assert found is not None and found.loss is not None, found
    assert vars(found.loss) == vars(loss) and type(found.loss) is type(loss)


def test_a_run_without_a_reference_is_not_judged_with_one(tmp_path: Path) -> None:
    config = dpo(tmp_path)
    config.reference_free = True
    found = read_run_loss(save(tmp_path, config, "0.25.1"))
    assert found is not None and found.loss is None and "reference_free" in found.why_not


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"ld_alpha": 0.5}, "its ld_alpha has no closed form in a pair's log-probs"),
        ({"use_weighting": True}, "its use_weighting has no closed form"),
        ({"loss_type": ["aot"]}, "it sorts the log-ratios of the batch"),
        ({"loss_type": ["sft"]}, "a mean over the tokens of the batch"),
    ],
)
def test_what_no_loss_of_a_pair_is(arguments: dict[str, Any], why: str, tmp_path: Path) -> None:
    found = read_run_loss(save(tmp_path, dpo(tmp_path, **arguments)))
    assert found is not None and found.loss is None and why in found.why_not
    loss, (note,) = choose_loss(None, {}, found)
    assert loss == losses.get("dpo") and why in note and note.endswith("Judged is dpo.")


def test_files_that_do_not_say(tmp_path: Path) -> None:
    assert read_run_loss(str(tmp_path)) is None and read_run_loss("an-owner/a-model") is None
    (tmp_path / "training_args.bin").write_bytes(b"no pickle")
    assert read_run_loss(str(tmp_path)) is None
    from transformers import TrainingArguments  # noqa: PLC0415

    assert read_run_loss(save(tmp_path, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))) is None


RUN = RunLoss(told="DPOConfig(loss_type='ipo', beta=0.1)", loss=losses.get("ipo", length_normalized=True))


def test_the_runs_own_loss_is_the_default() -> None:
    loss, (note,) = choose_loss(None, {}, RUN)
    assert loss == RUN.loss and "The loss is the run's own: DPOConfig(loss_type='ipo', beta=0.1)" in note
    assert choose_loss(None, {"beta": 0.5}, RUN)[0] == losses.get("ipo", beta=0.5, length_normalized=True)
    with pytest.raises(InputError, match=r"has no hyperparameter 'lam'\. Name the loss that it is for \(--loss\)"):
        choose_loss(None, {"lam": 1.0}, RUN)
    assert choose_loss(None, {}, None) == (losses.get("dpo"), [])


def test_ipo_of_a_run_is_trls_unless_it_is_asked_otherwise() -> None:
    loss, notes = choose_loss("ipo", {}, RUN)
    assert loss == RUN.loss and "averaged over tokens" in notes[0] and len(notes) == 1
    loss, notes = choose_loss("ipo", {"length_normalized": False}, RUN)
    assert loss == losses.get("ipo") and "what is judged is" in notes[0]
    assert choose_loss("ipo", {}, None) == (losses.get("ipo"), [])


def test_another_loss_than_the_runs_is_said() -> None:
    loss, (note,) = choose_loss("simpo", {}, RUN)
    assert loss == losses.get("simpo") and note.startswith("The run was trained with DPOConfig(loss_type='ipo'")
    assert choose_loss(losses.get("dpo"), {}, RUN)[1] != []
    with pytest.raises(InputError, match=r"loss is a int; accepted: a name that losses\.get knows, or a Loss"):
        choose_loss(3, {}, None)
