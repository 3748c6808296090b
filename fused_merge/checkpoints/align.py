"""Several checkpoints side by side: which tensors they have in common, and where the elements of each lie."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any, NamedTuple

import torch

from fused_merge.checkpoints.plan import AlignedSegment, AlignedTensor
from fused_merge.io.match import match
from fused_merge.io.options import OutputOptions
from fused_merge.io.sources import FileRange, FileSource, TensorSource
from fused_merge.io.ties import ties
from fused_merge.names import kind_of, layer_of
from fused_merge.options import select


class Alignment(NamedTuple):
    """What several checkpoints have in common."""

    tensors: list[AlignedTensor]
    fitting: list[
        int
    ]  # the checkpoints whose tensors have the shapes of the output: those that its tokenizer may be of
    config_values: dict[str, Any]  # what the configuration of the output has to say


def align(sources: Sequence[FileSource], config_source: int, options: Mapping[str, Any]) -> Alignment:
    """Pair the tensors of n checkpoints by `PlanOptions`, or raise a ValueError that names those that do not fit.

    The first source gives the order and decides which tied weights are written out: those that it holds, and those that
    another one has of its own. `config_source` is the index of the one whose configuration goes along: the vocabulary
    has its rows, and it is the first choice for tensors that not all hold.
    """
    base, *others = sources
    dtype, pairing = options["dtype"], select(options, OutputOptions)
    matches = [match(base, other, **pairing) for other in others]
    views = [base, *(each.second for each in matches)]
    # The name that each tensor of all has in each of the views.
    common: dict[str, list[str]] = {}
    for name in dict.fromkeys((*base, *(name for each in matches for name in each.untied))):
        if all(name in each.pairs for each in matches):
            own = [each.pairs[name][1] for each in matches]
            common[name] = [matches[0].pairs[name][0] if matches else name, *own]
            continue
        own = [name if name in base else next(e.pairs[name][0] for e in matches if name in e.pairs)]
        for each in matches:
            # A model that ties it, as the base does, has its embedding instead.
            found = each.pairs.get(each.resolve(name)) or each.pairs.get(each.resolve(own[0]))
            own += [] if found is None else [found[1]]
        if len(own) == len(sources):
            common[name] = own
    aligned = [_aligned(name, own, views, config_source, dtype) for name, own in common.items()]
    fitting = list(range(len(views)))
    if options["align_vocabulary"]:
        fitting = [
            i
            for i, view in enumerate(views)
            if all(tuple(view.shape(common[tensor.name][i])) == tensor.shape for tensor in aligned)
        ]
    kinds = [(kind_of(each.name), each.shape) for each in aligned if len(each.shape) == 2 and not layer_of(each.name)]
    has_head = bool(
        {shape for kind, shape in kinds if kind == "head"} & {s for kind, s in kinds if kind == "embeddings"}
    )
    # Where one model ties its head and another does not, the output does not, since it has both.
    untied = has_head and (
        any(each.untied for each in matches) or {ties(source) for source in sources} >= {True, False}
    )
    if options["unmatched"] == "copy":
        known = set(common)
        for i in (config_source, *range(len(sources))):
            # An alias of a tensor that is written is no tensor of its own.
            aliases = matches[i - 1].aliases if i else {}
            new = [name for name in views[i] if name not in known and name not in aliases]
            known.update(new)
            aligned += [_copied(name, views[i], dtype) for name in new]
    return Alignment(aligned, fitting, {"tie_word_embeddings": False} if untied else {})


def _aligned(
    name: str, names: Sequence[str], views: Sequence[TensorSource], config_source: int, dtype: torch.dtype | None
) -> AlignedTensor:
    """Return a tensor that all hold, each under its own name."""
    kinds = [view.kind(own) for view, own in zip(views, names, strict=True)]
    (shape, written), numel = kinds[config_source], prod(kinds[config_source][0])
    floating = views[0].is_merged(names[0])
    if floating and dtype is not None:
        written = dtype
    elif (odd := next((i for i, kind in enumerate(kinds) if kind[1] != kinds[0][1]), None)) is not None:
        apart = f"{name!r} is {kinds[0][1]} in {views[0].origin} and {kinds[odd][1]} in {views[odd].origin}"
        way_out = "say which to write with dtype='bfloat16' or another" if floating else "use one architecture"
        raise ValueError(f"{apart}; {way_out}")
    files = [view for view in views if isinstance(view, FileSource)]
    if kinds.count(kinds[0]) == len(kinds) == len(files):
        # So it is nearly always, and there may be hundreds of thousands.
        whole = AlignedSegment(numel, tuple(map(FileSource.file_range, files, names)), floating)
        return AlignedTensor(name, written, tuple(shape), (whole,))
    inputs = [_ranges(view, own) for view, own in zip(views, names, strict=True)]
    fewest = min([numel, *(prod(each) for each, _ in kinds if each != shape)])
    segments = [AlignedSegment(n, places, floating) for n, places in _together(inputs, 0, fewest)]
    if numel > fewest:
        beyond = _together([inputs[config_source]], fewest, numel)
        segments += [AlignedSegment(n, places, False) for n, places in beyond]
    return AlignedTensor(name, written, tuple(shape), tuple(segments))


def _copied(name: str, view: TensorSource, dtype: torch.dtype | None) -> AlignedTensor:
    written = dtype if dtype is not None and view.is_merged(name) else view.dtype(name)
    shape = tuple(view.shape(name))
    segments = (
        AlignedSegment(numel, places, False) for numel, places in _together([_ranges(view, name)], 0, prod(shape))
    )
    return AlignedTensor(name, written, shape, tuple(segments))


def _ranges(view: TensorSource, name: str) -> list[tuple[FileRange, int]]:
    ranges = view.ranges(name)
    assert ranges is not None, f"{name} of {view.origin} was paired without ranges"
    return ranges


def _together(
    inputs: Sequence[Sequence[tuple[FileRange, int]]], first: int, last: int
) -> Iterator[tuple[int, tuple[FileRange, ...]]]:
    """Yield how many elements follow one another in all inputs, and where, from one element of a tensor to another."""
    if first == 0 and all(len(ranges) == 1 for ranges in inputs):
        # So it is, but for tensors that one of the models packs.
        yield last, tuple(ranges[0][0] for ranges in inputs)
        return
    ends = [list(accumulate(numel for _, numel in ranges)) for ranges in inputs]
    cuts = sorted({first, last, *(end for own in ends for end in own if first < end < last)})
    for start, stop in pairwise(cuts):
        places = []
        for ranges, own in zip(inputs, ends, strict=True):
            i = bisect_right(own, start)
            place, numel = ranges[i]
            places.append(place._replace(offset=place.offset + (start - own[i] + numel) * place.dtype.itemsize))
        yield stop - start, tuple(places)
