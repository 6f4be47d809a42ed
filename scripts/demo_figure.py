"""Draw docs/img/demo.png, the README's figure, from the records of a demo.

gradent demo
python -m scripts.demo_figure [DIRECTORY, by default gradent-demo]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from gradent.record import read_demo, read_pairs
from gradent.record.curves import Curve, read_curves

TARGET = Path(__file__).resolve().parents[1] / "docs" / "img" / "demo.png"

COLOURS = ("#1f6fb4", "#c77400", "#b23a6f", "#5a4fb5")
PANELS = {
    "chosen_logp": ("log-prob of chosen", "change since step 0 (nats)"),
    "rejected_logp": ("log-prob of rejected", "change since step 0 (nats)"),
    "cosine": ("cosine of the two gradients", "cosine"),
}


def draw_panel(axes: Axes, curves: dict[str, Curve]) -> None:
    """One panel: a line a style, with a band of one standard error.

    Args:
        axes: where to.
        curves: by style.
    """
    for colour, (style, curve) in zip(COLOURS, curves.items(), strict=True):
        axes.plot(curve.steps, curve.mean, color=colour, linewidth=2, marker="o", markersize=3, label=style)
        axes.fill_between(curve.steps, curve.mean - curve.error, curve.mean + curve.error, color=colour, alpha=0.2)
    axes.axhline(0, color="#8a94a0", linewidth=0.8, zorder=0)
    axes.set_xlabel("DPO step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e9ed", linewidth=0.8)
    axes.set_axisbelow(True)


def main(directory: Path) -> None:
    """Draw the figure.

    Args:
        directory: holds the demo's records.
    """
    columns = read_pairs(directory / "pairs.parquet").to_pydict()
    record = read_demo(directory / "demo.json")
    mpl.rcParams.update({"font.size": 10, "axes.titlesize": 11, "axes.edgecolor": "#5b6672"})
    figure, panels = plt.subplots(1, len(PANELS), figsize=(11, 3.6), layout="constrained")
    for axes, (name, (title, label)) in zip(panels, PANELS.items(), strict=True):
        curves = read_curves(columns, name)
        if name != "cosine":
            curves = {style: curve.since_start for style, curve in curves.items()}
        draw_panel(axes, curves)
        axes.set_title(title)
        axes.set_ylabel(label)
    figure.get_layout_engine().set(wspace=0.05)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    settings = record["settings"]
    figure.supxlabel(
        f"gradent demo, seed {settings['seed']}: mean over {settings['probe']} held-out pairs, band: ± one standard "
        "error",
        fontsize=8.5,
        color="#5b6672",
    )
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(TARGET, dpi=150, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "gradent-demo"))
