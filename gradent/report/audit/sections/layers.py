"""The section on where in the model the cosine comes from: modules gathered by layer and by kind.

`model.layers.3.mlp.up_proj.lora_A.default` belongs to layer `model.layers.3` and is of the kind `mlp.up_proj`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from gradent.figures.charts import HeatMap, fill_gap
from gradent.model.layer_names import layer_of, unwrapped
from gradent.record.table import Floats
from gradent.report.audit.sections.records import AuditRecords, Row
from gradent.report.page.html import Section
from gradent.report.page.numbers import fixed, percent
from gradent.report.page.parts import Table

__all__ = ["bare_name", "kind_of", "layer_section"]

_ADAPTER = re.compile(r"\.(?:lora_\w+|base_layer|modules_to_save)(?:\..*)?$")
_MOST_COLUMNS = 60
_KINDS = 15
_MODULES = 40
_LONGEST = 32  # characters of a layer's name in the heat map; its end tells more than its beginning
_SLACK = 1e-9

Key = TypeVar("Key", bound=Hashable)


def kind_of(module: str) -> str:
    """What a module is in every layer."""
    parts = bare_name(module).split(".")
    numbered = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    if numbered is None:
        return ".".join(parts)
    return ".".join(part for part in parts[numbered + 1 :] if not part.isdecimal()) or "the layer itself"


def layer_section(records: AuditRecords) -> Section:
    """Layers and kinds of modules, by their parts of the cosine."""
    title = "Layers"
    serves = "Tells you where to look for the entanglement, and which layers an adapter might leave out."
    modules = _list_parts(records)
    if not modules:
        text = "Modules were not measured: leave --no-by-module out of `gradent audit` to see layers here."
        return Section(title, text, [], serves)
    checkpoints = sorted({(part.place, part.label) for part in modules})
    if len(checkpoints) > _MOST_COLUMNS:  # so many evenly over the run, its last one among them
        step = (len(checkpoints) - 1) / (_MOST_COLUMNS - 1)
        checkpoints = [checkpoints[round(number * step)] for number in range(_MOST_COLUMNS)]
    last = [part for part in modules if part.place == checkpoints[-1][0]]
    parts: list[HeatMap | Table] = []
    layers = list(dict.fromkeys(layer_of(bare_name(part.module)) for part in last))
    if len(layers) > 1:
        parts.append(_heat_map(modules, checkpoints, layers))
    kinds = _add_up((kind_of(part.module), part.figures) for part in last)
    at = " at the last checkpoint" if records.summary["run"] is not None else ""
    parts.append(_table(kinds, "Kind of module", f"Kinds of modules, over all layers{at}", _KINDS))
    names = {part.module: part.figures for part in last}
    folded = "Modules, the largest parts first"
    parts.append(_table(names, "Module", f"Modules{at}", _MODULES, folded))
    text = (
        "Each part's share of the cosine, a mean over the pairs: over all modules the parts add up to the mean cosine. "
        "A part can be negative, where a layer holds the two gradients apart."
    )
    return Section(title, text, parts, serves)


def bare_name(module: str) -> str:
    """A module without what PEFT puts around it: the two factors of a LoRA pair have one name."""
    return _ADAPTER.sub("", unwrapped(module))


class _Part(NamedTuple):
    """A module at a checkpoint: the checkpoint's place and label, and the module's three figures."""

    place: int
    label: str
    module: str
    figures: Floats


def _list_parts(records: AuditRecords) -> list[_Part]:
    """The rows of modules; of the summary where there is no table."""
    if records.modules is None:
        modules = records.summary["modules"] or {}
        return [_Part(0, "last", name, _figures(part)) for name, part in modules.items()]
    keys = sorted({(row["step"], row["checkpoint"]) for row in records.modules})
    times = Counter(step for step, _ in keys)
    labels = [f"{step:,}" if times[step] == 1 else f"{step:,} {name}" for step, name in keys]
    places = dict(zip(keys, enumerate(labels), strict=True))
    return [_Part(*places[row["step"], row["checkpoint"]], row["module"], _figures(row)) for row in records.modules]


def _figures(row: Row) -> Floats:
    return np.array([fill_gap(row.get(name)) for name in ("cosine_part", "chosen_share", "rejected_share")])


def _add_up(parts: Iterable[tuple[Key, Floats]]) -> dict[Key, Floats]:
    sums: dict[Key, Floats] = {}
    for key, figures in parts:
        sums[key] = sums.get(key, 0.0) + figures
    return sums


def _heat_map(parts: Sequence[_Part], checkpoints: Sequence[tuple[int, str]], layers: Sequence[str]) -> HeatMap:
    cells = _add_up(((part.place, layer_of(bare_name(part.module))), part.figures) for part in parts)
    missing = np.full(3, math.nan)
    values = [[float(cells.get((place, layer), missing)[0]) for place, _ in checkpoints] for layer in layers]
    limit = max((abs(value) for row in values for value in row if math.isfinite(value)), default=0.0)
    return HeatMap(
        x_label="training step", y_label="layer", columns=[label for _, label in checkpoints], rows=_short(layers),
        values=values, name="part of the cosine", limit=limit or 1.0,
        title="Layers over the run" if len(checkpoints) > 1 else "Layers",
    )  # fmt: skip


def _short(layers: Sequence[str]) -> list[str]:
    """Layers by their numbers, where all numbered ones have one name in front of it; by place where two are alike."""
    names = [name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}" for name in layers]
    if len(set(names)) < len(names):
        names = [f"{place} {name}" for place, name in enumerate(names)]
    parts = [name.rpartition(".") for name in names]
    if len({front for front, _, number in parts if number.isdecimal()}) != 1:
        return names
    short = [f"layer {part[2]}" if part[2].isdecimal() else name for part, name in zip(parts, names, strict=True)]
    return short if len(set(short)) == len(short) else names


def _table(parts: Mapping[str, Floats], name: str, caption: str, most: int, folded: str = "") -> Table:
    cosine = sum(float(figures[0]) for figures in parts.values() if math.isfinite(figures[0]))
    ranked = sorted(parts.items(), key=lambda item: -abs(item[1][0]) if math.isfinite(item[1][0]) else 0.0)
    total = cosine if abs(cosine) > _SLACK else math.nan
    rows = [
        [module, fixed(part), percent(part / total), percent(chosen), percent(rejected)]
        for module, (part, chosen, rejected) in ranked[:most]
    ]
    if len(ranked) > most:
        caption += f"; {len(ranked) - most:,} more in the records"
    header = [name, "Part of the cosine", "Share of it", "Of ‖g_w‖²", "Of ‖g_l‖²"]
    return Table(header, rows, folded, caption, figures_from=1)
