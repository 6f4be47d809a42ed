"""Everything an audit needs before the first pair is measured: tokenizer, pairs and model, each checked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import trl
from transformers import PreTrainedTokenizerBase

from gradent.errors import InputError, ModelError
from gradent.loading.adapters import embedding_rows
from gradent.loading.config import LoadConfig
from gradent.loading.models import check_vocabulary, load_config, load_model, load_tokenizer
from gradent.loading.preference_files import read_rows
from gradent.loading.preferences import PairSet, count_repeated, describe_prompts, prepare_pairs
from gradent.loading.rollouts import RolloutGroup, holds_rollouts, prepare_rollouts
from gradent.loading.source import ModelSource, read_step, resolve_source
from gradent.loading.training_args import Trained, read_trained
from gradent.pairs.preparation import (
    KEEP_START,
    Preparation,
    check_truncation_mode,
    read_release,
    release_defaults,
)

__all__ = [
    "Material", "Prepared", "Rules", "choose_device", "describe_model", "open_model", "prepare", "read_material",
    "read_rules", "tell_about_pairs",
]  # fmt: skip

_DEFAULT_MAX_LENGTH = 1024  # TRL's DPOConfig
_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
_LISTED = 5  # rows that a note names

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How rows become tokens."""

    source: ModelSource  # the model whose tokenizer it is
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int  # rows of the model's embedding
    how: Preparation  # the rules, EOS aside
    add_eos: bool  # whether EOS is appended to plain-string responses
    date_note: str  # what to say of the date that the chat template prints; empty where it prints none

    @property
    def max_length(self) -> int:
        """The limit that is applied."""
        return self.how.max_length or _DEFAULT_MAX_LENGTH

    @property
    def whole(self) -> Preparation:
        """The rules, EOS among them."""
        return replace(self.how, add_eos=self.add_eos)


@dataclass(frozen=True, kw_only=True)
class Material:
    """The pairs to measure, as the models see them."""

    tokenizer: PreTrainedTokenizerBase  # the model's
    pairs: PairSet  # usable pairs and skipped rows
    rows: int  # rows of the data, usable or not
    max_length: int  # the limit that was applied
    add_eos: bool  # whether EOS was appended to plain-string responses
    used: tuple[int, str]  # the largest token id, and the row that uses it
    how: Preparation  # the rules by which the pairs became tokens
    repeated: int = 0  # pairs whose chosen begins with the prompt once more
    group: RolloutGroup | None = None  # the one row that was asked for, where it holds rollouts and no pair

    @property
    def applied(self) -> dict[str, Any]:
        """The options of reading rows as they were applied, for a record's `settings`."""
        return {
            "max_length": self.max_length, "add_eos": self.add_eos, "truncation_mode": self.how.truncation_mode,
            "max_prompt_length": self.how.max_prompt_length, "max_completion_length": self.how.max_completion_length,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A loaded model and the pairs to measure on it."""

    model: Any  # the causal LM, with what is to be measured trainable
    source: ModelSource  # where it came from
    material: Material  # the pairs
    step: int  # the trainer's step at which it was saved; 0 if it does not say
    device: str  # where the model is


def describe_model(model: Any, source: ModelSource, step: int, device: str) -> dict[str, Any]:
    """What a record says of a model, of the step at which it was saved and of its place."""
    parameters = list(model.parameters())
    return {
        "checkpoint": source.name, "base": source.base, "adapter": source.adapter, "step": step,
        "trainable_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."), "device": device,
    }  # fmt: skip


def choose_device(device: str | None, local: int = 0) -> str:
    """The device that the user asked for, else this rank's GPU, else the CPU."""
    if device is not None:
        return device
    if not torch.cuda.is_available():
        return "cpu"
    return "cuda" if local == 0 else f"cuda:{local}"


def read_material(
    sources: Sequence[ModelSource], config: LoadConfig, tell: Tell, *, only: int | None = None
) -> Material:
    """Read, check and tokenize the pairs (`only` one row, counted from 0) for the first model that can be read."""
    rules = read_rules(sources, config, tell)
    tokenizer, how, limit, add_eos = rules.tokenizer, rules.how, rules.max_length, rules.add_eos
    rows = read_rows(config.data, config.split)
    if only is not None and not 0 <= only < len(rows):
        raise InputError(
            f"{config.data}: there is no row {only}. It has {len(rows)} rows, counted from 0; accepted is 0 "
            f"to {len(rows) - 1} (command line: --pair)."
        )
    if only is not None and holds_rollouts(rows[only]):
        group = prepare_rollouts(rows[only], tokenizer, replace(how, add_eos=add_eos))
        used = group.largest_id, group.where
        check_vocabulary(tokenizer, rules.vocabulary, rules.source.base, used)
        _tell_about_rollouts(group, how, tell)
        return Material(
            tokenizer=tokenizer, pairs=PairSet(pairs=[]), rows=len(rows), max_length=limit, add_eos=add_eos, used=used,
            how=how, group=group,
        )  # fmt: skip
    chosen_rows = rows if only is None else [rows[only]]
    pairs = prepare_pairs(
        chosen_rows, tokenizer, rules.whole, skip_bad_rows=config.skip_bad_rows,
        max_pairs=config.max_pairs, seed=config.seed,
    )  # fmt: skip
    largest = [(max(max(ids) for ids in pair.ids), pair.where) for pair in pairs.pairs]
    used = max(largest, key=lambda item: item[0])
    check_vocabulary(tokenizer, rules.vocabulary, rules.source.base, used)
    tell_about_pairs(pairs, len(chosen_rows), how, config.seed, tell)
    for note in describe_prompts(chosen_rows, pairs.pairs):
        tell(note)
    if rules.date_note and any(isinstance(row.values["chosen"], list) for row in chosen_rows if _is_pair(row.values)):
        tell(rules.date_note)
    return Material(
        tokenizer=tokenizer, pairs=pairs, rows=len(rows), max_length=limit, add_eos=add_eos, used=used, how=how,
        repeated=count_repeated(chosen_rows, pairs.pairs),
    )  # fmt: skip


def read_rules(sources: Sequence[ModelSource], config: LoadConfig, tell: Tell) -> Rules:
    """How rows become tokens for the first model that can be read; no row is read for it."""
    source, model_config, tokenizer = _first_readable(sources, config.trust_remote_code)
    positions = getattr(model_config, "max_position_embeddings", None)
    trained = read_trained(each.adapter or each.base for each in sources)
    how, date_note = _choose_preparation(config, positions, trained, source, tell), ""
    if isinstance(tokenizer.chat_template, str) and _NOW.search(tokenizer.chat_template):
        fixed, date_note = _fix_date(tokenizer.chat_template, source, trained)
        how = replace(how, template={"chat_template": fixed})
    add_eos = config.add_eos and tokenizer.eos_token is not None
    if config.add_eos and not add_eos:
        tell("The tokenizer has no EOS token, so none is appended to the responses.")
    return Rules(
        source=source, tokenizer=tokenizer, vocabulary=model_config.vocab_size, how=how, add_eos=add_eos,
        date_note=date_note,
    )  # fmt: skip


def _first_readable(
    sources: Sequence[ModelSource], trust_remote_code: bool
) -> tuple[ModelSource, Any, PreTrainedTokenizerBase]:
    """The first model whose configuration and tokenizer can be read and go together, with both."""
    first: ModelError | None = None
    for source in sources:
        try:
            config = load_config(source.base, trust_remote_code=trust_remote_code).get_text_config()
            config.vocab_size = embedding_rows(source.adapter) or config.vocab_size  # tokens may have been added
            tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
            check_vocabulary(tokenizer, config.vocab_size, source.base)
        except ModelError as error:
            first = first or error
        else:
            return source, config, tokenizer
    raise first or InputError("no model to read a tokenizer from.")


def open_model(
    source: ModelSource, material: Material, config: LoadConfig, device: str, *, trainable: bool = True
) -> Any:
    """Load a model that is to see these pairs; refuse one whose embedding lacks a row for one of their tokens."""
    model = load_model(
        source, dtype=config.dtype, device=device, trust_remote_code=config.trust_remote_code, trainable=trainable
    )
    rows = model.config.get_text_config().vocab_size
    check_vocabulary(material.tokenizer, rows, source.base, material.used)
    return model


def prepare(config: LoadConfig, tell: Tell, *, only: int | None = None) -> Prepared:
    """Load and check everything, the cheap things first: a bad row is reported before a large model is read."""
    source = resolve_source(config.model, config.adapter, quantize=config.quantize)
    material = read_material([source], config, tell, only=only)
    device = choose_device(config.device)
    model = open_model(source, material, config, device)
    return Prepared(model=model, source=source, material=material, step=read_step(source), device=device)


def _is_pair(values: Any) -> bool:
    return isinstance(values, Mapping) and "chosen" in values


def _fix_date(template: str, source: ModelSource, trained: Trained) -> tuple[str, str]:
    """A chat template with the date that it prints written out, and what to say of it."""
    saved = Path(source.base, "config.json")
    day, event = trained.day, "when the run saved its first state"
    if day is None and saved.is_file():
        day, event = datetime.fromtimestamp(saved.stat().st_mtime), "when the model was saved"
    if day is None:
        return template, "The chat template prints today's date, so on another day the same pairs are other tokens."
    moment = day
    fixed = _NOW.sub(lambda found: json.dumps(moment.strftime(found[2]), ensure_ascii=False), template)
    return fixed, f"The chat template prints the date: it is {day:%Y-%m-%d %H:%M} here, {event}, not today's."


def _choose_preparation(
    config: LoadConfig, positions: int | None, trained: Trained, source: ModelSource, tell: Tell
) -> Preparation:
    """The rules of the TRL that trained the model, where its files say so, else of the one that is installed."""
    defaults = {**release_defaults(trained.release), **trained.limits}
    mode = defaults["truncation_mode"] if config.truncation_mode is None else config.truncation_mode
    parts = {}
    for name in ("max_prompt_length", "max_completion_length"):
        asked = getattr(config, name)
        parts[name] = most = defaults[name] if asked is None else asked
        if most is not None and most < 1:
            option = name.replace("_", "-")
            raise InputError(f"{name} is {most}; it must be at least 1 (command line: --{option}).")
    limit = _choose_max_length(positions, config.max_length, defaults["max_length"], source.base, tell)
    how = Preparation.of_release(
        trained.release or trl.__version__, max_length=limit, truncation_mode=check_truncation_mode(mode),
        **parts,
    )  # fmt: skip
    how = how if how.seam == "apart" else replace(how, max_prompt_length=None, max_completion_length=None)
    if how.max_completion_length is not None and config.max_completion_length is None:
        tell(
            f"Responses are cut at {how.max_completion_length} tokens: max_completion_length, as the run's "
            "training_args.bin says (--max-completion-length for another)."
        )
    if trained.release is not None and read_release(trained.release)[:2] != read_release(trl.__version__)[:2]:
        tell(f"The pairs are tokenized as TRL {trained.release} did it, which the run's model card names.")
    if config.truncation_mode is None and trained.limits.get("truncation_mode", KEEP_START) != KEEP_START:
        tell(f"truncation_mode is {mode}, as the run's training_args.bin says (--truncation-mode for another).")
    return how


def _choose_max_length(positions: int | None, asked: int | None, trained: int | None, source: str, tell: Tell) -> int:
    if asked is not None and asked < 2:
        raise InputError(f"max_length is {asked}; it must leave room for a prompt and a response, so 2 at least.")
    if asked is None:
        wanted = trained or _DEFAULT_MAX_LENGTH
        if positions is None or positions >= wanted:
            if wanted != _DEFAULT_MAX_LENGTH:
                tell(f"max_length is {wanted}, as the run's training_args.bin says (--max-length for another).")
            return wanted
        tell(f"max_length is {positions}: {source} has no more positions (the default is {wanted}).")
        return positions
    if positions is not None and asked > positions:
        raise InputError(
            f"max_length is {asked}, and {source} has {positions} positions. Pass --max-length {positions} or less."
        )
    return asked


def tell_about_pairs(pairs: PairSet, rows: int, how: Preparation, seed: int, tell: Tell) -> None:
    """Note which rows are measured, which are left out and why, and how many were cut."""
    if len(pairs.pairs) + len(pairs.skipped) < rows:
        tell(
            f"{len(pairs.pairs)} of {rows} rows are measured, one of each of so many slices of like length, drawn with "
            f"seed {seed} (--max-pairs all for all)."
        )
    causes: dict[str, list[str]] = {}
    for left in pairs.skipped:
        causes.setdefault(left.cause or "", []).append(left.where if left.cause else left.reason)
    for cause, places in causes.items():
        if cause:
            more = f" and {len(places) - _LISTED} more" if len(places) > _LISTED else ""
            tell(f"{len(places)} rows are left out: {cause}: {', '.join(places[:_LISTED])}{more}.")
        else:
            tell(f"{len(places)} rows were skipped:\n" + "\n".join(f"  {reason}" for reason in places))
    cut = sum(pair.truncated for pair in pairs.pairs)
    if cut:
        tell(
            f"{cut} of {2 * len(pairs.pairs)} rows lost their {_cut_end(how)} to max_length {how.max_length}, as in "
            f"TRL with truncation_mode={how.truncation_mode!r}."
        )


def _tell_about_rollouts(group: RolloutGroup, how: Preparation, tell: Tell) -> None:
    if group.weights_from == "rewards":
        tell("A completion's weight is its advantage: its reward less the mean of the group's rewards.")
    if group.weights_from != "weights":
        tell(
            "Advantages are not divided by the loss's normaliser: signs are those of a step, sizes per unit of it. A "
            "loss that divides by each response's length weighs the responses differently: give weights for that."
        )
    if group.truncated:
        tell(
            f"{group.truncated} of {len(group.rows)} rows lost their {_cut_end(how)} to max_length {how.max_length} "
            f"(truncation_mode {how.truncation_mode!r})."
        )


def _cut_end(how: Preparation) -> str:
    return "end" if how.truncation_mode == KEEP_START else "beginning"
