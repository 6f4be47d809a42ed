"""Write docs/models.md: how exactly `measure` measures every causal-LM family of transformers.

    python -m scripts.zoo_table

Takes some minutes on one CPU core. The models, the batch and the truth are those of the tests (tests/test_zoo.py).
"""

from __future__ import annotations

import os
import platform
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from rich.progress import track

from gradent.errors import GradentWarning
from gradent.measurement import measure
from tests.adapters import lora_everywhere
from tests.batches import left_padded, ragged
from tests.truth import TOLERANCE, Truth, logp_error, module_error, scaled_error, truth
from tests.zoo import FAMILIES, MEASURABLE, build, model_class
from tests.zoo_tables import FLOAT32_ONLY, UNBUILT, VARIANTS

TARGET = Path(__file__).resolve().parents[1] / "docs" / "models.md"

ARITHMETIC = ("float64", "float32 islands", "float32")

HEAD = """# Models

`measure` against plain autograd, one unpadded row at a time, on every model type that transformers maps to a causal
language model, and on some other architectures that their configs can ask for. Each is built tiny from its config
class with random weights: as many layers as it takes to show every kind, width 32, 4 experts.
Written by `python -m scripts.zoo_table`; the tests hold the same models to the same limits.

- **Arithmetic**: what a float64 copy of the model computes its gradients in. "float32 islands" are casts inside the
  model's own code (norms, softmax, routers, state-space scans); two exact methods then agree to about 1e-7 only.
- **Scaled error**: the largest difference of `chosen_sq`, `rejected_sq`, `inner` or a log-prob from the truth over
  {pairs} pairs of {shortest} to {longest} tokens, over modules too, divided by ‖g_i‖‖g_j‖ (a log-prob: by its size).
  `hooks` is the default engine, `func` the second one, both over all parameters; LoRA is on every linear layer that
  PEFT adapts, with rows padded on the left. A limit is exceeded where a figure is bold.
- **Rows**: whether the default engine runs several rows in one forward ("batched"), or one a forward because some
  layer mixes rows or leaves them indistinguishable ("single"): as exact, and slower.
- **Coverage**: share of the trainable parameters in the result.

Limits: {limits}. Made on a CPU with Python {python}, torch {torch}, transformers {transformers}.

"""


@dataclass(frozen=True)
class Result:
    """One engine's result on one model: its error, coverage, and whether rows shared a forward (or a vmap)."""

    error: str
    coverage: str = "–"
    batched: bool = False


def measured(model: torch.nn.Module, true: Truth, *, engine: str = "hooks", left: bool = False) -> Result:
    """Measure the tests' batch and compare it with the truth.

    Args:
        model: a model of the zoo.
        true: its truth on the batch.
        engine: "hooks" or "func".
        left: pad on the left.

    Returns:
        The result; where the measurement fails, the error's name stands in place of the figure.
    """
    batch = left_padded(ragged()) if left else ragged()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            gram = measure(model, batch, engine=engine, by_module=True)
        except Exception as error:  # noqa: BLE001  (a failure of any kind is a result, and is written down)
            return Result(f"**{type(error).__name__}**")
    error = max(scaled_error(gram, true), module_error(gram, true), logp_error(gram, true))
    text = f"{error:.0e}".replace("e-0", "e-")
    fell_back = any(issubclass(warning.category, GradentWarning) for warning in seen)
    return Result(
        text if error <= TOLERANCE[true.arithmetic] else f"**{text}**", f"{gram.coverage:.3g}", batched=not fell_back
    )


def row(name: str) -> str:
    """The table's line for one model.

    Args:
        name: a family or variant of the zoo.

    Returns:
        A Markdown table row.
    """
    family = VARIANTS.get(name, (name, {}))[0]
    true = truth(build(name), ragged())
    hooks, func = (measured(build(name), true, engine=engine) for engine in ("hooks", "func"))
    adapted = lora_everywhere(name)
    lora = measured(adapted, truth(adapted, ragged()), left=True)
    rows = "batched" if hooks.batched else "single"
    cells = (name, model_class(family).__name__, true.arithmetic, hooks.error, func.error, lora.error)
    return f"| {' | '.join(cells)} | {rows} | {hooks.coverage} |"


def main() -> None:
    """Measure everything and write the page."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    lengths = ragged().attention_mask.sum(1)
    families = [name for name in MEASURABLE if name not in VARIANTS]
    lines = [
        HEAD.format(
            pairs=len(ragged()),
            shortest=int(lengths.min()),
            longest=int(lengths.max()),
            limits=", ".join(
                f"{limit:.0e} in {kind}".replace("e-0", "e-") for kind, limit in TOLERANCE.items() if limit < 1e-3
            ),
            python=platform.python_version(),
            torch=torch.__version__.partition("+")[0],
            transformers=transformers.__version__,
        )
    ]
    header = "| class | arithmetic | hooks | func | LoRA | rows | coverage |\n" + "|---" * 8 + "|"
    for title, first, names in (
        (f"{len(families)} of {len(FAMILIES)} model types", "model type", families),
        ("Other architectures", "variant", list(VARIANTS)),
    ):
        table = [row(name) for name in track(names, description=title)]
        lines += [f"## {title}\n", f"| {first} {header}", *table, ""]
    lines += ["## Not measured\n", "| model type | why |\n|---|---|"]
    lines += [f"| {name} | {why} |" for name, (_, why) in sorted(UNBUILT.items())]
    lines += ["\n## Measured in float32 only\n", "| model type | why not in float64 |\n|---|---|"]
    lines += [f"| {name} | {why} |" for name, (_, why) in sorted(FLOAT32_ONLY.items())]
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
