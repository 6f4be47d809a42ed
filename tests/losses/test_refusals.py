"""What losses say of one bad pair among good ones, and of names and functions that they cannot take."""

from __future__ import annotations

import re

import pytest
import torch

from gradent import losses
from gradent.errors import InputError, NonFiniteError
from gradent.losses.base import describe_pairs

GIVEN = {"chosen_logp": [-1.0, -2.0], "rejected_logp": [-3.0, -4.0], "chosen_len": [1, 2], "rejected_len": [3, 4]}
NORMS = {"chosen_norm": [1.0, 0.0], "rejected_norm": [2.0, 1.0]}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"chosen_len": [1, 0]}, "chosen_len is under 1 for pair 1;"),
        ({"rejected_len": [0.5, 1]}, "rejected_len is under 1 for pair 0;"),
        ({"chosen_norm": [1.0, -1e-3]}, "chosen_norm is below 0 for pair 1;"),
        ({"rejected_norm": [-1.0, 0.0]}, "rejected_norm is below 0 for pair 0;"),
    ],
)
def test_one_bad_pair(changed: dict[str, list[float]], said: str) -> None:
    loss = losses.get("pairwise_normalized", base="simpo")
    loss.weights(**GIVEN, **NORMS)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=said):
        loss.weights(**GIVEN | NORMS | changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(("side", "weight"), [("chosen", "d_w"), ("rejected", "d_l")])
def test_which_weight_is_not_finite(side: str, weight: str) -> None:
    given = {"chosen_logp": torch.tensor([1.0, 2.0]), "rejected_logp": torch.tensor([1.0, 2.0])}
    given[f"{side}_logp"][1] = 0.0  # where a root has no slope
    roots = losses.from_callable(lambda chosen_logp, rejected_logp: (chosen_logp.sqrt() + rejected_logp.sqrt()).sum())
    with pytest.raises(NonFiniteError, match=f"{weight} is nan or inf for pair 1"):
        roots.weights(**given)


def test_how_pairs_are_listed() -> None:
    def said(count: int) -> str:
        return describe_pairs(torch.tensor([False] + [True] * count))

    assert said(1) == "pair 1" and said(2) == "pairs 1, 2"
    assert said(8) == "pairs 1, 2, 3, 4, 5, 6, 7, 8"
    assert said(9) == "pairs 1, 2, 3, 4, 5, 6, 7, 8, ... (9 in all)"


@pytest.mark.parametrize("name", [*losses.LOSSES, *losses.DESIGNS])
def test_a_name_cannot_be_given(name: str) -> None:
    loss = losses.get(name)
    assert loss.name == name
    with pytest.raises(TypeError, match="unexpected keyword argument 'name'"):
        type(loss)(name="another")  # type: ignore[call-arg]


def test_a_function_without_a_signature_is_refused() -> None:
    with pytest.raises(InputError, match=re.escape("add has no readable signature; wrap it in a function")):
        losses.from_callable(torch.add)
