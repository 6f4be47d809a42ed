"""`audit_tokens` on a group of rollouts: the record holds what `token_influence` says, the page shows it; errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradent import RowBatch, token_influence
from gradent.auditing.group_tokens import GroupTokenAudit
from gradent.auditing.pair_tokens import audit_tokens
from gradent.auditing.state.config import TokenConfig
from gradent.errors import DataFileError, GradentError, InputError, PairError
from gradent.record import read_group_tokens, write_group_tokens
from gradent.record.group_rows import list_group_tokens, rank_group_tokens
from gradent.report import write_report
from gradent.report.page.numbers import signed_number
from gradent.report.tokens.groups import write_group_report
from tests.auditing.made import PAIRS, said, write_jsonl
from tests.report.test_page import read
from tests.report.token_records import HOSTILE

GROUP = {
    "prompt": "The film was",
    "completions": [" a quiet joy.", " a loud bore.", " joy.", " long."],
    "rewards": [1.0, 0.0, 0.75, 0.25],
}
WEIGHTS = [0.5, -0.5, 0.25, -0.25]
MESSAGES = {
    "prompt": said("The film was", "user"),
    "completions": [said(text) for text in GROUP["completions"]],
    "advantages": WEIGHTS,
}
FILES = {"group_tokens.json", "group_tokens.html"}


def run(model: Path, rows: list[Any], pair: int = 0, **options: Any) -> GroupTokenAudit:
    data = write_jsonl(model.parent / "rollouts.jsonl", rows)
    arguments = {"out": model.parent / "out", "quiet": True, **options}
    result = audit_tokens(TokenConfig(model=str(model), data=str(data), pair=pair, **arguments))
    assert isinstance(result, GroupTokenAudit)
    return result


@pytest.mark.parametrize("row", [GROUP, MESSAGES], ids=["strings", "messages"])
def test_the_record_is_what_the_library_says(row, local_model) -> None:
    result = run(local_model, [PAIRS[0], row], pair=1, dtype="float64")
    record = result.record
    tokenizer = AutoTokenizer.from_pretrained(local_model)
    model = AutoModelForCausalLM.from_pretrained(local_model, dtype=torch.float64)
    batch = RowBatch.from_text(tokenizer, [row["prompt"]], [row["completions"]], 128, add_eos=row is GROUP)
    (found,) = token_influence(model, batch, torch.tensor(WEIGHTS))
    assert [each["weight"] for each in record["rollouts"]] == WEIGHTS
    assert [each["ids"] for each in record["rollouts"]] == [
        ids[marks].tolist() for ids, marks in (batch.row(number) for number in range(4))
    ]
    assert {(part["positive"], part["rollout"]) for part in record["influence"]} == set(found.influence)
    assert found.nthr is not None
    for part in record["influence"]:
        place = part["positive"], part["rollout"]
        torch.testing.assert_close(torch.tensor(part["values"], dtype=torch.float64), found.influence[place])
        assert (part["nthr"] is not None) == (place in found.nthr)
        if part["nthr"] is not None:
            torch.testing.assert_close(torch.tensor(part["nthr"], dtype=torch.float64), found.nthr[place])
    assert record["correlation"] == pytest.approx(found.correlation)
    assert record["data"]["weights_from"] == ("rewards" if row is GROUP else "advantages")
    assert any("reward less the mean" in note for note in record["notes"]) == (row is GROUP)
    assert (record["data"]["row"], record["data"]["rows"]) == (1, 2)
    assert {path.name for path in (local_model.parent / "out").iterdir()} == FILES
    assert read_group_tokens(result.record_path) == record


def test_strongest_tokens_are_the_negatives_of_each_positive(local_model) -> None:
    record = run(local_model, [GROUP]).record
    rows = list_group_tokens(record)
    pulls, pushes = rank_group_tokens(record, rows, 2)
    assert {row.rollout for row in pulls + pushes} <= {1, 3}
    for positive in (0, 2):
        own = sorted(row.influence for row in rows if row.positive == positive and row.rollout in (1, 3))
        assert [row.influence for row in pulls if row.positive == positive] == [each for each in own[:2] if each < 0]
        assert [row.influence for row in pushes if row.positive == positive] == [
            each for each in own[:-3:-1] if each > 0
        ]


def test_the_page_can_be_made_again_and_shows_every_number(local_model) -> None:
    result = run(local_model, [GROUP])
    before = result.page_path.read_text("utf-8")
    result.page_path.unlink()
    assert write_report(local_model.parent / "out") == [result.page_path]
    assert result.page_path.read_text("utf-8") == before
    shown = " ".join(read(before).text.split())
    assert "What moves completion 0 (weight +0.500)" in shown and "What moves completion 2 (weight +0.250)" in shown
    assert "NTHR's score of the same tokens" in shown
    for row in list_group_tokens(result.record):
        assert f"({signed_number(row.influence)})" in before
    (page,) = write_report(local_model.parent / "out", lr=0.5)
    at_rate = page.read_text("utf-8")
    assert all(f"({signed_number(0.5 * row.influence)})" in at_rate for row in list_group_tokens(result.record))
    assert "in nats at a learning rate of 0.5." in at_rate and "per unit of learning rate" not in at_rate


def test_hostile_tokens_are_text(local_model, tmp_path) -> None:
    record: dict[str, Any] = {**run(local_model, [GROUP]).record}
    record["rollouts"] = [
        {"ids": [*range(len(HOSTILE))], "tokens": HOSTILE, "weight": weight} for weight in (1.0, -1.0)
    ]
    values = [float(number - 3) for number in range(len(HOSTILE))]
    record["influence"] = [{"positive": 0, "rollout": 1, "values": values, "nthr": values}]
    write_group_tokens(tmp_path / "group_tokens.json", record)
    html = write_group_report(tmp_path).read_text("utf-8")
    assert "<img" not in html.partition("<script>")[0] and not set("\u202e\x00") & set(html)
    record["influence"][0]["values"] = values[1:]
    write_group_tokens(tmp_path / "group_tokens.json", record)
    with pytest.raises(DataFileError, match="there must be one a token"):
        write_group_report(tmp_path)


def test_what_is_printed(local_model, capsys) -> None:
    run(local_model, [GROUP], quiet=False)
    told = capsys.readouterr()
    assert "0: +0.500, 1: -0.500" in told.out and "rank correlation of" in told.out
    assert "The tokens of lowered completions that pull a raised completion down most" in told.out
    assert "note: A completion's weight is its advantage" in told.err


def without(*keys: str, **changes: Any) -> dict[str, Any]:
    return {**{key: value for key, value in GROUP.items() if key not in keys}, **changes}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (without("rewards"), r"the row has \['completions', 'prompt'\].*Accepted: one of 'weights'"),
        (without(rewards=[1.0]), "rewards is 1 values for 4 completions"),
        (without(rewards="much"), "rewards is a str for 4 completions"),
        (without(rewards=[1, 0, None, 2]), r"rewards\[2\] is None.*finite numbers"),
        (without(rewards=[1, 0, float("nan"), 2]), r"rewards\[2\] is nan"),
        (without(rewards=[0.1] * 4), "rewards are 0.1, 0.1, 0.1, 0.1, so no completion is lowered"),
        (without("rewards", weights=[1, 2, 0, 3]), "weights are 1, 2, 0, 3.*one of them above 0 and one below it"),
        (without("prompt"), "missing 'prompt'"),
        (without(completions=" one"), "completions is a str; accepted is a list of two completions or more"),
        (without(completions=[" one"]), "completions is a list of 1; accepted"),
        (without(completions=[" a", said(" b"), " c", " d"]), r"completions\[1\] is messages but prompt is text"),
        (without(completions=[" a", 7, " c", " d"]), r"completions\[1\] is a int; accepted is a string"),
        (without(images=["a.png"]), "the row carries 'images'"),
    ],
)
def test_a_bad_row_is_named(row, message, local_model) -> None:
    with pytest.raises(DataFileError, match=f"rollouts.jsonl:2: {message}"):
        run(local_model, [GROUP, row], pair=1)
    assert not list((local_model.parent / "out").glob("*"))


def test_what_else_a_user_can_get_wrong(local_model) -> None:
    with pytest.raises(InputError, match=r"rollouts.jsonl:1: .*--by-module is for pairs"):
        run(local_model, [GROUP], by_module=True)
    with pytest.raises(InputError, match=r"rollouts.jsonl:1: .*--masks is for pairs"):
        run(local_model, [GROUP], masks=Path("masks.parquet"))
    with pytest.raises(PairError, match=r"rollouts.jsonl:1: completions\[3\] is empty"):
        run(local_model, [without(completions=[" a", " b", " c", ""])], add_eos=False)


def test_rewards_near_their_mean_weigh_nothing_and_long_completions_are_cut(local_model) -> None:
    row = without(rewards=[0.1, 0.3, 0.2, 0.2], completions=[" a", " b" * 90, " c", " d"])
    record = run(local_model, [row]).record
    assert [each["weight"] for each in record["rollouts"]][2:] == [0.0, 0.0]
    assert record["data"]["truncated"] == 1
    assert any("1 of 4 rows lost their end to max_length 128" in note for note in record["notes"])


def test_rollouts_are_cut_as_pairs_are(local_model) -> None:
    row = without(completions=[" good", " b" * 90, " c", " d"])
    record = run(local_model, [row], truncation_mode="keep_end", max_length=40, dtype="float64").record
    assert record["settings"]["truncation_mode"] == "keep_end" and record["data"]["truncated"] == 1
    tokenizer = AutoTokenizer.from_pretrained(local_model)
    model = AutoModelForCausalLM.from_pretrained(local_model, dtype=torch.float64)
    whole = [tokenizer(row["prompt"] + text + tokenizer.eos_token)["input_ids"] for text in row["completions"]]
    start = len(tokenizer(row["prompt"])["input_ids"])
    cut = [ids[-40:] for ids in whole]
    responses = [ids[max(start, len(ids) - 40) :] for ids in whole]
    responses[1] = responses[1][1:]  # nothing predicts the first token of a row that lost its prompt
    assert [each["ids"] for each in record["rollouts"]] == responses
    rows = [
        (torch.tensor(ids), torch.arange(len(ids)) >= len(ids) - len(response))
        for ids, response in zip(cut, responses, strict=True)
    ]
    batch = RowBatch.from_rows(rows, torch.zeros(4, dtype=torch.int64))
    (found,) = token_influence(model, batch, torch.tensor(WEIGHTS, dtype=torch.float64))
    for each in record["influence"]:
        torch.testing.assert_close(
            torch.tensor(each["values"], dtype=torch.float64), found.influence[each["positive"], each["rollout"]]
        )


def test_a_device_that_is_full(local_model, monkeypatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("gradent.auditing.group_tokens.token_influence", full)
    with pytest.raises(GradentError, match=r"rollouts.jsonl:1: the device ran out of memory.*--max-length"):
        run(local_model, [GROUP])


def test_a_record_without_a_correlation(local_model) -> None:
    result = run(local_model, [without(completions=[" a", "b", " a", "b"], rewards=[1, 0, 1, 0])], add_eos=False)
    record = json.loads(result.record_path.read_text("utf-8"))
    assert record["correlation"] is None or -1 <= record["correlation"] <= 1
