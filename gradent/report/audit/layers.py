"""The section on where in the model the cosine comes from: modules gathered by layer and by kind.

`model.layers.3.mlp.up_proj.lora_A.default` belongs to layer `model.layers.3` and is of the kind `mlp.up_proj`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from gradent.model.layer_names import layer_of, unwrapped
from gradent.report.audit.records import AuditRecords
from gradent.report.page.charts import HeatMap
from gradent.report.page.html import Section, Table
from gradent.report.page.numbers import fixed, percent

__all__ = ["kind_of", "layer_section"]

_ADAPTER = re.compile(r"\.(?:lora_\w+|base_layer|modules_to_save)(?:\..*)?$")
_MOST_COLUMNS = 60
_KINDS = 15
_MODULES = 40
_LONGEST = 32  # characters of a layer's name in the heat map; its end tells more than its beginning
_SLACK = 1e-9


def kind_of(module: str) -> str:
    """What a module is in every layer."""
    parts = _bare(module).split(".")
    numbered = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    if numbered is None:
        return ".".join(parts)
    return ".".join(part for part in parts[numbered + 1 :] if not part.isdecimal()) or "the layer itself"


def layer_section(records: AuditRecords) -> Section:
    """Layers and kinds of modules, by their parts of the cosine."""
    title = "Layers"
    serves = "Decides: where to look for the entanglement, and which layers an adapter might leave out."
    rows = _rows(records)
    if not rows:
        return Section(
            title,
            "Modules were not measured: leave --no-by-module out of `gradent audit` to see layers here.",
            [],
            serves,
        )
    columns = _columns(rows)
    last = [row for row in rows if row[0] == columns[-1][0]]
    parts: list[HeatMap | Table] = []
    layers = _sums((layer_of(_bare(name)), figures) for _, _, name, figures in last)
    if len(layers) > 1:
        parts.append(_heat_map(rows, columns, list(layers)))
    kinds = _sums((kind_of(name), figures) for _, _, name, figures in last)
    parts.append(_table(kinds, "Kind of module", "Kinds of modules, over all layers, at the last checkpoint", _KINDS))
    every = {name: figures for _, _, name, figures in last}
    parts.append(
        _table(every, "Module", "Modules at the last checkpoint", _MODULES, "Modules, the largest parts first")
    )
    return Section(
        title,
        "Each part's share of the cosine, a mean over the pairs: over all modules the parts add up to the mean cosine. "
        "A part can be negative, where a layer holds the two gradients apart.",
        parts,
        serves,
    )


def _bare(module: str) -> str:
    return _ADAPTER.sub("", unwrapped(module))


def _rows(records: AuditRecords) -> list[tuple[int, str, str, tuple[float, float, float]]]:
    """Place of the checkpoint, its label, a module and its figures; of the summary where there is no table."""
    names = ("cosine_part", "chosen_share", "rejected_share")
    table = records.modules
    if table is None:
        modules = records.summary["modules"] or {}
        return [(0, "last", name, _figures(part.get(each) for each in names)) for name, part in modules.items()]
    keys = sorted(set(zip(table["step"], table["checkpoint"], strict=True)))
    places = {key: place for place, key in enumerate(keys)}
    columns = (table[name] for name in ("step", "checkpoint", "module", *names))
    return [
        (places[step, checkpoint], _label(step, checkpoint, keys), module, _figures(figures))
        for step, checkpoint, module, *figures in zip(*columns, strict=True)
    ]


def _label(step: int, checkpoint: str, keys: Sequence[tuple[int, str]]) -> str:
    alone = sum(each == step for each, _ in keys) == 1
    return f"{step:,}" if alone else f"{step:,} {checkpoint}"


def _figures(values: Iterable[Any]) -> tuple[float, float, float]:
    first, second, third = (math.nan if value is None else float(value) for value in values)
    return first, second, third


def _columns(rows: Sequence[tuple[int, str, str, Any]]) -> list[tuple[int, str]]:
    """The checkpoints; of very many, so many evenly over the run, its last one among them."""
    found = sorted({(place, label) for place, label, _, _ in rows})
    if len(found) <= _MOST_COLUMNS:
        return found
    return [found[round(at * (len(found) - 1) / (_MOST_COLUMNS - 1))] for at in range(_MOST_COLUMNS)]


def _sums(parts: Iterable[tuple[str, tuple[float, float, float]]]) -> dict[str, tuple[float, float, float]]:
    sums: dict[str, tuple[float, float, float]] = {}
    for name, figures in parts:
        before = sums.get(name, (0.0, 0.0, 0.0))
        sums[name] = before[0] + figures[0], before[1] + figures[1], before[2] + figures[2]
    return sums


def _heat_map(
    rows: Sequence[tuple[int, str, str, Any]], columns: Sequence[tuple[int, str]], layers: Sequence[str]
) -> HeatMap:
    cells = _sums((f"{place} {layer_of(_bare(name))}", figures) for place, _, name, figures in rows)
    values = [[cells.get(f"{place} {layer}", (math.nan,))[0] for place, _ in columns] for layer in layers]
    limit = max((abs(value) for row in values for value in row if math.isfinite(value)), default=0.0)
    return HeatMap(
        x_label="training step",
        y_label="layer",
        columns=[label for _, label in columns],
        rows=_short(layers),
        values=values,
        name="part of the cosine",
        limit=limit or 1.0,
        title="Layers over the run" if len(columns) > 1 else "Layers",
    )


def _short(layers: Sequence[str]) -> list[str]:
    """Layers by their numbers, where all numbered ones have one name in front of it."""
    layers = _distinct([name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}" for name in layers], layers)
    fronts = {name.rpartition(".")[0] for name in layers if name.rpartition(".")[2].isdecimal()}
    if len(fronts) != 1:
        return list(layers)
    short = [f"layer {name.rpartition('.')[2]}" if name.rpartition(".")[2].isdecimal() else name for name in layers]
    return short if len(set(short)) == len(short) else list(layers)


def _distinct(short: list[str], full: Sequence[str]) -> list[str]:
    """Short names, each with its place where two would be alike."""
    if len(set(short)) == len(full):
        return short
    return [f"{place} {name}" for place, name in enumerate(short)]


def _table(parts: dict[str, tuple[float, float, float]], name: str, caption: str, most: int, folded: str = "") -> Table:
    whole = sum(part[0] for part in parts.values() if math.isfinite(part[0]))
    ranked = sorted(parts.items(), key=lambda item: -abs(item[1][0]) if math.isfinite(item[1][0]) else 0.0)
    rows = [
        [
            each,
            fixed(part),
            percent(part / whole if abs(whole) > _SLACK else None),
            percent(chosen),
            percent(rejected),
        ]
        for each, (part, chosen, rejected) in ranked[:most]
    ]
    more = len(ranked) - len(rows)
    if more > 0:
        caption += f"; {more:,} more in the records"
    header = [name, "Part of the cosine", "Share of it", "Of ‖g_w‖²", "Of ‖g_l‖²"]
    return Table(header, rows, folded, caption, figures_from=1)
