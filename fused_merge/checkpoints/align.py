"""Several checkpoints side by side: which tensors they have in common, and where the elements of each lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch

from fused_merge.checkpoints.folders import read_config
from fused_merge.checkpoints.plan import OutputFile, PlannedTensor, Rule, Segment, lay_out, shard_by_size
from fused_merge.io.match import Match, match
from fused_merge.io.sources import SINGLE_FILE, FileRange, FileSource
from fused_merge.names import some
from fused_merge.options import check_choice

UNMATCHED = ("refuse", "copy", "drop")


class Span(NamedTuple):
    """Row-major elements of a tensor that come from the same inputs.

    Attributes:
        numel: how many.
        inputs: where they lie in each checkpoint, in their order; in one only, if the others lack them.
        merged: whether all checkpoints hold them and they are floating.
    """

    numel: int
    inputs: tuple[FileRange, ...]
    merged: bool


class AlignedTensor(NamedTuple):
    """A tensor of the output; its spans follow one another and fill it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    spans: tuple[Span, ...]


def align(
    sources: Sequence[FileSource],
    *,
    leader: int,
    dtype: torch.dtype | None,
    unmatched: str,
    align_vocabulary: bool,
) -> list[AlignedTensor]:
    """Pair the tensors of n checkpoints and verify that they fit.

    Args:
        sources: the first gives the order and says which tied weights are written out.
        leader: the index of the one whose configuration and tokenizer go along: it decides how many rows the
            tensors of the vocabulary have, and is first asked for what not all of them hold.
        dtype: of the floating tensors of the output; None is that of the inputs, which must then agree.
        unmatched: what becomes of tensors that only some hold: `"refuse"`, `"copy"` or `"drop"`.
        align_vocabulary: accept tensors with other numbers of rows: rows beyond the fewest are the leader's.

    Raises:
        ValueError: for tensors that do not fit, or an unknown choice; the sentence names them.
    """
    check_choice("unmatched", unmatched, UNMATCHED)
    base, *others = sources
    matches = [match(base, other, any_rows=align_vocabulary, partial=unmatched != "refuse") for other in others]
    names = [name for name in base if not any(name in each.unmatched for each in matches)]
    aligned = [_aligned(name, sources, matches, leader, dtype) for name in names]
    _check_rows(aligned, sources, matches)
    if unmatched == "copy":
        known = set(names)
        further: list[Mapping[str, str]] = [{}, *(each.aliases for each in matches)]
        for i in (leader, *range(len(sources))):
            for name in sources[i]:
                # A further name of a tensor that is written is no tensor of its own.
                if name not in known and name not in further[i]:
                    known.add(name)
                    aligned.append(_copied(name, sources[i], dtype))
    if not aligned:
        origins = " and ".join(source.origin for source in sources)
        raise ValueError(f"no tensor is in all of {origins}, so that nothing would be written; check the paths")
    left_out = sorted({name for each in matches for name in each.aliases} - {tensor.name for tensor in aligned})
    _check_tied_config(left_out, sources[leader], base)
    return aligned


def lay_out_files(
    tensors: Sequence[AlignedTensor],
    base: FileSource,
    rule_of: Callable[[AlignedTensor, Span], Rule],
    max_shard_size: int | None,
) -> list[OutputFile]:
    """Distribute tensors over files as `base` does, or by size, and give each its place.

    Args:
        tensors: of the output.
        base: whose files are mirrored; what it lacks goes to its last file.
        rule_of: decides how the elements of a span are made.
        max_shard_size: bytes; None mirrors.
    """
    planned = [
        PlannedTensor(
            tensor.name,
            tensor.dtype,
            tensor.shape,
            tuple(
                Segment(tensor.name, tensor.dtype, span.numel, span.inputs, rule_of(tensor, span))
                for span in tensor.spans
            ),
        )
        for tensor in tensors
    ]
    if max_shard_size is not None:
        return [
            lay_out(name, shard, {"format": "pt"}) for name, shard in shard_by_size(planned, max_shard_size).items()
        ]
    home = {name: file for file, names in base.shards.items() for name in names}
    last = list(base.shards)[-1]
    shards: dict[str, list[PlannedTensor]] = {file: [] for file in base.shards}
    for tensor in planned:
        shards[home.get(tensor.name, last)].append(tensor)
    return [
        lay_out(file if base.index is not None else SINGLE_FILE, shard, {"format": "pt", **base.metadata(file)})
        for file, shard in shards.items()
        if shard
    ]


def _aligned(
    name: str, sources: Sequence[FileSource], matches: Sequence[Match], leader: int, dtype: torch.dtype | None
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
    shape = shapes[leader]
    common = min(prod(each) for each in shapes)
    spans = [Span(common, tuple(file_ranges), floating)]
    if prod(shape) > common:
        own = file_ranges[leader]
        beyond = own._replace(offset=own.offset + common * own.dtype.itemsize)
        spans.append(Span(prod(shape) - common, (beyond,), False))
    return AlignedTensor(name, written, tuple(shape), tuple(spans))


def _copied(name: str, source: FileSource, dtype: torch.dtype | None) -> AlignedTensor:
    stored = source.dtype(name)
    written = dtype if dtype is not None and source.is_merged(name) else stored
    shape = tuple(source.shape(name))
    return AlignedTensor(name, written, shape, (Span(prod(shape), (source.file_range(name),), False),))


def _stored_names(name: str, matches: Sequence[Match]) -> list[str]:
    """Return what a tensor of the first checkpoint is called in each of them."""
    return [name, *(each.resolve(name) for each in matches)]


def _check_rows(tensors: Sequence[AlignedTensor], sources: Sequence[FileSource], matches: Sequence[Match]) -> None:
    """Refuse numbers of rows that differ otherwise than two vocabularies do."""
    rows = {}
    for tensor in tensors:
        stored = _stored_names(tensor.name, matches)
        counts = tuple(source.shape(own)[:1] for source, own in zip(sources, stored, strict=True))
        if len(set(counts)) > 1:
            rows[tensor.name] = tuple(count[0] for count in counts)
    if len(set(rows.values())) > 1:
        listed = (f"{name!r} has {' and '.join(map(str, counts))} rows" for name, counts in rows.items())
        raise ValueError(f"{some(listed)}: these are not two sizes of one vocabulary; resize the models first")


def _check_tied_config(left_out: Sequence[str], leader: FileSource, base: FileSource) -> None:
    """Refuse an output whose configuration would ask for a tied weight that it leaves out."""
    if left_out and leader.path.is_dir() and read_config(leader.path).get("tie_word_embeddings") is False:
        raise ValueError(
            f"{base.origin} leaves out {left_out[0]!r}, which {leader.path / 'config.json'} does not tie; "
            "set tie_word_embeddings to true there or write the tensor into the base"
        )
