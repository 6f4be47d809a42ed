"""The paper's claims about tokens on the demo's model: Section 4.3's signs, and Theorem 3's."""

from __future__ import annotations

import pytest

from scripts.token_claims import prepare, read_claims


@pytest.mark.slow
def test_the_papers_claims_hold_on_the_demos_model():
    model, _, batch = prepare()
    claims, grams = read_claims(model, batch)
    before, at, after = claims["before"], claims["at"], claims["after"]
    # Figure 4b: the differing tokens' entry is negative, identical tokens' entries are positive.
    assert (at.entry < 0).all()
    assert (after.entry > 0).all()
    assert (before.entry > 1 - 1e-5).all()  # up to where they differ the two are one
    # Theorem 3: a step leaves what is before (nearly) alone, raises the chosen label, lowers the suffix of both.
    assert before.chosen.abs().mean() < at.chosen.mean() / 10
    assert (at.chosen > 0).all() and (at.rejected < 0).all()
    assert (after.chosen < 0).all() and (after.rejected < 0).all()
    # Identical tokens entangle.
    splits = [gram.split() for gram in grams]
    assert sum(split.identical for split in splits) > sum(split.differing for split in splits)
