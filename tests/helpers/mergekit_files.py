"""The text of files for mergekit."""

from __future__ import annotations


def models(method, *entries, base="base", more=""):
    """A file of the `models:` form; an entry is the text of its parameters after the name."""
    lines = "".join(f"  - model: {name}\n    parameters: {{{parameters}}}\n" for name, parameters in entries)
    return f"merge_method: {method}\n" + (f"base_model: {base}\n" if base else "") + f"models:\n{lines}{more}"


def slices(method, *entries, more="base_model: base\n"):
    """A file of the `slices:` form; an entry is a range, parameters of its source a, and its own."""
    text = f"merge_method: {method}\n{more}slices:\n"
    for (first, end), source, own in entries:
        text += f"""  - parameters: {{{own}}}
    sources:
      - {{model: base, layer_range: [{first}, {end}]}}
      - {{model: a, layer_range: [{first}, {end}], parameters: {{{source}}}}}
"""
    return text
