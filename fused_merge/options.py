"""Options that are written once: type, default, check and documentation in one definition.

A definition is a `TypedDict` whose fields are `Annotated[type, Option(...)]`. A function or class with these options
takes `**options: Unpack[Definition]` and is decorated with `documented(Definition)`, which writes them into its
signature and, in the place of `{options}`, into its docstring. The command line uses the same definitions.

A module with definitions must not postpone its annotations.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

Documented = TypeVar("Documented", bound=Callable[..., Any])

_WIDTH = 120


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        default: its value where none is given.
        doc: what it means, in plain sentences.
        check: called with name and value; returns the value as it is used, or raises an error that names both.
        cli: what the command line says differently, as keyword arguments of `typer.Option`; None keeps it off there.
    """

    default: Any
    doc: str
    check: Callable[[str, Any], Any] = lambda name, value: value
    cli: Mapping[str, Any] | None = None


def options_of(*definitions: type) -> dict[str, Option]:
    """Return the options of definitions by name, inherited ones first."""
    return {
        name: next(option for option in field.__metadata__ if isinstance(option, Option))
        for definition in definitions
        for name, field in definition.__annotations__.items()
    }


def resolve(given: Mapping[str, Any], *definitions: type) -> dict[str, Any]:
    """Return every option of definitions, checked; those that are not given have their default.

    Raises:
        TypeError: for the name of no option.
        ValueError: as their checks.
    """
    options = options_of(*definitions)
    check_known(given, options)
    return {name: option.check(name, given.get(name, option.default)) for name, option in options.items()}


def check_known(given: Iterable[str], options: Mapping[str, Option]) -> None:
    """Raise TypeError for a name that is no option."""
    for name in given:
        if name not in options:
            near = get_close_matches(name, options, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(options)}"
            raise TypeError(f"there is no option {name!r}; {hint}")


def documented(*definitions: type) -> Callable[[Documented], Documented]:
    """Write the options of definitions into the signature and the docstring of a function or class."""

    def document(documented: Documented) -> Documented:
        options = options_of(*definitions)
        function: Any = documented.__init__ if isinstance(documented, type) else documented  # type: ignore[misc]
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        types = {name: field.__origin__ for each in definitions for name, field in each.__annotations__.items()}
        own += [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=_text(types[name])
            )
            for name, option in options.items()
            if name not in signature.parameters
        ]
        function.__signature__ = signature.replace(parameters=own)
        lines = []
        for line in (documented.__doc__ or "").split("\n"):
            if line.strip() == "{options}":
                indent = line[: len(line) - len(line.lstrip())]
                lines += [
                    textwrap.fill(
                        f"{name}: {option.doc}", _WIDTH, initial_indent=indent, subsequent_indent=indent + "    "
                    )
                    for name, option in options.items()
                ]
            else:
                lines.append(line)
        documented.__doc__ = "\n".join(lines)
        return documented

    return document


def _text(annotation: Any) -> str:
    """Return an annotation as it was written, quoted or not."""
    written: str = getattr(annotation, "__forward_arg__", None) or inspect.formatannotation(annotation)
    return written


def one_of(*choices: str | None) -> Callable[[str, Any], Any]:
    """Return a check that a value is one of a few."""

    def check(name: str, value: Any) -> Any:
        check_choice(name, value, choices)
        return value

    return check


def check_choice(name: str, value: Any, choices: Iterable[str | None]) -> None:
    """Raise ValueError if a value is none of a few; the sentence lists them."""
    listed = list(choices)
    if value not in listed:
        raise ValueError(f"{name} must be {' or '.join(map(repr, listed))}, got {value!r}")


def at_least(least: float) -> Callable[[str, Any], Any]:
    """Return a check that a number is not below another."""

    def check(name: str, value: Any) -> Any:
        if not value >= least:
            raise ValueError(f"{name} must be at least {least:g}, got {value}")
        return value

    return check


def within(least: float, most: float) -> Callable[[str, Any], Any]:
    """Return a check that a number lies in an interval, ends included."""

    def check(name: str, value: Any) -> Any:
        if not least <= value <= most:
            raise ValueError(f"{name} must lie in [{least:g}, {most:g}], got {value}")
        return value

    return check
