"""`audit_tokens`: its record holds what `measure_tokens`, `measure` and `token_effects` say of the pair; its errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gradent import PairBatch, measure, measure_tokens
from gradent.auditing import pair_tokens
from gradent.auditing.pair_tokens import TokenAudit, audit_tokens
from gradent.auditing.state.config import TokenConfig
from gradent.errors import DataFileError, GradentError, InputError, MemoryBudgetError, NonFiniteError
from gradent.loading import prepare
from gradent.record import read_token_record
from gradent.record.masks import MASK_COLUMNS, read_masks, write_masks
from gradent.report import write_token_report
from gradent.text import token_texts
from gradent.tokens.effects import token_effects
from tests.auditing.made import FORMATS, KINDS, PAIRS, save_lora, write_jsonl

FILES = {"tokens.json", "tokens.png", "tokens.html"}


def run(model: Path, rows: list[Any] = PAIRS, **options: Any) -> TokenAudit:
    data = write_jsonl(model.parent / "pairs.jsonl", rows)
    arguments = {"pair": 1, "out": model.parent / "out", "quiet": True, **options}
    if "adapter" in arguments:
        arguments["adapter"] = str(arguments["adapter"])
    return audit_tokens(TokenConfig(model=str(model), data=str(data), **arguments))


def by_hand(tokenizer, pair: dict[str, Any]) -> PairBatch:
    columns = ([pair[key]] for key in ("prompt", "chosen", "rejected"))
    return PairBatch.from_text(tokenizer, *columns, max_length=128, add_eos=isinstance(pair["chosen"], str))


def close(found: Any, expected: torch.Tensor) -> None:
    scale = max(float(expected.abs().max()), 1e-12)
    torch.testing.assert_close(torch.tensor(found).double() / scale, expected.double() / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("name", "pair"), [("strings", 1), ("strings", 6), ("messages", 0)])
def test_the_record_is_what_the_library_says(name, pair, local_model, tiny_llama, tiny_tokenizer) -> None:
    result = run(local_model, FORMATS[name], pair=pair, by_module=True)
    record, batch = result.record, by_hand(tiny_tokenizer, FORMATS[name][pair])
    (gram,) = measure_tokens(tiny_llama, batch)
    ((chosen, rejected),) = batch.split_tokens(token_effects(tiny_llama, batch, toward="margin"))
    whole = measure(tiny_llama, batch, by_module=True)
    close(record["inner"], gram.inner)
    close(record["chosen"]["squares"], gram.chosen_sq)
    close(record["rejected"]["effects"], rejected)
    close(record["chosen"]["effects"], chosen)
    close(
        [record["chosen"]["sq"], record["rejected"]["logp"]], torch.stack([whole.chosen_sq[0], whole.rejected_logp[0]])
    )
    assert record["chosen"]["ids"] == gram.chosen_ids.tolist()
    assert record["rejected"]["tokens"] == token_texts(tiny_tokenizer, gram.rejected_ids)
    assert [tuple(each) for each in record["alignment"]] == gram.alignment
    assert record["split"]["identical"] == pytest.approx(gram.split().identical, rel=1e-3)
    close(record["modules"]["lm_head"], torch.cat(whole.modules["lm_head"]))
    assert (record["data"]["row"], record["data"]["rows"]) == (pair, len(FORMATS[name]))
    with pytest.raises(AssertionError):
        close(record["inner"], gram.inner.flip(0))


def test_of_a_run_it_is_about_the_last_model(local_model: Path) -> None:
    whole = run(local_model).record
    directory = local_model.parent / "run"
    for step in (10, 20):
        shutil.copytree(local_model, directory / f"checkpoint-{step}")
    record = run(directory).record
    assert record["inner"] == whole["inner"]
    assert record["notes"][0] == f"{directory} is a run; this is about its last model, {directory / 'checkpoint-20'}."


def test_sums_of_the_record_are_the_pair_s(local_model) -> None:
    record = run(local_model, dtype="float64").record
    inner = sum(map(sum, record["inner"]))
    assert record["split"]["identical"] + record["split"]["differing"] == pytest.approx(inner)
    # A margin step moves chosen by ‖g_w‖² - ⟨g_w, g_l⟩ and rejected by ⟨g_w, g_l⟩ - ‖g_l‖².
    assert sum(record["chosen"]["effects"]) == pytest.approx(record["chosen"]["sq"] - inner, rel=1e-5)
    assert sum(record["rejected"]["effects"]) == pytest.approx(inner - record["rejected"]["sq"], rel=1e-5)
    assert record["modules"] is None
    assert record["model"]["dtype"] == "float64"


def test_three_files_and_a_page_that_can_be_made_again(local_model) -> None:
    result = run(local_model)
    out = local_model.parent / "out"
    assert {path.name for path in out.iterdir()} == FILES
    assert read_token_record(result.record_path) == result.record
    assert result.picture_path.read_bytes().startswith(b"\x89PNG")
    before = result.page_path.read_text("utf-8")
    result.page_path.unlink()
    assert write_token_report(out).read_text("utf-8") == before
    assert run(local_model, pair=0).record["data"]["row"] == read_token_record(out / "tokens.json")["data"]["row"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data(kind, local_model) -> None:
    KINDS[kind](local_model.parent / kind, PAIRS)
    data, out = local_model.parent / kind, local_model.parent / "out"
    result = audit_tokens(TokenConfig(model=str(local_model), data=str(data), pair=3, out=out, quiet=True))
    assert "".join(result.record["chosen"]["tokens"]) == " Yes.<eos>"


def test_an_adapter_is_what_is_measured(local_model, tmp_path) -> None:
    adapter = save_lora(tmp_path / "adapter", local_model)
    both, alone = run(local_model, adapter=adapter).record, run(adapter).record
    assert both["model"]["trainable_parameters"] < both["model"]["parameters"]
    assert both["inner"] == alone["inner"] and both["model"]["adapter"] == str(adapter)
    assert both["inner"] != run(local_model).record["inner"]


def test_identical_beginnings_and_endings(local_model) -> None:
    pair = {"prompt": "x", "chosen": "the same yes and so on", "rejected": "the same no and so on"}
    record = run(local_model, [pair], pair=0).record
    shared = [a for a, _ in record["alignment"]]
    size = len(record["chosen"]["ids"])
    assert set(range(9)) <= set(shared) and set(range(size - 11, size)) <= set(shared)
    for a in range(9):  # before the responses part, the two gradients are one
        assert record["inner"][a][a] == pytest.approx(record["chosen"]["squares"][a], rel=1e-4)


def test_no_pair_is_measured_but_the_one_asked_for(local_model) -> None:
    rows = [{"prompt": "p"}, "no json", {**PAIRS[0], "chosen": ""}, PAIRS[1]]
    assert run(local_model, rows, pair=3).record["data"]["where"].endswith("pairs.jsonl:4")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"pair": 7}, InputError, r"pairs.jsonl: there is no row 7. It has 7 rows, counted from 0; accepted is 0 to 6"),
        ({"pair": -1}, InputError, r"there is no row -1.*--pair"),
        ({"memory_budget": "much"}, MemoryBudgetError, "much"),
        ({"dtype": "int8"}, InputError, "dtype is 'int8'"),
        ({"device": "cuda:99"}, InputError, "--device cpu"),
        ({"split": "test"}, DataFileError, "a file has no splits"),
        ({"max_length": 4096}, InputError, "--max-length 128"),
    ],
)
def test_what_a_user_can_get_wrong(options, kind, message, local_model) -> None:
    with pytest.raises(kind, match=message):
        run(local_model, **options)
    assert not list((local_model.parent / "out").glob("*"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**PAIRS[0], "chosen": []}, "pairs.jsonl:2: chosen is empty"),
        ({"prompt": "p"}, "pairs.jsonl:2: missing 'chosen' and 'rejected'"),
        ('{"prompt":', "pairs.jsonl:2: not valid JSON"),
    ],
)
def test_a_bad_row_is_reported_with_its_reason(row, message, local_model, monkeypatch) -> None:
    monkeypatch.setattr(prepare, "load_model", lambda *_, **__: pytest.fail("the model was read first"))
    with pytest.raises(DataFileError, match=f"{message}(.|\n)*correct this one, or choose another"):
        run(local_model, [PAIRS[0], row])


def test_a_directory_in_the_way(local_model) -> None:
    (local_model.parent / "out" / "tokens.png").mkdir(parents=True)
    with pytest.raises(InputError, match=r"tokens\.png: is a directory"):
        run(local_model)


@pytest.mark.parametrize("which", ["squares", "effects"])
def test_a_nan_names_the_row(which, local_model, monkeypatch) -> None:
    def spoiled(*given: Any, **options: Any) -> torch.Tensor:
        return token_effects(*given, **options) * torch.nan

    if which == "effects":
        monkeypatch.setattr(pair_tokens, "token_effects", spoiled)
    else:
        (gram,) = measure_tokens_of(local_model)
        gram.chosen_sq[0] = torch.inf
        monkeypatch.setattr(pair_tokens, "measure_tokens", lambda *_, **__: [gram])
    with pytest.raises(NonFiniteError, match=r"pairs.jsonl:2: .*nan or inf.*--dtype"):
        run(local_model)
    assert not list((local_model.parent / "out").glob("*"))


def measure_tokens_of(local_model: Path) -> list[Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(local_model)
    return measure_tokens(AutoModelForCausalLM.from_pretrained(local_model), by_hand(tokenizer, PAIRS[1]))


def test_a_device_that_is_full(local_model, monkeypatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(pair_tokens, "measure_tokens", full)
    with pytest.raises(GradentError, match=r"pairs.jsonl:2: the device ran out of memory.*--max-length"):
        run(local_model)


def test_notes_are_kept_and_told(local_model, capsys) -> None:
    assert any("max_length is 128" in note for note in run(local_model, quiet=True).record["notes"])
    told = capsys.readouterr()
    assert told.out == "" and "note:" not in told.err
    run(local_model, quiet=False)
    told = capsys.readouterr()
    assert "note: max_length is 128" in told.err
    assert "The most entangling tokens" in told.out and "identical tokens" in told.out


def test_hostile_text_from_data_to_page(local_model, capsys) -> None:
    evil = "</script><img src=x onerror=alert(1)>\u202e\x00[red]$x$"
    pair = {"prompt": "p" + evil, "chosen": " a" + evil, "rejected": " b" + evil}
    result = run(local_model, [pair], pair=0, quiet=False)
    out = capsys.readouterr().out
    assert not set("\u202e\x00") & set(out)
    assert "<img" not in result.page_path.read_text("utf-8").partition("<script>")[0]
    assert json.loads(result.record_path.read_text("utf-8"))["prompt"]["text"].endswith(evil[-5:])


def exported(path: Path, record: Any, pair: int, **changes: Any) -> Path:
    """Masks of the tokens of a record, as a trainer exports them, and of one more pair."""
    columns: dict[str, list[Any]] = {name: [] for name in MASK_COLUMNS}
    for row in (pair, 90):
        for side in ("chosen", "rejected"):
            ids = record[side]["ids"]
            columns["pair"] += [row] * len(ids)
            columns["side"] += [side] * len(ids)
            columns["position"] += range(len(ids))
            columns["token_id"] += ids
            columns["token"] += record[side]["tokens"]
            columns["score"] += [0.5 - place for place in range(len(ids))]
            columns["mask"] += [0.9 / (place + 1) for place in range(len(ids))]
            columns["kept"] += [place == 0 for place in range(len(ids))]
    write_masks(path, columns | changes)
    return path


def test_masks_of_the_pair_are_in_the_record_and_on_the_page(local_model) -> None:
    plain = run(local_model).record
    assert plain["masks"] is None
    masks = exported(local_model.parent / "masks.parquet", plain, 1)
    result = run(local_model, masks=masks)
    found = result.record["masks"]
    assert found["source"] == "masks.parquet"
    assert found["rejected"]["kept"] == [True] + [False] * (len(plain["rejected"]["ids"]) - 1)
    assert found["chosen"]["mask"][:2] == [0.9, 0.45]
    assert "Which tokens the masked loss keeps" in result.page_path.read_text("utf-8")


def test_masks_of_other_pairs_or_tokens_are_refused(local_model) -> None:
    plain = run(local_model).record
    place = local_model.parent / "masks.parquet"
    exported(place, plain, 3)
    with pytest.raises(InputError, match=r"masks.parquet: holds no masks of row 1 of the data"):
        run(local_model, masks=place)
    exported(place, plain, 1)
    columns = read_masks(place).to_pydict()
    columns["token_id"][2] += 1
    write_masks(place, columns)
    with pytest.raises(InputError, match=r"row 1, chosen, are of other tokens .*differ from token 2 on"):
        run(local_model, masks=place)
    exported(place, plain, 1)
    with pytest.raises(InputError, match=r"row 1, chosen, are of other tokens .*no-add-eos"):
        run(local_model, masks=place, add_eos=False)
    with pytest.raises(DataFileError, match="no such file"):
        run(local_model, masks=local_model.parent / "nothing.parquet")
