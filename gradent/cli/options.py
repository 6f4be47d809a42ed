"""Options of the command line, made from the fields of a command's config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any, TypeVar

import typer

from gradent.errors import InputError
from gradent.loading.config import Option

__all__ = ["HYPERPARAMETERS", "hyperparameters", "options", "parameter", "read_options", "takes"]

HYPERPARAMETERS = {
    "beta": "β: the pull to the reference, or the scale of the margin.",
    "lam": "λ: the weight of chosen's log-likelihood (rrhf, slic, cpo), or of DPOP's penalty.",
    "alpha": "α: rdpo's weight of the length.",
    "gamma": "γ: simpo's target margin, inside the sigmoid.",
    "delta": "δ: slic's margin.",
    "lambda_w": "λ_w: kto's weight of chosen.",
    "lambda_l": "λ_l: kto's weight of rejected.",
    "z_ref": "z: kto's reference point.",
    "label_smoothing": "ε of TRL's robust and exo_pair.",
}
"""Of the losses, with what the help says of them."""


def hyperparameters(panel: str) -> list[inspect.Parameter]:
    """Their options, in a panel of the help."""
    return [
        parameter(name, float | None, typer.Option(rich_help_panel=panel, help=text, show_default=False), None)
        for name, text in HYPERPARAMETERS.items()
    ]


Command = TypeVar("Command", bound=Callable[..., None])


def options(config: type, *names: str) -> list[inspect.Parameter]:
    """Typer's parameters for a config's options (those named, else all): required, its own, then inherited ones."""
    parameters, known, own = [], _read(config), config.__annotations__
    for name in sorted(names or known, key=lambda name: (known[name][1] is not MISSING, name not in own)):
        option, default = known[name]
        kind: Any = option.kind | None if default is None else option.kind
        if option.is_argument:
            declared: Any = typer.Argument(help=option.help)
        else:
            flags = [option.flags] if option.flags else []
            declared = typer.Option(*flags, help=option.help, rich_help_panel=option.panel)
        if option.flags.startswith("--no-"):
            name, default = f"no_{name}", not default
        if default is MISSING:
            default = inspect.Parameter.empty
        elif option.kind is str and default is not None:
            default = str(default)
        parameters.append(parameter(name, kind, declared, default))
    return parameters


def parameter(name: str, kind: Any, declared: Any, default: Any) -> inspect.Parameter:
    """One of typer's parameters, by `typer.Option` or `typer.Argument`."""
    annotation = Annotated[kind, declared]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def takes(parameters: Iterable[inspect.Parameter]) -> Callable[[Command], Command]:
    """Let typer see these parameters in place of a command's `**values`."""

    def decorate(command: Command) -> Command:
        command.__signature__ = inspect.Signature([*parameters])  # type: ignore[attr-defined]
        return command

    return decorate


def read_options(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's options by the names and types of its fields, from what typer read."""
    known = _read(config)
    result = {}
    for name, value in values.items():
        if name in known and isinstance(known[name][1], int) and isinstance(value, str):
            value = _read_count(value, f"--{name.replace('_', '-')}")
        is_negated = name.startswith("no_") and name[3:] in known
        result[name[3:] if is_negated else name] = not value if is_negated else value
    return result


def _read(config: type) -> dict[str, tuple[Option, Any]]:
    """Name -> the option and its default, of every field that is an option."""
    return {
        field.name: (field.metadata["option"], field.default) for field in fields(config) if "option" in field.metadata
    }


def _read_count(text: str, option: str) -> int | None:
    """A number of pairs, or None for all of them."""
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{option} is {text!r}; accepted: a whole number, or all.") from None
