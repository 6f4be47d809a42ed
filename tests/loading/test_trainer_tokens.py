"""Token ids of the audit against those that the installed TRL's DPOTrainer prepares and feeds its model, id by id.

`make test-oldest` runs this file with TRL 0.24, `make test-release TRL=0.29.1` with any other release.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import datasets
import pytest
import tokenizers
import torch
import transformers
import trl
from transformers import PreTrainedTokenizerFast

from gradent.errors import DataFileError
from gradent.loading.preference_files import Row
from gradent.loading.preferences import AuditPair, prepare_pairs
from gradent.pairs.preparation import Preparation, read_release, release_defaults
from gradent.trainer.callback.probe import Probe
from tests.auditing.made import FORMATS, PAIRS, said

RELEASE = read_release(trl.__version__)
OLD = RELEASE < (0, 29)  # prompt and responses are tokenized apart
MIDDLE = (0, 29) <= RELEASE < (1, 15)  # a response begins at the length of the prompt
KEEPS_FULL = RELEASE < (1, 9)  # a prompt that fills max_length stays, and teaches nothing
TEXT = "the film was a quiet joy and the soup was warm and worth the wait, so good, bad, bad and never again"
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]}
TURN = said("two and two?", "user")
TOOL = {"type": "function", "function": {"name": "f", "description": "adds", "parameters": {}}}

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | length }}{{ tools[0].function.name }}</tools>{% endif %}"
    "{% for message in messages %}{{ message.role }}: "
    "{% if message.content is string %}{% set text = message.content %}{% else %}{% set text = '' %}"
    "{% for part in message.content or [] %}{% set text = text + (part.text or '') %}{{ part.text }}"
    "{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' and '</think>' in text %}{{ text.split('</think>')[-1] | trim }}"
    "{% else %}{{ text }}{% endif %}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% if thinking %}<think>{% endif %}{% endif %}"
)


def merging() -> PreTrainedTokenizerFast:
    """A tokenizer with merges, so that tokens can reach over the seam of prompt and response."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEXT, "ab abc bca assistant: user:"] * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    made.chat_template = "{{ bos_token }}" + TEMPLATE
    return made


def surrounded(single: str) -> PreTrainedTokenizerFast:
    """The same with special tokens of its own around a text."""
    made = merging()
    numbers = [(name, made.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>")]
    made.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=numbers
    )
    return made


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "no special tokens": merging,
    "BOS": lambda: surrounded("<bos> $A"),
    "BOS and EOS": lambda: surrounded("<bos> $A <eos>"),
}

ROWS: dict[str, list[dict[str, Any]]] = {
    **FORMATS,
    "trailing spaces": [
        {"prompt": "the film was ", "chosen": "a quiet joy", "rejected": "bad "},
        {"prompt": "the soup was", "chosen": "warm", "rejected": " warm"},
    ],
    "prompt repeated": [{"prompt": "the film", "chosen": "the film was good", "rejected": "the film"}],
    "empty response": [{"prompt": "the film was", "chosen": "", "rejected": " bad"}],
    "system prompt": [{"prompt": [*said("Be brief.", "system"), *TURN], "chosen": said("4"), "rejected": said("5")}],
    "several turns before": [
        {
            "prompt": [*TURN, *said("<think>hm</think>4"), *said("sure?", "user")],
            "chosen": said("yes"),
            "rejected": said("no"),
        }
    ],
    "reasoning that is dropped": [
        {"prompt": TURN, "chosen": said("<think>Two and two.</think> 4"), "rejected": said("<think>Guess.</think> 5")}
    ],
    "content in parts": [
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "two?"}]}],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "4"}]}],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "5"}]}],
        }
    ],
    "calls, content null": [{"prompt": TURN, "chosen": [{**CALL, "content": None}], "rejected": said("5")}],
    "messages that share turns": [
        {
            "chosen": [*TURN, *said("4"), *said("sure?", "user"), *said("yes")],
            "rejected": [*TURN, *said("4"), *said("sure?", "user"), *said("no")],
        }
    ],
    "template arguments": [
        {"prompt": TURN, "chosen": said("4"), "rejected": said("5"), "chat_template_kwargs": {"thinking": True}}
    ],
}
if not OLD:  # TRL 0.24 takes a message without content for no message, and tools from its arguments alone
    ROWS["calls, no content"] = [{"prompt": TURN, "chosen": [CALL], "rejected": said("5")}]
    ROWS["tools"] = [{"prompt": TURN, "chosen": [{**CALL, "content": ""}], "rejected": said("5"), "tools": [TOOL]}]


def ours(rows: list[Any], tokenizer: Any, **options: Any) -> list[AuditPair]:
    numbered = [Row(index=index, where=f"pairs.jsonl:{index + 1}", values=each) for index, each in enumerate(rows)]
    how = Preparation.of_release(trl.__version__, **{**release_defaults(trl.__version__), **options})
    return prepare_pairs(numbered, tokenizer, how).pairs


def make_trainer(path: Any, model: Any, rows: list[Any], tokenizer: Any, **options: Any) -> trl.DPOTrainer:
    settings = {"report_to": "none", "bf16": False, "use_cpu": True, "gradient_checkpointing": False}
    return trl.DPOTrainer(
        model,
        ref_model=copy.deepcopy(model),
        args=trl.DPOConfig(str(path), disable_tqdm=True, remove_unused_columns=False, **settings, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )


def prepared(trainer: trl.DPOTrainer) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected of each row of the trainer's dataset."""
    names = ("prompt", "chosen", "rejected")
    ending = "input_ids" if OLD else "ids"
    return [tuple(row[f"{name}_{ending}"] for name in names) for row in trainer.train_dataset]


def fed(trainer: trl.DPOTrainer, model: Any) -> list[list[int]]:
    """The rows that reach the model, all chosen, then all rejected, without padding."""
    seen: list[tuple[Any, Any]] = []

    def look(_: Any, given: Any, named: Any) -> None:
        seen.append((named["input_ids"] if "input_ids" in named else given[0], named["attention_mask"]))

    handle = model.register_forward_pre_hook(look, with_kwargs=True)
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.compute_loss(trainer.model, batch)
    handle.remove()
    ids, mask = seen[-1] if len(seen) == 1 else seen[0]
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


@pytest.fixture
def model() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=330, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_token_ids_are_those_of_the_prepared_dataset(kind, name, tmp_path, model) -> None:
    tokenizer, rows = TOKENIZERS[kind](), ROWS[name]
    trained = prepared(make_trainer(tmp_path, model, rows, tokenizer))
    # A cut at the prompt's length leaves nothing of a response that is shorter, or what both responses end in.
    kept = [number for number, parts in enumerate(trained) if all(parts) and parts[1] != parts[2]]
    assert len(kept) == len(rows) or MIDDLE
    if not kept:
        with pytest.raises(DataFileError, match=r"is empty after tokenization \(no longer than the prompt, generation"):
            ours(rows, tokenizer)
        return
    found = ours(rows, tokenizer)
    assert [pair.row for pair in found] == kept
    assert [(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in found] == [trained[row] for row in kept]


LONG = [
    {"prompt": TEXT, "chosen": " good", "rejected": " bad, bad and never again"},
    {"prompt": "so", "chosen": " " + TEXT, "rejected": " bad"},
    PAIRS[0],
]


@pytest.mark.parametrize("limit", [6, 12, 24])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_rows_are_cut_as_the_trainer_cuts_them(mode, limit, tmp_path, model) -> None:
    tokenizer = TOKENIZERS["BOS"]()
    options: dict[str, Any] = {"max_length": limit, "truncation_mode": mode}
    if OLD:
        options["max_prompt_length"] = 9
    found = ours(LONG, tokenizer, **options)
    kept = [LONG[pair.row] for pair in found]  # of the others the trainer sees a prompt alone, or nothing
    assert sum(pair.truncated for pair in found)
    rows = fed(make_trainer(tmp_path, model, kept, tokenizer, **options), model)
    mine = [[*pair.rows[side][0], *pair.rows[side][1]] for side in (0, 1) for pair in found]
    assert rows == mine
    assert (len(kept) == len(LONG)) == (mode == "keep_end" or (OLD and limit > 9))


@pytest.mark.skipif(not OLD, reason="TRL has max_completion_length up to 0.28")
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_responses_are_cut_before_the_row_is(mode, tmp_path, model) -> None:
    tokenizer = TOKENIZERS["BOS"]()
    options: dict[str, Any] = {"max_length": 12, "truncation_mode": mode, "max_prompt_length": 9}
    options["max_completion_length"] = 4
    found = ours(LONG, tokenizer, **options)
    assert len(found) == len(LONG) and max(len(pair.chosen_ids) for pair in found) == 4
    rows = fed(make_trainer(tmp_path, model, LONG, tokenizer, **options), model)
    assert rows == [[*pair.rows[side][0], *pair.rows[side][1]] for side in (0, 1) for pair in found]


@pytest.mark.skipif(RELEASE < (1,), reason="TRL up to 0.29 cuts in its loss, and has no completion mask before")
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_what_counts_after_a_cut_is_what_the_loss_counts(mode, tmp_path, model) -> None:
    tokenizer = TOKENIZERS["BOS"]()
    found = ours(LONG, tokenizer, max_length=12, truncation_mode=mode)
    rows = [LONG[pair.row] for pair in found] if KEEPS_FULL else LONG
    trainer = make_trainer(tmp_path, model, rows, tokenizer, max_length=12, truncation_mode=mode)
    batch = trainer.data_collator(list(trainer.train_dataset))
    counted = (batch["completion_mask"][:, 1:] * batch["attention_mask"][:, 1:]).sum(1)  # nothing predicts the first
    assert counted.tolist() == [len(pair.rows[side][1]) for side in (0, 1) for pair in found]
    assert torch.equal(
        batch["attention_mask"].sum(1),
        torch.tensor([sum(map(len, pair.rows[side])) for side in (0, 1) for pair in found]),
    )


@pytest.mark.parametrize(
    ("release", "seam", "chat_eos"),
    [
        ("0.24.0", "apart", True), ("0.27.1", "apart", True), ("0.27.2", "apart", False), ("0.28.0", "apart", False),
        ("0.29.0", "prompt", False), ("1.14.0", "prompt", False), ("1.15.0", "common", False), (None, "common", False),
    ],
)  # fmt: skip
def test_every_release_has_its_rules(release, seam, chat_eos) -> None:
    how = Preparation.of_release(release)
    assert (how.seam, how.has_chat_eos) == (seam, chat_eos)


@pytest.mark.parametrize(
    ("release", "prompt", "chosen"),
    [
        ("0.24.0", "the film was ", "a joy<eos>"), ("1.9.0", "<bos>the film was ", None),
        ("1.16.0", "<bos>the film was", None),
    ],
)  # fmt: skip
def test_a_seam_under_older_rules(release, prompt, chosen) -> None:
    row = Row(index=0, where="here", values={"prompt": "the film was ", "chosen": "a joy", "rejected": "bad"})
    tokenizer = TOKENIZERS["BOS"]()
    (pair,) = prepare_pairs([row], tokenizer, Preparation.of_release(release)).pairs
    assert tokenizer.decode(pair.prompt_ids).strip() == prompt.strip()
    assert chosen is None or tokenizer.decode(pair.chosen_ids) == chosen


class Processor:
    """What a vision-language trainer has in place of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_probe_rows_are_cut_as_the_trainer_cuts_them(mode, tmp_path, model, caplog) -> None:
    tokenizer = TOKENIZERS["BOS"]()
    options: dict[str, Any] = {"max_length": 12, "truncation_mode": mode}
    kept = ours(LONG, tokenizer, **options)
    left, rows = len(kept), [LONG[pair.row] for pair in kept] if KEEPS_FULL else LONG
    trainer = make_trainer(tmp_path, model, rows, tokenizer, **options)
    alike = {"prompt": "so", "chosen": " bad", "rejected": " bad"}
    probe = Probe([*LONG, alike], every=1)
    probe.prepare(Processor(tokenizer), trainer.args)
    assert f"{len(LONG) + 1 - left} of {len(LONG) + 1} pairs of probe_data are left out" in caplog.text
    batch = probe.batch
    assert len(batch) == left
    mine = [row[keep.bool()].tolist() for row, keep in zip(batch.input_ids, batch.attention_mask, strict=True)]
    assert mine == fed(trainer, model)


def test_a_processor_s_tokenizer_serves_the_probe(tmp_path, model) -> None:
    tokenizer, batches = TOKENIZERS["BOS"](), []
    args = trl.DPOConfig(str(tmp_path), report_to="none", bf16=False, use_cpu=True)
    for rows in (FORMATS["strings"], FORMATS["messages"]):
        for given in (tokenizer, Processor(tokenizer)):
            probe = Probe(rows, every=1)
            probe.prepare(given, args)
            batches.append(probe.batch.input_ids)
    assert torch.equal(batches[0], batches[1]) and torch.equal(batches[2], batches[3])
