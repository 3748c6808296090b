"""What callers may write in several ways: numbers for all tensors or by name, dtypes, sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch

from fused_merge.names import some

# A number for every tensor, or {name or regular expression on whole names: number}.
Setting: TypeAlias = "float | Mapping[str, float]"

_DTYPES = ("bfloat16", "float16", "float32", "float64")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}


class ByName(Mapping[str, float]):
    """A setting whose keys are names and not patterns, and may be of more tensors than are asked for."""


def per_tensor(setting: Setting, names: Sequence[str], *, what: str) -> dict[str, float]:
    """Decide a setting for every tensor.

    Args:
        setting: a number, or a mapping. A name that is a key gets its value; any other that of the first key
            that matches the whole of it as a regular expression. Of `LayerRatios`, keys are names only, and those that
            are not asked for are passed over.
        names: canonical names.
        what: what messages call it, e.g. `"ratio"`.

    Returns:
        A number for each of `names`, in their order.

    Raises:
        ValueError: if a number is not finite, a key is no regular expression or belongs to no tensor, or a tensor
            has no key.
    """
    if not isinstance(setting, Mapping):
        return dict.fromkeys(names, finite(setting, what=what))
    if isinstance(setting, ByName):
        if absent := [name for name in names if name not in setting]:
            raise ValueError(
                f"the LayerRatios given as {what} lack {some(map(repr, absent))}; "
                "make them from what is merged: a module and its checkpoint may differ in names"
            )
        return {name: setting[name] for name in names}
    values = {key: finite(value, what=f"{what} of {key!r}") for key, value in setting.items()}
    return {name: values[key] for name, key in match_keys(values, names, what=what).items()}


def match_keys(keys: Collection[str], names: Sequence[str], *, what: str, partial: bool = False) -> dict[str, str]:
    """Find the key of every name.

    Args:
        keys: names and regular expressions. A name that is a key is its own; any other has the first key that matches
            the whole of it.
        names: canonical names.
        what: what messages call that which the keys give.
        partial: leave out names without a key instead of refusing them.

    Returns:
        The key of each of `names`, in their order.

    Raises:
        ValueError: if a key is no regular expression or belongs to no name, or a name has no key.
    """
    known = set(names)
    patterns = {key: _compiled(key, what) for key in keys if key not in known}
    found = {}
    for name in names:
        key = name if name in keys else next((key for key, p in patterns.items() if p.fullmatch(name)), None)
        if key is not None:
            found[name] = key
        elif not partial:
            raise ValueError(f"no {what} is given for {name!r}; add its name, or '.*' as the last key for all others")
    used = set(found.values())
    if idle := [key for key in keys if key not in used]:
        raise ValueError(
            f"{some(map(repr, idle))} of the {_plural(what)} matches no tensor that an earlier key leaves; "
            f"keys are regular expressions on whole names, such as {names[0] if names else ''!r}"
        )
    return found


def check_ratios(ratios: Iterable[Setting]) -> list[Setting]:
    """Return the points of a line: numbers as Python floats, and mappings as they are.

    Raises:
        ValueError: if there is none, or a number is not finite.
        TypeError: for a single number, or what is no number.
    """
    if isinstance(ratios, (int, float, ByName)):
        raise TypeError(f"ratios must be a sequence, got {ratios!r}; put it into a list")
    points = list(ratios)
    if not points:
        raise ValueError("ratios is empty; give at least one number")
    return [point if isinstance(point, Mapping) else finite(point, what="ratio") for point in points]


def is_tuned(point: Setting, decided: Mapping[str, float]) -> bool:
    """Return whether integer tensors, which have no ratio of their own, are those of the tuned model at a point.

    They are the base's only where every ratio that was decided is 0; where none was, as without floating tensors, the
    point itself is asked.
    """
    return any(decided.values()) if decided or isinstance(point, Mapping) else point != 0.0


def plain(setting: Setting, *, what: str) -> float | dict[str, float]:
    """Return a setting in Python's own numbers and text, as a recipe in JSON holds it.

    Raises:
        ValueError: if a number is not finite.
        TypeError: if a number is none, or a key is no text.
    """
    if not isinstance(setting, Mapping):
        return finite(setting, what=what)
    if odd := [key for key in setting if not isinstance(key, str)]:
        raise TypeError(f"a {what} is given for {odd[0]!r}; keys are names or regular expressions, as text")
    return {key: finite(value, what=f"{what} of {key!r}") for key, value in setting.items()}


def finite(number: float, *, what: str) -> float:
    """Return a number as a Python float.

    Raises:
        ValueError: if it is not finite.
        TypeError: if it is no number.
    """
    if isinstance(number, (str, bytes)) or not hasattr(number, "__float__"):
        raise TypeError(f"a {what} must be a number, got {number!r}")
    if not math.isfinite(number):
        raise ValueError(f"a {what} must be finite, got {number}")
    return float(number)


def parse_dtype(dtype: torch.dtype | str | None, *, what: str = "dtype") -> torch.dtype | None:
    """Return a dtype that floating tensors can be written in, from its name.

    Raises:
        ValueError: if there is none of that name.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"{what} must be {', '.join(map(repr, _DTYPES))} or None, got {dtype!r}")
    found: torch.dtype = getattr(torch, name)
    return found


def parse_bytes(text: int | str, *, what: str) -> int:
    """Return a number of bytes from a number or from text such as `"5GB"` or `"256MiB"`.

    Raises:
        ValueError: if it is neither, or not positive.
    """
    size = str(text).strip().upper()
    unit = next((unit for unit in _UNITS if size.endswith(unit)), "")
    try:
        number = float(size.removesuffix(unit)) * _UNITS.get(unit, 1)
        if not 1 <= number < 2**63:
            raise ValueError
    except ValueError:
        raise ValueError(f"{what} must be a number of bytes such as 500000000 or '500MB', got {text!r}") from None
    return int(number)


def _plural(what: str) -> str:
    return what[:-1] + "ies" if what.endswith("y") else what + "s"


def _compiled(key: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(key)
    except (re.error, TypeError) as error:
        raise ValueError(f"{key!r} of the {_plural(what)} is no regular expression: {error}") from error
