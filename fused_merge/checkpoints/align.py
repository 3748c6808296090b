"""Several checkpoints side by side: which tensors they have in common, and where the elements of each lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch

from fused_merge.checkpoints.folders import read_config
from fused_merge.checkpoints.plan import OutputFile, PlannedTensor, Rule, Segment, lay_out, shard_by_size
from fused_merge.io.match import Match, match
from fused_merge.io.sources import SINGLE_FILE, FileRange, FileSource
from fused_merge.names import some


class AlignedSegment(NamedTuple):
    """Row-major elements of a tensor that come from the same inputs.

    Attributes:
        numel: number of elements.
        inputs: where they lie in each checkpoint, in the order of the checkpoints, or in the only one that has them.
        merged: whether all checkpoints hold them and they are floating.
    """

    numel: int
    inputs: tuple[FileRange, ...]
    merged: bool


class AlignedTensor(NamedTuple):
    """A tensor of the output; its segments follow one another and fill it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    segments: tuple[AlignedSegment, ...]

    @property
    def merged(self) -> bool:
        """Whether all checkpoints hold it and it is floating; rows beyond a common vocabulary are copied even so."""
        return self.segments[0].merged


def align(sources: Sequence[FileSource], config_source: int, options: Mapping[str, Any]) -> list[AlignedTensor]:
    """Pair the tensors of n checkpoints and verify that they fit.

    Args:
        sources: the checkpoints; the first one gives the order and decides which tied weights are written out.
        config_source: the index of the checkpoint whose configuration and tokenizer go along. It decides how many
            rows the tensors of the vocabulary have, and is the first choice for tensors that not all checkpoints hold.
        options: as `resolve` returned them for `PlanOptions`.

    Raises:
        ValueError: for tensors that do not fit; the sentence names them.
    """
    base, *others = sources
    dtype, unmatched = options["dtype"], options["unmatched"]
    matches = [
        match(base, other, any_rows=options["align_vocabulary"], partial=unmatched != "refuse") for other in others
    ]
    names = [name for name in base if not any(name in each.unmatched for each in matches)]
    aligned = [_aligned(name, sources, matches, config_source, dtype) for name in names]
    _check_rows(aligned, sources, matches)
    if unmatched == "copy":
        known = set(names)
        aliases: list[Mapping[str, str]] = [{}, *(each.aliases for each in matches)]
        for i in (config_source, *range(len(sources))):
            for name in sources[i]:
                # An alias of a tensor that is written is no tensor of its own.
                if name not in known and name not in aliases[i]:
                    known.add(name)
                    aligned.append(_copied(name, sources[i], dtype))
    if not aligned:
        origins = " and ".join(source.origin for source in sources)
        raise ValueError(f"no tensor is in all of {origins}, so that nothing would be written; check the paths")
    left_out = sorted({name for each in matches for name in each.aliases} - {tensor.name for tensor in aligned})
    _check_tied_config(left_out, sources[config_source], base)
    return aligned


def lay_out_files(
    tensors: Sequence[AlignedTensor],
    base: FileSource,
    rule_of: Callable[[AlignedTensor, AlignedSegment], Rule],
    max_shard_size: int | None,
) -> list[OutputFile]:
    """Distribute tensors over files as `base` does, or by size, and give each its place.

    Args:
        tensors: the tensors of the output.
        base: the checkpoint whose files are mirrored; tensors that it lacks go to its last file.
        rule_of: decides how the elements of a segment are made.
        max_shard_size: size limit of a file in bytes; None mirrors `base`.
    """
    planned = [
        PlannedTensor(
            tensor.name,
            tensor.dtype,
            tensor.shape,
            tuple(
                Segment(tensor.name, tensor.dtype, each.numel, each.inputs, rule_of(tensor, each))
                for each in tensor.segments
            ),
        )
        for tensor in tensors
    ]
    if max_shard_size is not None:
        return [
            lay_out(name, shard, {"format": "pt"}) for name, shard in shard_by_size(planned, max_shard_size).items()
        ]
    file_of = {name: file for file, names in base.shards.items() for name in names}
    last = list(base.shards)[-1]
    shards: dict[str, list[PlannedTensor]] = {file: [] for file in base.shards}
    for tensor in planned:
        shards[file_of.get(tensor.name, last)].append(tensor)
    return [
        lay_out(file if base.index is not None else SINGLE_FILE, shard, {"format": "pt", **base.metadata(file)})
        for file, shard in shards.items()
        if shard
    ]


def _aligned(
    name: str, sources: Sequence[FileSource], matches: Sequence[Match], config_source: int, dtype: torch.dtype | None
) -> AlignedTensor:
    stored = _stored_names(name, matches)
    floating = sources[0].is_merged(name)
    dtypes = [source.dtype(own) for source, own in zip(sources, stored, strict=True)]
    if dtype is None or not floating:
        if other := next((i for i, each in enumerate(dtypes) if each != dtypes[0]), None):
            raise ValueError(
                f"{sources[0].origin} and {sources[other].origin} do not match: {name!r} is {dtypes[0]} and "
                f"{dtypes[other]}; say which to write with dtype='bfloat16' or another"
                if floating
                else f"{name!r} is {dtypes[0]} in {sources[0].origin} and {dtypes[other]} in {sources[other].origin}; "
                "both must be of one architecture"
            )
        written = dtypes[0]
    else:
        written = dtype
    shapes = [source.shape(own) for source, own in zip(sources, stored, strict=True)]
    file_ranges = [source.file_range(own) for source, own in zip(sources, stored, strict=True)]
    shape = shapes[config_source]
    common = min(prod(each) for each in shapes)
    segments = [AlignedSegment(common, tuple(file_ranges), floating)]
    if prod(shape) > common:
        own = file_ranges[config_source]
        beyond = own._replace(offset=own.offset + common * own.dtype.itemsize)
        segments.append(AlignedSegment(prod(shape) - common, (beyond,), False))
    return AlignedTensor(name, written, tuple(shape), tuple(segments))


def _copied(name: str, source: FileSource, dtype: torch.dtype | None) -> AlignedTensor:
    stored = source.dtype(name)
    written = dtype if dtype is not None and source.is_merged(name) else stored
    shape = tuple(source.shape(name))
    return AlignedTensor(name, written, shape, (AlignedSegment(prod(shape), (source.file_range(name),), False),))


def _stored_names(name: str, matches: Sequence[Match]) -> list[str]:
    """Return the name that a tensor of the first checkpoint has in each of them."""
    return [name, *(each.resolve(name) for each in matches)]


def _check_rows(tensors: Sequence[AlignedTensor], sources: Sequence[FileSource], matches: Sequence[Match]) -> None:
    """Refuse numbers of rows that differ in another way than those of two vocabularies."""
    rows = {}
    for tensor in tensors:
        stored = _stored_names(tensor.name, matches)
        counts = tuple(source.shape(own)[:1] for source, own in zip(sources, stored, strict=True))
        if len(set(counts)) > 1:
            rows[tensor.name] = tuple(count[0] for count in counts)
    if len(set(rows.values())) > 1:
        listed = (f"{name!r} has {' and '.join(map(str, counts))} rows" for name, counts in rows.items())
        raise ValueError(f"{some(listed)}: these are not two sizes of one vocabulary; resize the models first")


def _check_tied_config(left_out: Sequence[str], config_source: FileSource, base: FileSource) -> None:
    """Refuse an output whose configuration would ask for a tied weight that it leaves out."""
    folder = config_source.path
    if left_out and folder.is_dir() and read_config(folder).get("tie_word_embeddings") is False:
        raise ValueError(
            f"{base.origin} leaves out {left_out[0]!r}, which {folder / 'config.json'} does not tie; "
            "set tie_word_embeddings to true there or write the tensor into the base"
        )
