"""Findings on made-up rows: each can appear, and each can fail to appear while the others stay."""

from __future__ import annotations

import json

import pytest

from gradent.demo.findings import judge
from tests.demo.rows import AS_IN_THE_PAPER, PAIRS, make_rows

RISES, FALLS, FALLS_MORE, NEGATIVE, GROWS, REJECTED = range(6)


def absent(**changed) -> set[int]:
    """Numbers of the findings that do not appear when some styles end elsewhere than in the paper."""
    ends = AS_IN_THE_PAPER | {
        name.replace("_", " ").replace("prefix ", "prefix+"): end for name, end in changed.items()
    }
    return {number for number, finding in enumerate(judge(make_rows(ends))) if not finding.appears}


def test_all_appear_where_the_numbers_are_the_paper_s():
    assert absent() == set()


@pytest.mark.parametrize(
    ("changed", "missing"),
    [
        ({"single_token": (-1.5, -3.0, -0.9)}, {RISES}),
        ({"short_suffix": (-0.8, -4.0, 0.3)}, {FALLS}),
        ({"prefix_suffix": (-0.8, -5.0, 0.7)}, {FALLS}),
        ({"short_suffix": (-3.5, -4.0, 0.3)}, {FALLS_MORE}),
        ({"short_suffix": (-0.5, -4.0, 0.3), "long_suffix": (-0.7, -5.0, 0.6)}, {FALLS, FALLS_MORE}),  # rises less
        ({"single_token": (-0.5, -3.0, 0.1)}, {NEGATIVE}),
        ({"short_suffix": (-2.0, -4.0, -0.3)}, {NEGATIVE}),
        ({"prefix_suffix": (-3.0, -5.0, -0.2)}, {NEGATIVE}),
        ({"short_suffix": (-2.0, -4.0, 0.8)}, {GROWS}),
        ({"long_suffix": (-3.0, -0.5, 0.6)}, {REJECTED}),
    ],
)
def test_each_can_fail_alone(changed, missing):
    assert absent(**changed) == missing


def test_a_change_within_two_standard_errors_is_no_finding():
    # Pairs `spread` apart have a standard deviation of sqrt(3.5) spreads; the single token rises by 0.5.
    error = (3.5 / PAIRS) ** 0.5
    assert judge(make_rows(AS_IN_THE_PAPER, spread=0.24 / error))[RISES].appears
    assert not judge(make_rows(AS_IN_THE_PAPER, spread=0.26 / error))[RISES].appears


def test_the_numbers_are_those_of_the_rows():
    (evidence,) = judge(make_rows(AS_IN_THE_PAPER))[RISES].evidence
    assert evidence.mean == pytest.approx(0.5)
    assert evidence.error == pytest.approx(0.01 * (3.5 / PAIRS) ** 0.5)
    _, evidence = judge(make_rows(AS_IN_THE_PAPER))[FALLS_MORE].evidence
    assert evidence.mean == pytest.approx(-1.0)
    assert evidence.error == pytest.approx(0, abs=1e-12)  # by pair: what pairs have in common cancels


def test_an_undefined_cosine_is_no_finding_and_no_number():
    findings = judge(make_rows(AS_IN_THE_PAPER | {"single token": (-0.5, -3.0, None)}))
    assert [finding.appears for finding in findings] == [True, True, True, False, False, True]
    record = findings[NEGATIVE].to_record()
    assert record["evidence"][0]["mean"] is None
    assert record["evidence"][0]["holds"] is False
    json.dumps(record, allow_nan=False)
