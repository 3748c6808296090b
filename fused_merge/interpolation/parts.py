"""The part of a network that a tensor belongs to, guessed from its name.

`model.layers.7.self_attn.q_proj.weight` is attention in layer 7. No weight is read.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, takewhile
from operator import eq

from fused_merge.names import OUTSIDE, is_outside, kind_of, layer_of, list_and_layer, some
from fused_merge.per_tensor import match_keys

# The order of several stacks, which the order of names in a file does not tell: towers feed encoders, and these
# decoders. The first component that matches decides, as in `decoder.bert.encoder.layer`; a stack without one is third.
_STACKS = ((0, r"\w*(vision|visual|image|audio)\w*"), (1, r"\w*encoder\w*"), (3, r"\w*decoder\w*"))


def slices_by_depth(
    names: Sequence[str], count: int, boundaries: Sequence[int] | None, outside: Mapping[str, int]
) -> dict[str, list[str]]:
    """Cut a network into parts of consecutive layers, label -> names, the lowest first; see `LayerRatios.by_parts`."""
    for key, part in outside.items():
        if part not in range(-count, count):
            raise ValueError(
                f"outside puts {key!r} into part {part!r}, but parts are 0 to {count - 1}, or -1 for the last"
            )
    keys = {key: part for key, part in outside.items() if key not in OUTSIDE}
    try:
        key_of = match_keys(keys, names, what="part", partial=True)
    except ValueError as error:
        raise ValueError(f"outside takes {', '.join(map(repr, OUTSIDE))} and names, but {error}") from error
    places = {name: place for name in names if name not in key_of and (place := list_and_layer(name)) is not None}
    stacks = _stacks(places.values())
    if not stacks:
        raise ValueError(
            f"no name is that of a numbered layer, such as 'layers.0.weight', but {some(map(repr, names))}; "
            "use by_patterns or per_tensor"
        )
    depth = sum(map(len, stacks.values()))
    firsts = _firsts(depth, count, boundaries)
    of_kind = {"embeddings": 0, "head": -1, **outside}
    parts: list[list[str]] = [[] for _ in range(count)]
    unplaced = []
    for name in names:
        if name in key_of:
            part = keys[key_of[name]]
        elif name in places:
            stack, number = places[name]
            part = bisect_right(firsts, stacks[stack][number]) - 1
        elif (kind := kind_of(name)) in of_kind:
            part = of_kind[kind]
        elif kind == "norm":
            part = bisect_right(firsts, stacks[_nearest(name, stacks)][-1]) - 1
        else:
            unplaced.append(repr(name))
            continue
        parts[int(part)].append(name)
    if unplaced:
        others = f", nor {some(unplaced[1:])}" if len(unplaced) > 1 else ""
        raise ValueError(
            f"cannot tell where {unplaced[0]} belongs{others}: it is in no list of layers, and not called like "
            f"embeddings, a norm or a head; give its part with outside={{{unplaced[0]}: 0}}, or use by_patterns"
        )
    lasts = [first - 1 for first in [*firsts[1:], depth]]
    labels = [f"layers {a}-{b}" if a < b else f"layer {b}" for a, b in zip(firsts, lasts, strict=True)]
    return dict(zip(labels, parts, strict=True))


def summarize(names: Iterable[str]) -> list[str]:
    """Return what a part holds, in a few words: lists with the numbers of their layers, then modules."""
    lists: dict[str, set[int]] = {}
    modules: dict[str, None] = {}
    for name in names:
        if place := layer_of(name):
            lists.setdefault(place[0], set()).add(place[1])
        else:
            components = name.split(".")
            # `bert.embeddings` and not each of the modules in it.
            telling = (i for i, component in enumerate(components, 1) if is_outside(component))
            modules[".".join(components[: next(telling, max(len(components) - 1, 1))])] = None
    return [f"{stack} {_ranges(numbers)}".strip() for stack, numbers in lists.items()] + [*modules]


def _stacks(places: Iterable[tuple[str, int]]) -> dict[str, range]:
    """Return the layers of each stack, counted through all stacks in their order."""
    depths: dict[str, int] = {}
    for stack, number in places:
        depths[stack] = max(depths.get(stack, 0), number + 1)
    stacks: dict[str, range] = {}
    first = 0
    for stack in sorted(depths, key=lambda stack: (_rank(stack), stack)):
        stacks[stack] = range(first, first + depths[stack])
        first += depths[stack]
    return stacks


def _rank(stack: str) -> int:
    ranks = (rank for part in stack.split(".") for rank, p in _STACKS if re.fullmatch(p, part, re.IGNORECASE))
    return next(ranks, 2)


def _nearest(name: str, stacks: Mapping[str, range]) -> str:
    """Return the stack that shares most of its path with a final norm; of several one beside it, else the last."""
    path = name.split(".")[:-1]
    found, best = "", (-1, False)
    for stack in stacks:
        other = stack.split(".")
        if (shared := (sum(takewhile(bool, map(eq, path, other))), path[:-1] == other[:-1])) >= best:
            found, best = stack, shared
    return found


def _firsts(depth: int, count: int, boundaries: Sequence[int] | None) -> list[int]:
    """Return the first layer of each part."""
    if count > depth:
        raise ValueError(f"{count} parts need as many layers, and there are {depth}; give fewer ratios")
    if boundaries is None:
        return [-(-part * depth // count) for part in range(count)]
    given = list(boundaries) if isinstance(boundaries, Iterable) else []
    firsts = [0, *(int(layer) for layer in given if layer in range(1, depth))]
    if len(firsts) != count or len(given) != count - 1 or firsts != sorted(set(firsts)):
        raise ValueError(
            f"boundaries must be the first layers of all parts but the first, {count - 1} rising numbers from 1 to "
            f"{depth - 1}, got {boundaries!r}"
        )
    return firsts


def _ranges(numbers: Iterable[int]) -> str:
    """Return "0-3+7" for 0, 1, 2, 3 and 7."""
    runs = groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    ends = ([number for _, number in run] for _, run in runs)
    return "+".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in ends)
