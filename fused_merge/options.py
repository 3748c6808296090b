"""Options that are written once: type, default, check and documentation in one definition.

A definition is a `TypedDict` under `@definition`. Its fields are `Annotated[type, Option(...)]`, and a section
"Options:" of its docstring says what each one means. What has these options takes `**options: Unpack[Definition]` and
is decorated with `documented(Definition)`, which writes them into the signature and, in the place of `{options}`, into
the docstring. The command line uses the same definitions. A module with definitions must not postpone its annotations.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar

Documented = TypeVar("Documented", bound=Callable[..., Any])
Definition = TypeVar("Definition", bound=type)

_SECTION = "    Options:\n"


@dataclass
class Option:
    """One option.

    Attributes:
        default: its value where none is given.
        check: called with name and value; returns the value as it is used, or raises an error that names both.
        cli: None keeps the option off the command line. Otherwise keyword arguments of `typer.Option` beyond what `doc`
            and the annotation say, and `type` where the command line takes less than the annotation.
        doc: what it means, from the docstring of its definition.
    """

    default: Any
    check: Callable[[str, Any], Any] = lambda name, value: value
    cli: Mapping[str, Any] | None = None
    doc: str = ""

    @property
    def summary(self) -> str:
        """The first clause of `doc` as a sentence, for the help of the command line."""
        clause = re.split(r"[;.](?:\s|$)", self.doc, maxsplit=1)[0].replace("`", "").replace('"', "")
        return f"{clause[0].upper()}{clause[1:]}."


def definition(cls: Definition) -> Definition:
    """Give the options of a definition the texts of its docstring."""
    section = textwrap.dedent((cls.__doc__ or "").partition(_SECTION)[2])
    texts = dict(re.findall(r"^(\w+): (.*(?:\n .*)*)", section, flags=re.MULTILINE))
    for name, option in options_of(cls).items():
        if name in texts:
            option.doc = " ".join(texts[name].split())
    return cls


@cache
def options_of(*definitions: type) -> dict[str, Option]:
    """Return the options of definitions by name, inherited ones first; the same dictionary each time."""
    return {
        name: next(option for option in field.__metadata__ if isinstance(option, Option))
        for definition in definitions
        for name, field in definition.__annotations__.items()
    }


def types_of(*definitions: type) -> dict[str, str]:
    """Return the annotations of options by name, as they were written."""
    return {
        name: getattr(field.__origin__, "__forward_arg__", None) or inspect.formatannotation(field.__origin__)
        for definition in definitions
        for name, field in definition.__annotations__.items()
    }


def resolve(given: Mapping[str, Any], *definitions: type) -> dict[str, Any]:
    """Return every option of definitions, checked, given or by default; TypeError for the name of no option."""
    options = options_of(*definitions)
    check_known(given, options)
    return {name: option.check(name, given.get(name, option.default)) for name, option in options.items()}


def split(given: Mapping[str, Any], *definitions: type) -> list[dict[str, Any]]:
    """Return, for each definition, those of the given options that belong to it; TypeError for one of none of them."""
    check_known(given, options_of(*definitions))
    return [{name: given[name] for name in given if name in options_of(each)} for each in definitions]


def select(resolved: Mapping[str, Any], *definitions: type) -> dict[str, Any]:
    """Return those of the resolved options that belong to definitions."""
    return {name: resolved[name] for name in options_of(*definitions)}


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
        types = types_of(*definitions)
        own += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=types[name])
            for name, option in options.items()
            if name not in signature.parameters
        ]
        function.__signature__ = signature.replace(parameters=own)
        text, found, rest = (documented.__doc__ or "").partition("{options}")
        indent = text[text.rfind("\n") + 1 :]
        entries = [
            textwrap.fill(f"{name}: {option.doc}", 120 - len(indent), subsequent_indent="    ")
            for name, option in options.items()
        ]
        documented.__doc__ = text + ("\n".join(entries).replace("\n", "\n" + indent) if found else "") + rest
        return documented

    return document


def need(holds: Callable[[Any], bool], what: str) -> Callable[[str, Any], Any]:
    """Return a check that raises "NAME must WHAT, got VALUE" unless `holds(value)`."""

    def check(name: str, value: Any) -> Any:
        try:
            fulfilled = holds(value)
        except TypeError:
            # A text where a number belongs, for example, which cannot be compared.
            fulfilled = False
        if not fulfilled:
            raise ValueError(f"{name} must {what}, got {repr(value) if isinstance(value, str) else value}")
        return value

    return check


def optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """Return a check that lets None pass and is otherwise the given one."""
    return lambda name, value: None if value is None else check(name, value)


def one_of(*choices: str | None) -> Callable[[str, Any], Any]:
    """Return a check that a value is one of a few."""
    return need(lambda value: value in choices, f"be {' or '.join(map(repr, choices))}")


def at_least(least: float) -> Callable[[str, Any], Any]:
    """Return a check that a number is not below another."""
    return need(lambda value: value >= least, f"be at least {least:g}")


def within(least: float, most: float) -> Callable[[str, Any], Any]:
    """Return a check that a number lies in an interval, ends included."""
    return need(lambda value: least <= value <= most, f"lie in [{least:g}, {most:g}]")


# A number above 0 and at most 1.
share = need(lambda value: 0.0 < value <= 1.0, "lie in (0, 1]")
