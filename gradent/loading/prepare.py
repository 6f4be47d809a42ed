"""Everything an audit needs before the first pair is measured: tokenizer, pairs and model, each checked."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gradent.errors import InputError, ModelError
from gradent.loading.models import check_vocabulary, load_config, load_model, load_tokenizer
from gradent.loading.preference_files import Row, read_rows
from gradent.loading.preferences import AuditPair, PairSet, prepare_pairs
from gradent.loading.source import ModelSource, read_step, resolve_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Material",
    "Prepared",
    "choose_device",
    "describe_model",
    "open_model",
    "prepare",
    "read_material",
]

_DEFAULT_MAX_LENGTH = 1024  # TRL's DPOConfig

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Material:
    """The pairs to measure, as the models see them.

    Attributes:
        tokenizer: the model's.
        pairs: usable pairs and skipped rows.
        rows: rows of the data, usable or not.
        max_length: the limit that was applied.
        add_eos: whether EOS was appended to plain-string responses.
        used: the largest token id, and the row that uses it.
    """

    tokenizer: PreTrainedTokenizerBase
    pairs: PairSet
    rows: int
    max_length: int
    add_eos: bool
    used: tuple[int, str]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A loaded model and the pairs to measure on it.

    Attributes:
        model: the causal LM, with what is to be measured trainable.
        source: where it came from.
        material: the pairs.
        step: the trainer's step at which it was saved; 0 if it does not say.
        device: where the model is.
    """

    model: Any
    source: ModelSource
    material: Material
    step: int
    device: str

    def describe_model(self) -> dict[str, Any]:
        """What a record says of the model: checkpoint, base, adapter, step, parameter counts, dtype and device."""
        return describe_model(self.model, self.source, self.step, self.device)


def describe_model(model: Any, source: ModelSource, step: int, device: str) -> dict[str, Any]:
    """What a record says of a model.

    Args:
        model: the model.
        source: where it came from.
        step: the trainer's step at which it was saved.
        device: where it is.

    Returns:
        checkpoint, base, adapter, step, parameter counts, dtype and device.
    """
    parameters = list(model.parameters())
    return {
        "checkpoint": source.name,
        "base": source.base,
        "adapter": source.adapter,
        "step": step,
        "trainable_parameters": sum(each.numel() for each in parameters if each.requires_grad),
        "parameters": sum(each.numel() for each in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "device": device,
    }


def choose_device(device: str | None, local: int = 0) -> str:
    """Where models go.

    Args:
        device: what the user asked for.
        local: rank on this machine, of several processes.

    Returns:
        That, or the first GPU (of several processes, the rank's own), or the CPU.
    """
    if device is not None:
        return device
    if not torch.cuda.is_available():
        return "cpu"
    return "cuda" if local == 0 else f"cuda:{local}"


def read_material(
    sources: ModelSource | Sequence[ModelSource],
    data: str | os.PathLike[str],
    *,
    tell: Tell,
    split: str,
    max_length: int | None,
    max_pairs: int | None,
    skip_bad_rows: bool,
    add_eos: bool,
    trust_remote_code: bool,
    seed: int,
    only: int | None = None,
) -> Material:
    """Read, check and tokenize the pairs, before a model is loaded for them.

    Args:
        sources: of the model whose tokenizer and number of positions count; of several, the first of which both can be
            read.
        data: as in `audit`, and so are the others but these:
        tell: announces a choice that was made for the user.
        split: as in `audit`.
        max_length: as in `audit`.
        max_pairs: as in `audit`.
        skip_bad_rows: as in `audit`.
        add_eos: as in `audit`.
        trust_remote_code: as in `audit`.
        seed: as in `audit`.
        only: this row alone, counted from 0; None for all.

    Returns:
        The pairs.
    """
    several = [sources] if isinstance(sources, ModelSource) else sources
    source, config, tokenizer = _first_readable(several, trust_remote_code)
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
    return Material(tokenizer=tokenizer, pairs=pairs, rows=len(rows), max_length=limit, add_eos=add_eos, used=used)


def _first_readable(
    sources: Sequence[ModelSource], trust_remote_code: bool
) -> tuple[ModelSource, Any, PreTrainedTokenizerBase]:
    """The first model whose configuration and tokenizer can be read and go together, with both."""
    first: ModelError | None = None
    for source in sources:
        try:
            config = load_config(source.base, trust_remote_code=trust_remote_code).get_text_config()
            tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
            check_vocabulary(tokenizer, config.vocab_size, source.base)
        except ModelError as error:
            first = first or error
        else:
            return source, config, tokenizer
    raise first or InputError("no model to read a tokenizer from.")


def open_model(
    source: ModelSource,
    material: Material,
    *,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    trainable: bool = True,
) -> Any:
    """Load a model that is to see these pairs.

    Args:
        source: of the model.
        material: the pairs.
        dtype: as in `audit`.
        device: a torch device.
        trust_remote_code: as in `audit`.
        trainable: False for a reference.

    Returns:
        The model.

    Raises:
        ModelError: it lacks a row in its embedding for a token of the pairs; and what `load_model` raises.
    """
    model = load_model(source, dtype=dtype, device=device, trust_remote_code=trust_remote_code, trainable=trainable)
    rows = model.config.get_text_config().vocab_size
    check_vocabulary(material.tokenizer, rows, source.base, material.used)
    return model


def prepare(
    model: str,
    data: str | os.PathLike[str],
    *,
    tell: Tell,
    adapter: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    trust_remote_code: bool = False,
    **rows: Any,
) -> Prepared:
    """Load and check everything, the cheap things first: a bad row is reported before a large model is read.

    Args:
        model: as in `audit`, and so are the others but these:
        data: as in `audit`.
        tell: announces a choice that was made for the user.
        adapter: as in `audit`.
        dtype: as in `audit`.
        device: as in `audit`.
        trust_remote_code: as in `audit`.
        **rows: the rest of what `read_material` takes.

    Returns:
        The model and its pairs.
    """
    source = resolve_source(model, adapter)
    material = read_material(source, data, tell=tell, trust_remote_code=trust_remote_code, **rows)
    place = choose_device(device)
    policy = open_model(source, material, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
    return Prepared(model=policy, source=source, material=material, step=read_step(source), device=place)


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
        tell(
            f"{len(pairs.pairs)} of {rows} rows are measured, one of each of so many slices of like length, drawn with "
            f"seed {seed} (--max-pairs all for all)."
        )
    if pairs.skipped:
        tell(f"{len(pairs.skipped)} rows were skipped:\n" + "\n".join(f"  {bad.reason}" for bad in pairs.skipped))
    cut = sum(pair.truncated for pair in pairs.pairs)
    if cut:
        tell(f"{cut} of {2 * len(pairs.pairs)} responses were cut at max_length {limit}, as TRL cuts them.")
