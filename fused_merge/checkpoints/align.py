"""Several checkpoints side by side: which tensors they have in common, and where the elements of each lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from fused_merge.checkpoints.plan import AlignedSegment, AlignedTensor
from fused_merge.io.configs import read_config
from fused_merge.io.match import match
from fused_merge.io.sources import FileSource
from fused_merge.names import some


def align(sources: Sequence[FileSource], config_source: int, options: Mapping[str, Any]) -> list[AlignedTensor]:
    """Pair the tensors of n checkpoints by `PlanOptions`, or raise a ValueError that names those that do not fit.

    The first source gives the order and decides which tied weights are written out. `config_source` is the index of
    the one whose configuration and tokenizer go along: the vocabulary has its rows, and it is the first choice for
    tensors that not all hold.
    """
    base, *others = sources
    dtype, unmatched = options["dtype"], options["unmatched"]
    rows, partial = options["align_vocabulary"], unmatched != "refuse"
    matches = [match(base, other, any_rows=rows, partial=partial) for other in others]
    # The name that each tensor of all has in each of them.
    common = {
        name: [name, *(each.resolve(name) for each in matches)]
        for name in base
        if not any(name in each.unmatched for each in matches)
    }
    aligned = [_aligned(names, sources, config_source, dtype) for names in common.values()]
    _check_rows(common, sources)
    if unmatched == "copy":
        known = set(common)
        for i in (config_source, *range(len(sources))):
            # An alias of a tensor that is written is no tensor of its own.
            new = [name for name in sources[i] if name not in known and (i == 0 or name not in matches[i - 1].aliases)]
            known.update(new)
            aligned += [_copied(name, sources[i], dtype) for name in new]
    if not aligned:
        origins = " and ".join(source.origin for source in sources)
        raise ValueError(f"no tensor is in all of {origins}, so that nothing would be written; check the paths")
    left_out = sorted({name for each in matches for name in each.aliases} - {tensor.name for tensor in aligned})
    folder = sources[config_source].path
    if left_out and folder.is_dir() and read_config(folder).get("tie_word_embeddings") is False:
        raise ValueError(
            f"{base.origin} leaves out {left_out[0]!r}, which {folder / 'config.json'} does not tie; "
            "set tie_word_embeddings to true there or write the tensor into the base"
        )
    return aligned


def _aligned(
    names: Sequence[str], sources: Sequence[FileSource], config_source: int, dtype: torch.dtype | None
) -> AlignedTensor:
    """Return a tensor that all hold, each under its own name."""
    name = names[0]
    floating = sources[0].is_merged(name)
    inputs = [source.file_range(own) for source, own in zip(sources, names, strict=True)]
    written = dtype if floating and dtype is not None else inputs[0].dtype
    for source, own in zip(sources, inputs, strict=True):
        if own.dtype != inputs[0].dtype and not (floating and dtype is not None):
            kinds = f"{name!r} is {inputs[0].dtype} in {sources[0].origin} and {own.dtype} in {source.origin}"
            way_out = "say which to write with dtype='bfloat16' or another" if floating else "use one architecture"
            raise ValueError(f"{kinds}; {way_out}")
    shapes = [source.shape(own) for source, own in zip(sources, names, strict=True)]
    shape, fewest = shapes[config_source], min(map(prod, shapes))
    segments = [AlignedSegment(fewest, tuple(inputs), floating)]
    if prod(shape) > fewest:
        own = inputs[config_source]
        beyond = own._replace(offset=own.offset + fewest * own.dtype.itemsize)
        segments.append(AlignedSegment(prod(shape) - fewest, (beyond,), False))
    return AlignedTensor(name, written, tuple(shape), tuple(segments))


def _copied(name: str, source: FileSource, dtype: torch.dtype | None) -> AlignedTensor:
    written = dtype if dtype is not None and source.is_merged(name) else source.dtype(name)
    shape = tuple(source.shape(name))
    return AlignedTensor(name, written, shape, (AlignedSegment(prod(shape), (source.file_range(name),), False),))


def _check_rows(common: Mapping[str, Sequence[str]], sources: Sequence[FileSource]) -> None:
    """Refuse numbers of rows that differ in another way than those of two vocabularies."""
    rows = {}
    for name, names in common.items():
        shapes = [source.shape(own) for source, own in zip(sources, names, strict=True)]
        if len(set(shapes)) > 1:
            rows[name] = tuple(shape[0] for shape in shapes)
    if len(set(rows.values())) > 1:
        listed = (f"{name!r} has {' and '.join(map(str, counts))} rows" for name, counts in rows.items())
        raise ValueError(f"{some(listed)}: these are not two sizes of one vocabulary; resize the models first")
