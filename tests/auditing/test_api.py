"""`audit` from end to end: its records hold what `measure` and `verdict` say of the same pairs, and how it was done."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, TrainableTokensConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from gradent import PairBatch, audit, losses, measure, measure_tokens, verdict
from gradent.auditing import write as module
from gradent.auditing.api import AuditResult
from gradent.auditing.measuring import batches as scan
from gradent.auditing.measuring import tokens as token_scan
from gradent.errors import GradentWarning, InputError, NonFiniteError
from gradent.measurement import sequence_logps
from gradent.record import CASE_NAMES, PAIR_COLUMNS, read_pairs, read_summary, read_tokens
from tests.auditing.made import FORMATS, PAIRS, save_lora, write_jsonl


def run(model: Path, rows: list[Any] = PAIRS, **options: Any) -> AuditResult:
    data = write_jsonl(model.parent / "pairs.jsonl", rows)
    defaults = {"out": model.parent / "out", "quiet": True, "report": False, "attribution": False}
    return audit(model, data, **{**defaults, **options})


def run_whole(model: Path, rows: list[Any] = PAIRS, **options: Any) -> AuditResult:
    """`run`, with the account of a step on the sample."""
    return run(model, rows, attribution=True, **options)


def written(folder: Path) -> list[str]:
    """Names of the records there, in order."""
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def by_hand(tokenizer, rows: list[Any] = PAIRS) -> PairBatch:
    """The batch that anybody would make of these rows."""
    columns = [[row[key] for row in rows] for key in ("prompt", "chosen", "rejected")]
    return PairBatch.from_text(tokenizer, *columns, max_length=128, add_eos=isinstance(columns[0][0], str))


def columns_of(result: AuditResult) -> dict[str, list[Any]]:
    return read_pairs(result.pairs_path).to_pydict()


def assert_columns(columns: dict[str, list[Any]], **expected: torch.Tensor) -> None:
    for name, values in expected.items():
        found = torch.tensor(columns[name], dtype=torch.float64)
        torch.testing.assert_close(
            found, values.double(), rtol=2e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def float_columns(gram, v, chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, torch.Tensor]:
    entries = (
        "chosen_sq",
        "rejected_sq",
        "inner",
        "cosine",
        "chosen_logp",
        "rejected_logp",
        "chosen_len",
        "rejected_len",
    )
    judged = ("d_w", "d_l", "chosen_change", "rejected_change", "case")
    return {
        **{name: getattr(gram, name) for name in entries},
        **{name: getattr(v, name) for name in judged},
        "ref_chosen_logp": chosen,
        "ref_rejected_logp": rejected,
    }


@pytest.mark.parametrize("name", ["strings", "messages"])
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_numbers_are_those_of_measure_and_verdict(loss, name, local_model, tiny_llama, tiny_tokenizer) -> None:
    columns = columns_of(run(local_model, FORMATS[name], loss=loss, batch_size=3))
    gram = measure(tiny_llama, by_hand(tiny_tokenizer, FORMATS[name]))
    refs = gram.chosen_logp, gram.rejected_logp
    expected = float_columns(gram, verdict(gram, losses.get(loss), *refs), *refs)
    assert_columns(columns, **expected)
    assert columns["pair"] == list(range(len(FORMATS[name])))
    for wrong in ("inner", "chosen_logp", "chosen_change"):
        with pytest.raises(AssertionError, match=wrong):
            assert_columns(columns, **{wrong: expected[wrong].flip(0)})


def test_numbers_of_an_adapter_against_its_base(local_model, tiny_llama, tiny_tokenizer, tmp_path) -> None:
    adapter = save_lora(tmp_path / "adapter", local_model)
    result = run(local_model, loss=losses.get("dpo", beta=0.5), adapter=adapter, batch_size=3)
    base = AutoModelForCausalLM.from_pretrained(local_model)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()
    batch = by_hand(tiny_tokenizer)
    gram, refs = measure(model, batch), sequence_logps(tiny_llama, batch)
    assert_columns(columns_of(result), **float_columns(gram, verdict(gram, losses.get("dpo", beta=0.5), *refs), *refs))
    assert result.summary["model"]["trainable_parameters"] < result.summary["model"]["parameters"]
    assert result.summary["reference"] == {"kind": "adapter_off", "source": None}
    alone = columns_of(run(adapter, loss=losses.get("dpo", beta=0.5), out=tmp_path / "alone"))
    for name, values in columns_of(result).items():
        assert alone[name] == (values if name == "checkpoint" else pytest.approx(values, rel=1e-4, abs=1e-9)), name


def test_numbers_against_another_reference(local_model, tiny_llama, tiny_tokenizer, tmp_path) -> None:
    other = LlamaForCausalLM(tiny_llama.config).eval()
    other.save_pretrained(tmp_path / "other")
    result = run(local_model, loss="ipo", reference=tmp_path / "other")
    batch = by_hand(tiny_tokenizer)
    gram, refs = measure(tiny_llama, batch), sequence_logps(other, batch)
    assert_columns(columns_of(result), **float_columns(gram, verdict(gram, losses.get("ipo"), *refs), *refs))
    assert result.summary["reference"] == {"kind": "model", "source": str(tmp_path / "other")}


def test_a_loss_without_a_reference_leaves_its_columns_empty(local_model, tiny_llama, tiny_tokenizer) -> None:
    columns = columns_of(run(local_model, loss="simpo"))
    gram = measure(tiny_llama, by_hand(tiny_tokenizer))
    expected = float_columns(gram, verdict(gram, losses.get("simpo")), gram.inner, gram.inner)
    assert columns["ref_chosen_logp"] == columns["ref_rejected_logp"] == [None] * len(PAIRS)
    assert_columns(columns, **{name: each for name, each in expected.items() if not name.startswith("ref_")})


def test_a_loss_of_ones_own(local_model) -> None:
    def hinge(chosen_logp, rejected_logp):
        return (rejected_logp - chosen_logp + 1e6).relu().sum()

    result = run(local_model, loss=losses.from_callable(hinge))
    assert columns_of(result)["d_w"] == [1.0] * len(PAIRS)
    assert result.summary["loss"] == {"name": "hinge"}


def test_the_summary_is_of_the_columns(local_model) -> None:
    result = run(local_model, by_module=True)
    columns, summary = columns_of(result), read_summary(result.summary_path)
    assert summary == json.loads(json.dumps(result.summary))
    counted = Counter(CASE_NAMES[case] for case in columns["case"])
    assert {name: each["count"] for name, each in summary["cases"].items() if each["count"]} == counted
    assert summary["cosine"]["mean"] == pytest.approx(sum(columns["cosine"]) / len(PAIRS))
    assert summary["modules"] is not None
    assert sum(part["cosine_part"] for part in summary["modules"].values()) == pytest.approx(summary["cosine"]["mean"])
    top = summary["most_entangled"][0]
    assert top["cosine"] == max(columns["cosine"])
    assert top["where"].endswith(f"pairs.jsonl:{top['pair'] + 1}")
    assert top["chosen"] in " ".join(PAIRS[top["pair"]]["chosen"].split())
    assert (summary["model"]["dtype"], summary["model"]["device"], summary["model"]["coverage"]) == (
        "float32",
        "cpu",
        1.0,
    )
    assert set(columns) == set(PAIR_COLUMNS)


def test_what_was_done_is_on_record(local_model) -> None:
    (local_model / "trainer_state.json").write_text('{"global_step": 40}')
    rows = [*PAIRS, {"prompt": "p"}, {"prompt": "q", "chosen": 200 * "y", "rejected": "n"}]
    summary = run_whole(local_model, rows, skip_bad_rows=True, add_eos=False, batch_size=2).summary
    assert summary["data"]["rows"] == len(rows) == summary["data"]["measured"] + 1
    assert [bad["row"] for bad in summary["data"]["skipped"]] == [len(PAIRS)]
    assert summary["data"]["truncated_responses"] == 1
    assert summary["model"]["step"] == 40
    assert (summary["settings"]["add_eos"], summary["settings"]["max_length"]) == (False, 128)
    assert any("own reference" in note for note in summary["notes"])
    assert any("lost their end to max_length" in note for note in summary["notes"])


def test_the_step_and_the_rows_are_in_the_columns(local_model) -> None:
    (local_model / "trainer_state.json").write_text('{"global_step": 40}')
    columns = columns_of(run(local_model, [{"prompt": "p"}, *PAIRS], skip_bad_rows=True))
    assert set(columns["step"]) == {40}
    assert columns["pair"] == list(range(1, 1 + len(PAIRS)))
    assert set(columns["checkpoint"]) == {str(local_model)}


def test_an_earlier_audit_is_replaced(local_model) -> None:
    first = columns_of(run_whole(local_model, batch_size=3))
    second = run_whole(local_model, PAIRS[:2])
    assert (
        len(columns_of(second)["pair"])
        == read_summary(second.summary_path)["data"]["measured"]
        == 2
        < len(first["pair"])
    )
    assert written(second.pairs_path.parent) == [
        "modules.parquet",
        "pairs.parquet",
        "sample.parquet",
        "steps.parquet",
        "summary.json",
    ]


def test_pairs_do_not_stand_beside_the_summary_of_an_earlier_audit(local_model, monkeypatch) -> None:
    result = run_whole(local_model)

    def fail(*_, **__):
        raise InputError("no space")

    monkeypatch.setattr(module, "write_summary", fail)
    with pytest.raises(InputError, match=r"no space"):
        run_whole(local_model, PAIRS[:2])
    assert len(columns_of(result)["pair"]) == 2
    assert not result.summary_path.exists()


def test_a_gradient_of_zero_has_no_cosine(local_model, tiny_tokenizer, tmp_path) -> None:
    (token,) = tiny_tokenizer.convert_tokens_to_ids(["Z"])
    config = TrainableTokensConfig(token_indices=[token], target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(local_model), config)
    model.save_pretrained(tmp_path / "adapter")
    rows = [PAIRS[0], {"prompt": "Z", "chosen": "Za", "rejected": "Zb"}, PAIRS[1]]
    result = run(local_model, rows, adapter=tmp_path / "adapter", by_module=True)
    columns, summary = columns_of(result), result.summary
    assert [value is None for value in columns["cosine"]] == [True, False, True]
    assert columns["chosen_sq"][0] == columns["chosen_sq"][2] == 0.0
    assert (summary["cosine"]["undefined"], summary["cosine"]["mean"]) == (2, columns["cosine"][1])
    assert [each["pair"] for each in summary["most_entangled"]] == [1]
    assert summary["modules"] is not None
    assert sum(each["cosine_part"] for each in summary["modules"].values()) == pytest.approx(columns["cosine"][1])


def test_a_failure_leaves_an_earlier_audit_alone(local_model, monkeypatch) -> None:
    result = run_whole(local_model)
    before = result.pairs_path.read_bytes(), result.summary_path.read_bytes()

    def fail(*_, **__):
        raise NonFiniteError("no")

    monkeypatch.setattr(scan, "measure", fail)
    with pytest.raises(NonFiniteError):
        run_whole(local_model, PAIRS[:3])  # what has been measured before is not measured again
    assert (result.pairs_path.read_bytes(), result.summary_path.read_bytes()) == before


def test_without_tokens_the_records_are_as_ever(local_model) -> None:
    plain, with_tokens = run_whole(local_model), run_whole(local_model, token_pairs=2, out=local_model.parent / "with")
    assert plain.tokens_path is None
    assert plain.summary["tokens"] is None and plain.summary["settings"]["token_pairs"] is None
    assert columns_of(plain) == columns_of(with_tokens)
    differ = {name for name, value in plain.summary.items() if value != dict(with_tokens.summary)[name]}
    assert differ == {"tokens", "settings", "seconds", "what_if"}
    rows = [result.summary["what_if"] for result in (plain, with_tokens)]
    assert [row["loss"] for row, other in zip(*rows, strict=True) if row != other] == ["token_masked"]
    masked = [next(row for row in each if row["loss"] == "token_masked") for each in rows]
    assert masked[0]["reason"] and masked[1]["pairs"] == 2
    assert not (plain.pairs_path.parent / "tokens.parquet").exists()


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("float64", 1e-9)])
def test_tokens_add_up_to_their_pairs(dtype, limit, local_model, tmp_path, tiny_gpt2, tiny_tokenizer) -> None:
    if dtype == "float64":  # GPT-2 alone is float64 throughout
        local_model = tmp_path / "gpt2"
        tiny_gpt2.save_pretrained(local_model)
        tiny_tokenizer.save_pretrained(local_model)
    result = run(local_model, token_pairs=99, dtype=dtype)
    columns = columns_of(result)
    assert result.tokens_path is not None
    tokens = read_tokens(result.tokens_path).to_pydict()
    assert list(dict.fromkeys(tokens["pair"])) == columns["pair"]
    assert set(tokens["checkpoint"]) == {str(local_model)} and set(tokens["step"]) == {0}
    norms = [(w * loser) ** 0.5 for w, loser in zip(columns["chosen_sq"], columns["rejected_sq"], strict=True)]
    for place, pair in enumerate(columns["pair"]):
        for side in ("chosen", "rejected"):
            rows = [
                row for row, at in enumerate(zip(tokens["pair"], tokens["side"], strict=True)) if at == (pair, side)
            ]
            assert len(rows) == columns[f"{side}_len"][place]
            error = sum(tokens["entanglement"][row] for row in rows) - columns["inner"][place]
            assert abs(error) <= limit * norms[place]
    figures = result.summary["tokens"]
    assert figures is not None and figures["pairs"] == len(PAIRS)
    cosine = figures["cosine"]
    assert cosine["mean"] == pytest.approx(cosine["identical"] + cosine["differing"], abs=1e-12)
    assert cosine["mean"] == pytest.approx(sum(columns["cosine"]) / len(PAIRS), abs=limit)
    assert figures["sum"]["inner"] == pytest.approx(sum(columns["inner"]), abs=limit * sum(norms))
    assert read_summary(result.summary_path)["tokens"] == json.loads(json.dumps(figures))


def test_tokens_are_measured_on_pairs_spread_over_the_cosines(local_model, tiny_llama, tiny_tokenizer) -> None:
    result = run(local_model, token_pairs=2)
    columns = columns_of(result)
    assert result.tokens_path is not None
    tokens = read_tokens(result.tokens_path).to_pydict()
    order = sorted(range(len(PAIRS)), key=columns["cosine"].__getitem__)
    assert len(order) == 7
    pairs = sorted([order[1], order[5]])  # the quantiles 1/4 and 3/4
    assert list(dict.fromkeys(tokens["pair"])) == pairs
    batch = by_hand(tiny_tokenizer).select(pairs)
    expected = [
        value
        for gram in measure_tokens(tiny_llama, batch, progress=False)
        for value in (*gram.chosen_entanglement.tolist(), *gram.rejected_entanglement.tolist())
    ]
    assert tokens["entanglement"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_tokens_of_an_earlier_audit_do_not_stand_beside_new_pairs(local_model, monkeypatch) -> None:
    first = run_whole(local_model, token_pairs=3)
    folder = first.pairs_path.parent
    others = ["modules.parquet", "pairs.parquet", "sample.parquet", "steps.parquet", "summary.json"]
    assert written(folder) == [*others, "tokens.parquet"]
    run_whole(local_model)
    assert written(folder) == others
    run_whole(local_model, token_pairs=1)

    def fail(*_, **__):
        raise InputError("no space")

    monkeypatch.setattr(module, "write_tokens", fail)
    with pytest.raises(InputError, match=r"no space"):
        run_whole(local_model, token_pairs=2)
    assert written(folder) == ["modules.parquet", "pairs.parquet", "sample.parquet", "steps.parquet"]


def test_a_failure_at_the_tokens_leaves_an_earlier_audit_alone(local_model, monkeypatch) -> None:
    result = run_whole(local_model, token_pairs=1)
    folder = result.pairs_path.parent
    before = {name: (folder / name).read_bytes() for name in written(folder)}

    def fail(*_, **__):
        raise NonFiniteError("no")

    monkeypatch.setattr(token_scan, "measure_tokens", fail)
    with pytest.raises(NonFiniteError, match=r"pairs.jsonl:\d+: no"):
        run_whole(local_model, PAIRS[:3], token_pairs=1)
    assert {name: (folder / name).read_bytes() for name in written(folder)} == before


def test_tokens_of_an_adapter(local_model, tmp_path) -> None:
    adapter = save_lora(tmp_path / "adapter", local_model)
    result = run(local_model, adapter=adapter, token_pairs=2)
    assert result.tokens_path is not None
    tokens, columns = read_tokens(result.tokens_path).to_pydict(), columns_of(result)
    for pair in set(tokens["pair"]):
        both = sum(value for at, value in zip(tokens["pair"], tokens["entanglement"], strict=True) if at == pair)
        assert both / 2 == pytest.approx(columns["inner"][columns["pair"].index(pair)], rel=1e-4)


def test_quiet_is_quiet_and_otherwise_the_tables_are_printed(local_model, capsys) -> None:
    run_whole(local_model)
    assert capsys.readouterr().out == ""
    result = run_whole(local_model, quiet=False)
    out, err = capsys.readouterr()
    assert f"{result.summary['cosine']['p50']:+.3f}" in out
    assert "note: The model is its own reference" in err


def test_what_gradent_warns_of_is_on_record_and_other_warnings_go_their_way(local_model, monkeypatch) -> None:
    def warn(*arguments, **options):
        warnings.warn("one row at a time", GradentWarning, stacklevel=1)
        warnings.warn("something else", DeprecationWarning, stacklevel=1)
        return measure(*arguments, **options)

    monkeypatch.setattr(scan, "measure", warn)
    with pytest.warns(DeprecationWarning, match=r"something else") as caught:
        notes = run(local_model).summary["notes"]
    assert "one row at a time" in notes
    assert not any(issubclass(each.category, GradentWarning) for each in caught)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "dop"}, "--loss dop: unknown loss"),
        ({"loss": 3}, "loss is a int; accepted: a name"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"engine": "fast"}, "engine is 'fast'"),
        ({"memory_budget": "lots"}, "memory_budget='lots'"),
        ({"token_pairs": 0}, "token_pairs is 0; it must be at least 1"),
        ({"lr": 0}, "lr is 0; accepted is a number above 0"),
    ],
)
def test_settings_are_checked_before_anything_is_read(options, message, tmp_path) -> None:
    (tmp_path / "data.jsonl").write_text("no row\n")
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match=message):
        audit(tmp_path / "model", tmp_path / "data.jsonl", out=tmp_path / "out", quiet=True, **options)
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_to(local_model) -> None:
    folder = local_model.parent
    (folder / "file").touch()
    (folder / "taken" / "summary.json").mkdir(parents=True)
    for out, message in {"file": "cannot be made a directory", "taken": "summary.json: is a directory"}.items():
        with pytest.raises(InputError, match=re.escape(f"{folder / out}") + f".*{message}.*Choose another --out"):
            run(local_model, out=folder / out)
