"""Parts of the reference that stand in no page: the command line, and what mkdocstrings does not see in the source."""

import inspect
import subprocess
import sys
from importlib import import_module
from operator import attrgetter
from typing import Any

import griffe


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Write every command with its options below the text of its page, as a hook of mkdocs."""
    if page.file.src_uri != "reference/command-line.md":
        return markdown
    command = [sys.executable, "-m", "typer", "fused_merge.cli.commands", "utils", "docs", "--name", "fused-merge"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return f"{markdown}\n#{text}"


class FusedMerge(griffe.Extension):
    """Show options that `fused_merge.options.documented` writes, constructors of named tuples, and examples as code."""

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        """Give a documented function its options."""
        _complete(func, func)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Give a documented class those of its constructor, and a named tuple the constructor that its fields make."""
        _complete(cls, cls.members.get("__init__"))
        if "NamedTuple" in map(str, cls.bases):
            init = griffe.Function("__init__", parameters=griffe.Parameters())
            for name, field in cls.attributes.items():
                _add(init, name, field.annotation, field.value, griffe.ParameterKind.positional_or_keyword)
            cls.set_member("__init__", init)

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Let the example of a docstring be code."""
        if obj.docstring is not None:
            _write(obj, obj.docstring.value)


def _complete(obj: griffe.Class | griffe.Function, function: griffe.Function | None) -> None:
    """Write the options into docstring and parameters, as they are when the module is imported."""
    if not any(str(decorator.value).startswith("documented(") for decorator in obj.decorators):
        return
    module = obj.module.path
    runtime = attrgetter(obj.path.removeprefix(f"{module}."))(import_module(module))
    _write(obj, inspect.getdoc(runtime))
    del function.parameters["options"]
    for name, parameter in inspect.signature(runtime).parameters.items():
        if name not in function.parameters:
            annotation, default = parameter.annotation, repr(parameter.default)
            _add(function, name, annotation, default, griffe.ParameterKind.keyword_only)


def _write(obj: griffe.Object, text: str) -> None:
    # What griffe calls a section of examples; of any other title it makes a box of text.
    obj.docstring.value = text.replace("\nExample:\n", "\nExamples:\n")


def _add(function: griffe.Function, name: str, annotation: Any, default: Any, kind: griffe.ParameterKind) -> None:
    function.parameters.add(griffe.Parameter(name, annotation=annotation, kind=kind, default=default))
