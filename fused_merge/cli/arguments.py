"""Values of the command line that are neither a word nor a number: ranges, files of ratios, weighted models."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TypeAlias

from typer import BadParameter

# A ratio, or one for each regular expression on names of tensors.
Ratio: TypeAlias = "float | dict[str, float]"

# A range of more ratios is a typing mistake.
_MOST = 1000


def parse_ratios(text: str) -> list[float]:
    """Return the numbers of "0.1,0.2", "0:1:0.1" (start, end, step; the end counts) or a mixture of the two.

    Ranges are counted in decimal, so that 0:1:0.1 holds 0.3 and not 0.30000000000000004.
    """
    try:
        return [ratio for part in text.split(",") for ratio in (_range(part) if ":" in part else [float(part)])]
    except ValueError as error:
        raise BadParameter(f"{error}; write numbers with commas, such as 0.1,0.2, or a range, 0:1:0.1") from error


def _range(text: str) -> list[float]:
    try:
        start, end, step = map(Decimal, text.split(":"))
        last = (end - start) // step
    except (ValueError, InvalidOperation, ZeroDivisionError) as error:
        raise ValueError(f"{text!r} is no range start:end:step") from error
    if not (last.is_finite() and 0 <= last < _MOST):
        raise ValueError(f"{text!r} does not go from its start to its end in at most {_MOST} ratios")
    return [float(start + i * step) for i in range(int(last) + 1)]


def read_ratios(path: Path) -> dict[str, Ratio]:
    """Read {folder name: number or {regular expression: number}} from a file: JSON if it is named so, else YAML.

    Raises:
        ValueError: if the file holds something else.
        ImportError: for YAML without PyYAML.
        OSError: if it cannot be read.
    """
    from fused_merge.io.plain import read_plain

    content = read_plain(path)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path} must map folder names to ratios, such as 'half: 0.5'; correct it")
    for folder, ratio in content.items():
        if not isinstance(folder, str):
            raise ValueError(f"{path} has the folder name {folder!r}, which is not text; put it in quotes")
        if not all(map(_is_number, ratio.values() if isinstance(ratio, dict) else [ratio])) or ratio == {}:
            raise ValueError(
                f"{path} gives {folder!r} the ratio {ratio!r}; write a number such as 0.5, or a mapping from regular "
                "expressions to numbers"
            )
    return content


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def parse_model(text: str) -> tuple[str, float]:
    """Return path and weight of "PATH=WEIGHT"; the last = separates them."""
    path, _, weight = text.rpartition("=")
    try:
        if path:
            return path, float(weight)
    except ValueError:
        pass
    raise BadParameter(f"{text!r} is not a model and its weight; write PATH=WEIGHT, such as sft/=0.5")
