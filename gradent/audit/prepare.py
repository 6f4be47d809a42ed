"""Everything an audit needs before the first pair is measured: tokenizer, pairs, model, reference, each checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gradent.audit.data import AuditPair, PairSet, prepare_pairs
from gradent.audit.load import check_vocabulary, load_config, load_model, load_tokenizer
from gradent.audit.rows import Row, read_rows
from gradent.audit.scan import Reference, adapter_off, itself, other_model
from gradent.audit.source import ModelSource, read_step, resolve_source
from gradent.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prepared", "prepare"]

_DEFAULT_MAX_LENGTH = 1024  # TRL's DPOConfig

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A loaded model and the pairs to measure on it.

    Attributes:
        model: the causal LM, with what is to be measured trainable.
        source: where it came from.
        tokenizer: the model's.
        step: the trainer's step at which it was saved; 0 if it does not say.
        pairs: usable pairs and skipped rows.
        rows: rows of the data, usable or not.
        reference: where the reference's log-probs come from; None to go without.
        reference_kind: "none", "self", "adapter_off" or "model".
        max_length: the limit that was applied.
        add_eos: whether EOS was appended to plain-string responses.
        device: where the model is.
    """

    model: Any
    source: ModelSource
    tokenizer: PreTrainedTokenizerBase
    step: int
    pairs: PairSet
    rows: int
    reference: Reference | None
    reference_kind: str
    max_length: int
    add_eos: bool
    device: str

    def describe_model(self) -> dict[str, Any]:
        """What a record says of the model: checkpoint, base, adapter, step, parameter counts, dtype and device."""
        parameters = list(self.model.parameters())
        return {
            "checkpoint": self.source.name,
            "base": self.source.base,
            "adapter": self.source.adapter,
            "step": self.step,
            "trainable_parameters": sum(each.numel() for each in parameters if each.requires_grad),
            "parameters": sum(each.numel() for each in parameters),
            "dtype": str(parameters[0].dtype).removeprefix("torch."),
            "device": self.device,
        }


def prepare(
    model: str,
    data: str | os.PathLike[str],
    *,
    tell: Tell,
    needs_reference: bool,
    adapter: str | None,
    reference: str | None,
    split: str,
    max_length: int | None,
    max_pairs: int | None,
    dtype: str,
    device: str | None,
    skip_bad_rows: bool,
    add_eos: bool,
    trust_remote_code: bool,
    seed: int,
    only: int | None = None,
) -> Prepared:
    """Load and check everything, the cheap things first: a bad row is reported before a large model is read.

    Args:
        model: as in `audit`, and so are the others but these:
        data: as in `audit`.
        tell: announces a choice that was made for the user.
        needs_reference: whether the loss needs a reference.
        adapter: as in `audit`.
        reference: as in `audit`.
        split: as in `audit`.
        max_length: as in `audit`.
        max_pairs: as in `audit`.
        dtype: as in `audit`.
        device: as in `audit`.
        skip_bad_rows: as in `audit`.
        add_eos: as in `audit`.
        trust_remote_code: as in `audit`.
        seed: as in `audit`.
        only: prepare this row alone, counted from 0; None for all.

    Returns:
        What `scan_pairs` needs.
    """
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"dtype": dtype, "device": place, "trust_remote_code": trust_remote_code}
    source = resolve_source(model, adapter)
    reference_source = None if reference is None else resolve_source(reference)
    config = load_config(source.base, trust_remote_code=trust_remote_code).get_text_config()
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    check_vocabulary(tokenizer, config.vocab_size, source.base)
    limit = _choose_max_length(getattr(config, "max_position_embeddings", None), max_length, source.base, tell)
    add_eos = add_eos and _has_eos(tokenizer, tell)
    rows = read_rows(data, split)
    asked = rows if only is None else [_pick_row(rows, only, data)]
    pairs = prepare_pairs(
        asked, tokenizer, max_length=limit, add_eos=add_eos, skip_bad_rows=skip_bad_rows, max_pairs=max_pairs, seed=seed
    )
    used = _largest_id(pairs.pairs)
    check_vocabulary(tokenizer, config.vocab_size, source.base, used)
    _tell_about_pairs(pairs, len(asked), limit, seed, tell)
    policy = load_model(source, **options)
    refer: Reference | None = None
    kind = "none"
    if reference_source is not None:
        other = load_model(reference_source, trainable=False, **options)
        check_vocabulary(tokenizer, other.config.get_text_config().vocab_size, reference_source.base, used)
        kind, refer = "model", other_model(other)
    elif needs_reference:
        kind, refer = _choose_reference(policy, source, tell)
    return Prepared(
        model=policy,
        source=source,
        tokenizer=tokenizer,
        step=read_step(source),
        pairs=pairs,
        rows=len(rows),
        reference=refer,
        reference_kind=kind,
        max_length=limit,
        add_eos=add_eos,
        device=place,
    )


def _pick_row(rows: Sequence[Row], number: int, data: str | os.PathLike[str]) -> Row:
    if not 0 <= number < len(rows):
        raise InputError(
            f"{os.fspath(data)}: there is no row {number}. It has {len(rows)} rows, counted from 0; accepted is 0 "
            f"to {len(rows) - 1} (command line: --pair)."
        )
    return rows[number]


def _choose_max_length(positions: int | None, asked: int | None, source: str, tell: Tell) -> int:
    if asked is not None and asked < 2:
        raise InputError(f"max_length is {asked}; it must leave room for a prompt and a response, so 2 at least.")
    if asked is None:
        if positions is None or positions >= _DEFAULT_MAX_LENGTH:
            return _DEFAULT_MAX_LENGTH
        tell(f"max_length is {positions}: {source} has no more positions (the default is {_DEFAULT_MAX_LENGTH}).")
        return positions
    if positions is not None and asked > positions:
        raise InputError(
            f"max_length is {asked}, and {source} has {positions} positions. Pass --max-length {positions} or less."
        )
    return asked


def _has_eos(tokenizer: PreTrainedTokenizerBase, tell: Tell) -> bool:
    if tokenizer.eos_token is not None:
        return True
    tell("The tokenizer has no EOS token, so none is appended to the responses.")
    return False


def _largest_id(pairs: Sequence[AuditPair]) -> tuple[int, str]:
    each = ((max(*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids), pair.where) for pair in pairs)
    return max(each, key=lambda one: one[0])


def _tell_about_pairs(pairs: PairSet, rows: int, limit: int, seed: int, tell: Tell) -> None:
    if len(pairs.pairs) + len(pairs.skipped) < rows:
        tell(f"{len(pairs.pairs)} of {rows} rows are measured, drawn at random with seed {seed}.")
    if pairs.skipped:
        tell(f"{len(pairs.skipped)} rows were skipped:\n" + "\n".join(f"  {bad.reason}" for bad in pairs.skipped))
    cut = sum(pair.truncated for pair in pairs.pairs)
    if cut:
        tell(f"{cut} of {2 * len(pairs.pairs)} responses were cut at max_length {limit}, as TRL cuts them.")


def _choose_reference(policy: Any, source: ModelSource, tell: Tell) -> tuple[str, Reference]:
    if source.adapter is not None:
        tell(f"The reference is the base {source.base} without the adapter, as in TRL (--reference for another).")
        bias = getattr(policy.active_peft_config, "bias", "none")
        if bias != "none":
            tell(
                f"The adapter trains biases of the base (bias={bias!r}), and they stay as trained where it is switched "
                f"off, in TRL as well. For the base as it was, pass --reference {source.base}."
            )
        return "adapter_off", adapter_off(policy)
    tell(
        "The model is its own reference, as at the first step of training: the loss sees log-ratios of 0. If it has "
        "been trained on preferences already, pass the model it started from with --reference."
    )
    return "self", itself
