"""The command line: `gradent demo`, `audit`, `report`, `compare`, `tokens`, `plan`, `doctor`.

Each command imports what it needs when it runs, so that `--help` and `--version` answer at once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from gradent.errors import GradentError, InputError
from gradent.text import printable
from gradent.version import __version__

__all__ = ["app", "main"]

# Optional[X] rather than X | None in signatures: typer evaluates annotations at run time.
app = typer.Typer(
    name="gradent",
    help="Why do chosen and rejected log-probs move together? gradent measures the gradient entanglement behind it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Run the command line; the entry point of `gradent` and of `python -m gradent`."""
    app(prog_name="gradent")


@contextmanager
def _readable_errors() -> Iterator[None]:
    """One block on stderr and exit code 2 for what the user can put right; 130 for Ctrl-C."""
    console = Console(stderr=True, highlight=False)
    try:
        yield
    except GradentError as error:
        lines = printable(str(error)).replace("\n", "\n  ")
        console.print(Text("error", "bold red"), Text(f"({type(error).__name__})\n  {lines}"), soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        console.print(Text(f"interrupted: {str(error) or 'nothing more was written'}"), soft_wrap=True)
        raise typer.Exit(130) from error


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"gradent {__version__}")
        raise typer.Exit


@app.callback()
def _gradent(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id of a causal LM. [default: a small one made on the spot]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for the report and the records.")] = Path("gradent-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the data and the training.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="DPO steps. [default: the demo's own]")] = None,
) -> None:
    """See the effect: train a small model by DPO on four styles of response, and watch which log-probs fall."""
    with _readable_errors():
        from gradent.demo import run_demo  # noqa: PLC0415

        _quieten_others()
        code = run_demo(out=out, model=model, steps=steps, seed=seed)
    raise typer.Exit(code)


_LOSS = "Loss"
_MODEL = "Model"
_DATA = "Data"
_RUN = "Measuring"

# Options that several commands take.
_Model = Annotated[str, typer.Argument(help="Directory or hub id of a causal LM, or of a PEFT adapter.")]
_Adapter = Annotated[
    str | None,
    typer.Option(help="PEFT adapter on MODEL; its parameters are then what is measured.", rich_help_panel=_MODEL),
]
_DType = Annotated[str, typer.Option(help="float32, float64, bfloat16, float16 or auto.", rich_help_panel=_MODEL)]
_Device = Annotated[
    str | None, typer.Option(help="[default: cuda where there is one, else cpu]", rich_help_panel=_MODEL)
]
_TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code from the model's repository.", rich_help_panel=_MODEL)
]
_Split = Annotated[str, typer.Option(help="Split of a dataset.", rich_help_panel=_DATA)]
_MaxLength = Annotated[
    int | None,
    typer.Option(
        help="Most tokens of prompt + response. [default: 1024, or what the model can take]", rich_help_panel=_DATA
    ),
]
_NoAddEos = Annotated[
    bool,
    typer.Option("--no-add-eos", help="Append no EOS to plain strings (TRL's DPOTrainer does).", rich_help_panel=_DATA),
]
_MemoryBudget = Annotated[
    str | None, typer.Option(help="Scratch of the reductions, e.g. 512MiB.", rich_help_panel=_RUN)
]


@app.command()
def audit(
    model: Annotated[
        str,
        typer.Argument(
            help="Directory of a finished run (with checkpoint-* in it), or directory or hub id of a causal LM, or "
            "of a PEFT adapter."
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Preference pairs: .jsonl, .json or .parquet file, dataset directory, or hub id, in TRL's formats.",
            rich_help_panel=_DATA,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory for report.html, pairs.parquet, ...", rich_help_panel=_RUN)],
    loss: Annotated[
        str,
        typer.Option(
            help="dpo, rdpo, simpo, ipo, rrhf, slic, cpo, dpop, kto, sppo, or pairwise_normalized (of dpo); what is "
            "not set below has its default.",
            rich_help_panel=_LOSS,
        ),
    ] = "dpo",
    beta: Annotated[float | None, typer.Option(rich_help_panel=_LOSS)] = None,
    lam: Annotated[float | None, typer.Option(rich_help_panel=_LOSS)] = None,
    alpha: Annotated[float | None, typer.Option(rich_help_panel=_LOSS)] = None,
    gamma: Annotated[float | None, typer.Option(rich_help_panel=_LOSS)] = None,
    delta: Annotated[float | None, typer.Option(rich_help_panel=_LOSS)] = None,
    lambda_w: Annotated[float | None, typer.Option(rich_help_panel=_LOSS)] = None,
    lambda_l: Annotated[float | None, typer.Option(rich_help_panel=_LOSS)] = None,
    z_ref: Annotated[float | None, typer.Option(rich_help_panel=_LOSS)] = None,
    checkpoints: Annotated[
        str,
        typer.Option(
            help="Of a run: all, last, or steps such as 0,200,400; 0 is the model before training.",
            rich_help_panel=_MODEL,
        ),
    ] = "all",
    base: Annotated[
        str | None,
        typer.Option(
            help="Of a run: the model that it started from, where its files do not say or have moved.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    adapter: _Adapter = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Reference model. [default: what the run started from, or the base under the adapter; for a single "
            "model, MODEL itself]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    dtype: _DType = "float32",
    device: _Device = None,
    trust_remote_code: _TrustRemoteCode = False,
    split: _Split = "train",
    max_length: _MaxLength = None,
    max_pairs: Annotated[
        str,
        typer.Option(
            help="Measure that many pairs, drawn with --seed from slices of like length, or all.",
            rich_help_panel=_DATA,
        ),
    ] = "256",
    seed: Annotated[int, typer.Option(help="Seed of that draw.", rich_help_panel=_DATA)] = 0,
    skip_bad_rows: Annotated[
        bool,
        typer.Option("--skip-bad-rows", help="Go on without unusable rows; they are listed.", rich_help_panel=_DATA),
    ] = False,
    no_add_eos: _NoAddEos = False,
    batch_size: Annotated[int, typer.Option(help="Most pairs a batch.", rich_help_panel=_RUN)] = 8,
    memory_budget: _MemoryBudget = None,
    engine: Annotated[str, typer.Option(help="hooks or func.", rich_help_panel=_RUN)] = "hooks",
    by_module: Annotated[
        bool,
        typer.Option("--by-module/--no-by-module", help="Which modules the cosine comes from.", rich_help_panel=_RUN),
    ] = True,
    token_pairs: Annotated[
        int | None,
        typer.Option(
            help="Also measure the tokens of that many pairs, spread over all cosines, and show which entangle.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html and figures.", rich_help_panel=_RUN)
    ] = True,
    wandb: Annotated[
        str | None, typer.Option(help="Stream the records to this wandb project.", rich_help_panel=_RUN)
    ] = None,
) -> None:
    """Measure preference pairs: will the loss raise chosen and lower rejected, or drag both the same way?

    Of a finished run, the same pairs are measured at every checkpoint. Stopped at any point, the same command goes on
    where it was. Exit code 0: all was measured; 2: nothing could be; 3: some checkpoints are left out; 130: stopped.
    """  # noqa: DOC501
    with _readable_errors():
        from gradent import losses  # noqa: PLC0415
        from gradent.auditing.api import audit as run_audit  # noqa: PLC0415

        _quieten_others()
        given = {
            "beta": beta, "lam": lam, "alpha": alpha, "gamma": gamma, "delta": delta, "lambda_w": lambda_w,
            "lambda_l": lambda_l, "z_ref": z_ref,
        }  # fmt: skip
        hyper: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        result = run_audit(
            model, data, loss=losses.get(loss, **hyper), out=out, checkpoints=checkpoints, base=base, adapter=adapter,
            reference=reference, split=split, max_length=max_length, max_pairs=_count(max_pairs, "--max-pairs"),
            token_pairs=token_pairs, batch_size=batch_size, memory_budget=memory_budget, engine=engine,
            by_module=by_module, dtype=dtype, device=device, skip_bad_rows=skip_bad_rows, add_eos=not no_add_eos,
            trust_remote_code=trust_remote_code, seed=seed, report=report, wandb=wandb,
        )  # fmt: skip
        files = (
            result.report_path, result.pairs_path, result.sample_path, result.modules_path, result.tokens_path,
            result.summary_path,
        )  # fmt: skip
        paths = [str(path) for path in files if path is not None]
        console = Console(highlight=False)
        seconds = result.summary["seconds"]
        console.print(Text(f"\nWrote {', '.join(paths[:-1])} and {paths[-1]} ({seconds:.1f} s)."), soft_wrap=True)
    if result.summary["left_out"] and os.environ.get("RANK", "0") == "0":  # a launcher kills the others over it
        raise typer.Exit(3)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="What `gradent audit`, `tokens` or `demo` wrote.")],
) -> None:
    """Make the pages and figures of a directory anew from its records; no model is needed."""
    with _readable_errors():
        from gradent.report import write_report  # noqa: PLC0415

        written = write_report(directory)
        Console(highlight=False).print(Text(f"Wrote {', '.join(map(str, written))}."), soft_wrap=True)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Directory of one audit.")],
    second: Annotated[Path, typer.Argument(help="Directory of another.")],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("compare.html"),
) -> None:
    """Put two audits side by side: the same pairs, two runs, two losses or two models."""
    with _readable_errors():
        from gradent.report import print_comparison, write_comparison  # noqa: PLC0415

        console = Console(highlight=False)
        page = write_comparison(first, second, out)
        print_comparison(first, second, console)
        console.print(Text(f"\nWrote {page}."), soft_wrap=True)


def _count(text: str, option: str) -> int | None:
    """A number of pairs, or None for all of them."""
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{option} is {text!r}; accepted: a whole number, or all.") from None


@app.command()
def tokens(
    model: _Model,
    data: Annotated[str, typer.Option(help="Preference pairs, as `gradent audit` reads them.", rich_help_panel=_DATA)],
    pair: Annotated[int, typer.Option(help="Row of the data, counted from 0.", rich_help_panel=_DATA)],
    out: Annotated[
        Path, typer.Option(help="Directory for tokens.json, tokens.png and tokens.html.", rich_help_panel=_RUN)
    ],
    adapter: _Adapter = None,
    dtype: _DType = "float32",
    device: _Device = None,
    trust_remote_code: _TrustRemoteCode = False,
    split: _Split = "train",
    max_length: _MaxLength = None,
    no_add_eos: _NoAddEos = False,
    memory_budget: _MemoryBudget = None,
    by_module: Annotated[
        bool, typer.Option("--by-module", help="Also show which modules entangle the pair.", rich_help_panel=_RUN)
    ] = False,
    masks: Annotated[
        Path | None,
        typer.Option(
            help="Also show which tokens a masked loss keeps: masks.parquet of TokenMaskedDPOTrainer.export_masks, of "
            "the same data.",
            rich_help_panel=_RUN,
        ),
    ] = None,
) -> None:
    """Look at one pair, token by token: which tokens pull chosen and rejected along, and which hold them apart?"""
    with _readable_errors():
        from gradent.auditing.pair_tokens import audit_tokens  # noqa: PLC0415

        _quieten_others()
        result = audit_tokens(
            model, data, pair=pair, out=out, adapter=adapter, split=split, max_length=max_length,
            memory_budget=memory_budget, by_module=by_module, masks=masks, dtype=dtype, device=device,
            add_eos=not no_add_eos, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        Console(highlight=False).print(
            Text(
                f"\nWrote {result.page_path}, {result.picture_path} and {result.record_path} "
                f"({result.record['seconds']:.1f} s)."
            ),
            soft_wrap=True,
        )


@app.command()
def plan(
    model: _Model,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a row: prompt and response.")] = 1024,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of a batch.")] = 1,
    adapter: _Adapter = None,
    dtype: _DType = "float32",
    device: _Device = None,
    trust_remote_code: _TrustRemoteCode = False,
    memory_budget: _MemoryBudget = None,
) -> None:
    """See beforehand how each layer would be measured, and what that costs; the model's weights are not read."""
    with _readable_errors():
        from gradent.planning.command import show_plan  # noqa: PLC0415

        _quieten_others()
        show_plan(
            model, tokens=tokens, pairs=pairs, adapter=adapter, memory_budget=memory_budget, dtype=dtype, device=device,
            trust_remote_code=trust_remote_code, console=Console(highlight=False),
        )  # fmt: skip


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for a bug report.")] = False,
) -> None:
    """Check this installation: versions, devices, how gradients are reduced, and two models against plain autograd."""
    with _readable_errors():
        from gradent.doctor import examine, print_report  # noqa: PLC0415

        _quieten_others()
        report = examine()
        print_report(report, Console(highlight=False), as_json=as_json)
    raise typer.Exit(0 if report["passed"] else 1)


def _quieten_others() -> None:
    """No loading bars and advice between the tables: what matters of them, `gradent.loading.models` checks itself."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of other libraries about each other
    warnings.filterwarnings("ignore", "Found missing adapter keys")
    from transformers.utils import logging  # noqa: PLC0415

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
