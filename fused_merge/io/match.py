"""What two sources have in common: tensors of one name, and tied weights that only one of them writes out."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch

from fused_merge.io.mergeable import check_mergeable
from fused_merge.io.sources import TensorSource, bits, same_bits
from fused_merge.names import some


class Match(NamedTuple):
    """What two sources have in common."""

    names: tuple[str, ...]  # the tensors both hold, in the order of the first source, tied ones once
    aliases: dict[str, str]  # every further name of either source -> the one of `names` that holds the same bits
    unmatched: tuple[str, ...] = ()  # names that only one of them holds, if these may be

    def resolve(self, name: str) -> str:
        """Return the one of `names` that stands for `name`."""
        return self.aliases.get(name, name)


def match(
    first: TensorSource,  # gives the order of the result
    second: TensorSource,
    *,
    same_dtype: bool = False,  # also require equal dtypes
    any_rows: bool = False,  # accept tensors that differ along dim 0 only, as those of other vocabularies do
    partial: bool = False,  # list the tensors that only one holds instead of refusing them
    ignore: Collection[str] = (),  # names to leave out
) -> Match:
    """Pair the tensors of two sources by name, or raise a ValueError that names those that do not fit.

    A name that only one source holds is accepted if, there, it is bit-equal to a tensor that both hold: tied
    weights that one checkpoint writes out and the other does not. Reads data only to decide that.
    """
    for source in (first, second):
        check_mergeable(source)
    common = [name for name in first if name in second and name not in ignore]
    changed = {name: text for name in common if (text := _difference(name, first, second, same_dtype, any_rows))}
    if changed:
        way_out = "both must be of one architecture" + " and one dtype" * same_dtype
        if all(_rows_apart(first.shape(name), second.shape(name), dims=2) for name in changed):
            way_out = "resize one model to the vocabulary of the other"
        raise ValueError(f"{first.origin} and {second.origin} do not match: {some(changed.values())}; {way_out}")

    names: dict[tuple[str, str], str] = {}
    aliases: dict[str, str] = {}
    for name in common:
        # Tied in both sources: one tensor under its first name.
        owners = (first.aliases.get(name, name), second.aliases.get(name, name))
        if names.setdefault(owners, name) != name:
            aliases[name] = names[owners]

    unmatched: list[str] = []
    faults: list[str] = []
    for here, there in ((first, second), (second, first)):
        extra = [name for name in here if name not in there and name not in ignore]
        aliases |= _find_tied(here, extra, names.values())
        if missing := [name for name in extra if name not in aliases]:
            unmatched += missing
            faults.append(f"{there.origin} lacks {some(map(repr, missing))} of {here.origin}")
    if faults and not partial:
        raise ValueError(f"{'; '.join(faults)}; both must hold the same tensors, tied copies apart")
    return Match(tuple(names.values()), aliases, tuple(unmatched))


def _difference(name: str, first: TensorSource, second: TensorSource, same_dtype: bool, any_rows: bool) -> str | None:
    """Return how the two tensors called `name` differ in kind, or None."""
    shapes = first.shape(name), second.shape(name)
    if shapes[0] != shapes[1] and not (any_rows and _rows_apart(*shapes, dims=1)):
        return f"{name!r} is {list(shapes[0])} and {list(shapes[1])}"
    dtypes = first.dtype(name), second.dtype(name)
    if first.is_merged(name) != second.is_merged(name) or (same_dtype and dtypes[0] != dtypes[1]):
        return f"{name!r} is {dtypes[0]} and {dtypes[1]}"
    return None


def _rows_apart(a: torch.Size, b: torch.Size, *, dims: int) -> bool:
    """Return whether two shapes of at least so many dimensions differ in the number of rows alone."""
    return len(a) == len(b) >= dims and a[1:] == b[1:] and a != b


def _find_tied(source: TensorSource, extra: Collection[str], common: Collection[str]) -> dict[str, str]:
    """Return those `extra` tensors of a source that are tied to one of its `common` ones, and to which."""
    candidates: dict[tuple[object, ...], list[str]] = {}
    for name in common if extra else ():
        candidates.setdefault(_fingerprint(source, name), []).append(name)
    tied = {}
    for name in extra:
        alike = candidates.get(_fingerprint(source, name), ())
        if owner := next((other for other in alike if _are_tied(source, name, other)), None):
            tied[name] = owner
    return tied


def _fingerprint(source: TensorSource, name: str) -> tuple[object, ...]:
    """Return what tied tensors have in common, from the beginning of a tensor alone."""
    head = bits(source.head(name, 1024).contiguous()).cpu().numpy().tobytes()
    return source.shape(name), source.dtype(name), head


def _are_tied(source: TensorSource, name: str, other: str) -> bool:
    """Return whether two tensors of one fingerprint are tied weights, by storage or bit for bit."""
    if source.aliases.get(name, name) == source.aliases.get(other, other):
        return True
    pattern = bits(source[name]).flatten()
    # Fresh norms and biases are constant and equal one another by accident.
    return bool((pattern != pattern[:1]).any()) and same_bits(source[name], source[other])
