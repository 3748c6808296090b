"""Values that callers may write in several ways: numbers for all tensors or by name, dtypes, sizes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from fused_merge.names import some

if TYPE_CHECKING:
    import torch

# One number for every tensor, or {name or regular expression on whole names: number}.
PerTensor: TypeAlias = "float | Mapping[str, float]"

_DTYPES = ("bfloat16", "float16", "float32", "float64")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}


class NamedRatios(Mapping[str, float]):
    """Ratios whose keys are names and not patterns; it may hold more tensors than are asked for."""


def per_tensor(
    value: PerTensor,
    names: Sequence[str],
    *,
    what: str,
    also: Callable[[], Mapping[str, Sequence[str]]] | None = None,
) -> dict[str, float]:
    """Return the number of every tensor, in the order of their canonical names.

    The keys of a mapping are as for `match_keys`; those of `NamedRatios` are names only, and those that are not asked
    for are passed over. Where they fit no names, they may be those that `also` has for each: in memory, or on disk.
    Error messages call the value `what`, for example `"ratio"`. Raises ValueError as `match_keys` and `finite`, and if
    what is one tensor here has several numbers under its other names.
    """
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, finite(value, what=what))
    if also is not None:
        try:
            return per_tensor(value, names, what=what)
        except ValueError as error:
            others = also()
            try:
                found = per_tensor(value, list(dict.fromkeys(o for name in names for o in others[name])), what=what)
            except (KeyError, ValueError):
                raise error from None
            decided = {name: {found[other] for other in others[name]} for name in names}
            if several := [name for name, numbers in decided.items() if len(numbers) > 1]:
                raise ValueError(
                    f"{several[0]!r} is one tensor here, and what it packs has more than one {what}; give it one"
                ) from None
            return {name: numbers.pop() for name, numbers in decided.items()}
    if isinstance(value, NamedRatios):
        if absent := [name for name in names if name not in value]:
            raise ValueError(
                f"the LayerRatios given as {what} lack {some(map(repr, absent))}; "
                "make them from what is merged: a module and its checkpoint may differ in names"
            )
        return {name: value[name] for name in names}
    values = {key: finite(number, what=f"{what} of {key!r}") for key, number in value.items()}
    return {name: values[key] for name, key in match_keys(values, names, what=what).items()}


def match_keys(keys: Collection[str], names: Sequence[str], *, what: str, partial: bool = False) -> dict[str, str]:
    """Return the key of every canonical name, in the order of the names.

    Keys are names and regular expressions. A name that is a key is its own key; any other name has the first key that
    matches all of it. Error messages call the values of the keys `what`.

    Raises ValueError if a key is not a regular expression or belongs to no name, or a name has no key; the last with
    `partial` is left out instead.
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
        keys_match = "key {} matches" if len(idle) == 1 else "keys {} match"
        raise ValueError(
            f"{what} {keys_match.format(some(map(repr, idle)))} no tensor that an earlier key has not already taken; "
            f"keys are regular expressions on whole names, such as {names[0] if names else ''!r}"
        )
    return found


def check_ratios(ratios: Iterable[PerTensor]) -> list[PerTensor]:
    """Return ratios as a list: numbers as Python floats, and mappings as they are.

    Raises TypeError for a single number and as `finite`, ValueError if there is none.
    """
    if isinstance(ratios, (int, float, NamedRatios)):
        raise TypeError(f"ratios must be a sequence, got {ratios!r}; put it into a list")
    given = list(ratios)
    if not given:
        raise ValueError("ratios is empty; give at least one number")
    return [ratio if isinstance(ratio, Mapping) else finite(ratio, what="ratio") for ratio in given]


def is_tuned(ratio: PerTensor, decided: Mapping[str, float]) -> bool:
    """Return whether integer tensors, which have no ratio of their own, come from the tuned model.

    They come from the base only where every decided ratio is 0, or, where no tensor has one, where `ratio` itself is.
    """
    return any(decided.values()) if decided or isinstance(ratio, Mapping) else ratio != 0.0


def plain(value: PerTensor, *, what: str) -> float | dict[str, float]:
    """Return a number or mapping in Python's own numbers and strings, as a recipe in JSON holds it.

    Raises TypeError if a key is not a string, and as `finite`.
    """
    if not isinstance(value, Mapping):
        return finite(value, what=what)
    if odd := [key for key in value if not isinstance(key, str)]:
        raise TypeError(f"a {what} is given for {odd[0]!r}; keys are names or regular expressions, as strings")
    return {key: finite(number, what=f"{what} of {key!r}") for key, number in value.items()}


def finite(number: float, *, what: str) -> float:
    """Return a number as a Python float; raise TypeError if it is none, ValueError if it is not finite."""
    if isinstance(number, (str, bytes)) or not hasattr(number, "__float__"):
        raise TypeError(f"a {what} must be a number, got {number!r}")
    if not math.isfinite(number):
        raise ValueError(f"a {what} must be finite, got {number}")
    return float(number)


def dtype_name(dtype: object) -> str:
    """Return the name by which `torch` has a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def parse_dtype(dtype: torch.dtype | str | None, *, what: str = "dtype") -> torch.dtype | None:
    """Return the dtype of a name, one that floating tensors can be written in; raise ValueError for any other."""
    # Here, because the help of the command line needs this module and must not wait for torch.
    import torch

    name = dtype_name(dtype)
    if dtype is not None and name not in _DTYPES:
        raise ValueError(f"{what} must be {', '.join(map(repr, _DTYPES))} or None, got {dtype!r}")
    return None if dtype is None else getattr(torch, name)


def parse_bytes(text: int | str, *, what: str) -> int:
    """Return the bytes that a number or a string such as `"5GB"` or `"256MiB"` means; raise ValueError if below 1."""
    size = str(text).strip().upper()
    unit = next((unit for unit in _UNITS if size.endswith(unit)), "")
    try:
        number = float(size.removesuffix(unit)) * _UNITS.get(unit, 1)
        if not 1 <= number < 2**63:
            raise ValueError
    except ValueError:
        raise ValueError(f"{what} must be a number of bytes such as 500000000 or '500MB', got {text!r}") from None
    return int(number)


def _compiled(key: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(key)
    except (re.error, TypeError) as error:
        raise ValueError(f"{what} key {key!r} is not a regular expression: {error}") from error
