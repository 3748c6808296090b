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
    return markdown + text.partition("\n")[2]


class FusedMerge(griffe.Extension):
    """Show options that `fused_merge.options.documented` writes, comments of fields, and examples as code."""

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        """Give a documented function its options."""
        _complete(func, func)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Give a documented class those of its constructor."""
        _complete(cls, cls.members.get("__init__"))

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Take the comment beside a field of a named tuple for its docstring."""
        _, found, comment = attr.source.partition("  # ")
        if attr.parent.is_class and found and attr.docstring is None:
            attr.docstring = griffe.Docstring(comment, parent=attr)

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Let a section "Example:" be one of code, and no paragraph in a box."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")


def _complete(obj: griffe.Class | griffe.Function, function: griffe.Function | None) -> None:
    """Write the options into docstring and parameters, as they are when the module is imported."""
    if not any(str(decorator.value).startswith("documented(") for decorator in obj.decorators):
        return
    module = obj.module.path
    runtime = attrgetter(obj.path.removeprefix(f"{module}."))(import_module(module))
    obj.docstring.value = inspect.getdoc(runtime)
    del function.parameters["options"]
    for name, parameter in inspect.signature(runtime).parameters.items():
        if name not in function.parameters:
            kind, default = griffe.ParameterKind.keyword_only, repr(parameter.default)
            function.parameters.add(griffe.Parameter(name, annotation=parameter.annotation, kind=kind, default=default))
