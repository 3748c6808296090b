"""Tensors put together from boxes of other tensors, and read as lazily as those.

A tensor that packs the experts of a layer consists of one box for each of theirs; a renamed one of a single box. A box
of such a tensor is read from the boxes that it touches and from nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fused_merge.distributed import Fragment
from fused_merge.io.sources import FileRange, TensorSource, whole_box

# One slice for each dimension; None for a dimension of size 1 that a tensor lacks and its counterpart has.
Box: TypeAlias = "tuple[slice | None, ...]"


class Piece(NamedTuple):
    """A box of a tensor, and the box of a named tensor that fills it: of one size in every dimension of both."""

    box: Box
    name: str
    source: Box

    def within(self, cut: Box) -> Piece | None:
        """Return the part of this piece that lies in a box of its tensor, or None if there is none."""
        box: list[slice | None] = []
        source: list[slice | None] = []
        cuts = iter(cut)
        for here, there in zip(self.box, self.source, strict=True):
            if here is not None and (limits := next(cuts)) is not None:
                start, stop = max(here.start, limits.start), min(here.stop, limits.stop)
                if start >= stop:
                    return None
                there = there and slice(there.start + start - here.start, there.start + stop - here.start)
                here = slice(start, stop)
            box.append(here)
            source.append(there)
        return Piece(tuple(box), self.name, tuple(source))


class Assembly:
    """A tensor that is put together from pieces: what torch makes of whole tensors, before any of them is read.

    It takes part in `torch.stack`, `torch.cat`, `torch.chunk` and `torch.split`, of which Transformers makes its
    conversions; any other function raises TypeError.
    """

    def __init__(self, shape: Sequence[int], pieces: Sequence[Piece]) -> None:
        self.shape, self.pieces = torch.Size(shape), tuple(pieces)

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> Assembly:
        """Return a tensor that is another one."""
        return cls(shape, [Piece(whole_box(shape), name, whole_box(shape))])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in _FUNCTIONS:
            raise TypeError(f"{function.__name__} is no rearrangement of boxes")
        return _FUNCTIONS[function](*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        """The tensors that it is made of."""
        return list(dict.fromkeys(piece.name for piece in self.pieces))

    @property
    def is_full(self) -> bool:
        """Whether its pieces fill it, which do not overlap."""
        sizes = (prod(side.stop - side.start for side in filter(None, piece.box)) for piece in self.pieces)
        return bool(sum(sizes) == prod(self.shape))

    def renamed(self, source: TensorSource) -> str | None:
        """Return the tensor of `source` that this is, None if it is only a part of one or made of several."""
        piece = self.pieces[0]
        whole = len(self.pieces) == 1 and piece.box == piece.source == whole_box(self.shape)
        return piece.name if whole and source.shape(piece.name) == self.shape else None

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or the size of a dimension."""
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> Assembly:
        """Return this: strides mean nothing here."""
        return self

    def narrow(self, dim: int, start: int, size: int) -> Assembly:
        """Return the elements from `start` on in one dimension."""
        cut = [slice(0, n) for n in self.shape]
        cut[dim] = slice(start, start + size)
        shape = [*self.shape]
        shape[dim] = size
        parts = filter(None, (piece.within(tuple(cut)) for piece in self.pieces))
        return Assembly(shape, [part._replace(box=_moved(part.box, dim, -start)) for part in parts])


def _moved(box: Box, dim: int, by: int) -> Box:
    return (*box[:dim], slice(box[dim].start + by, box[dim].stop + by), *box[dim + 1 :])  # type: ignore[union-attr]


def _stack(tensors: Sequence[Assembly], dim: int = 0) -> Assembly:
    (shape,) = {tensor.shape for tensor in tensors}
    dim %= len(shape) + 1
    pieces = [
        Piece((*p.box[:dim], slice(i, i + 1), *p.box[dim:]), p.name, (*p.source[:dim], None, *p.source[dim:]))
        for i, tensor in enumerate(tensors)
        for p in tensor.pieces
    ]
    return Assembly((*shape[:dim], len(tensors), *shape[dim:]), pieces)


def _cat(tensors: Sequence[Assembly], dim: int = 0) -> Assembly:
    dim %= len(tensors[0].shape)
    starts = accumulate((tensor.shape[dim] for tensor in tensors), initial=0)
    pieces = [
        p._replace(box=_moved(p.box, dim, start))
        for tensor, start in zip(tensors, starts, strict=False)
        for p in tensor.pieces
    ]
    shape = [*tensors[0].shape]
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return Assembly(shape, pieces)


def _split(tensor: Assembly, sizes: int | Sequence[int], dim: int = 0) -> tuple[Assembly, ...]:
    dim %= len(tensor.shape)
    if isinstance(sizes, int):
        sizes = [min(sizes, tensor.shape[dim] - start) for start in range(0, tensor.shape[dim], sizes)]
    starts = accumulate(sizes, initial=0)
    return tuple(tensor.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=False))


def _chunk(tensor: Assembly, chunks: int, dim: int = 0) -> tuple[Assembly, ...]:
    return _split(tensor, -(-tensor.shape[dim] // chunks), dim)


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **{torch.stack: _stack, torch.cat: _cat, torch.split: _split, torch.chunk: _chunk},
}


class Conversion(NamedTuple):
    """A tensor that only whole ones make: transposed or permuted."""

    shape: torch.Size
    names: tuple[str, ...]
    convert: Callable[[Mapping[str, Tensor]], Tensor]


class ViewSource(TensorSource):
    """The tensors of a source under other names, put together anew."""

    def __init__(
        self,
        source: TensorSource,
        tensors: Mapping[str, Assembly | Conversion],
        *,
        buffers: Collection[str] = (),
        ordered: bool = False,
    ) -> None:
        self.source, self.tensors, self.ordered = source, tensors, ordered
        self.origin, self.buffers = source.origin, frozenset(buffers)
        self._kinds = {}
        for name, tensor in tensors.items():
            dtypes = {source.dtype(part) for part in tensor.names}
            if len(dtypes) > 1:
                listed = " and ".join(sorted(map(str, dtypes)))
                raise ValueError(f"{name!r} of {source.origin} is made of {listed}; give its tensors one dtype")
            self._kinds[name] = (tensor.shape, dtypes.pop())
        renamed = {
            own: name
            for name, tensor in tensors.items()
            if isinstance(tensor, Assembly) and (own := tensor.renamed(source)) is not None
        }
        tied = ((name, source.aliases.get(own)) for own, name in renamed.items())
        self.aliases = {name: renamed[owner] for name, owner in tied if owner in renamed}

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the source."""
        return self.source.config

    def __getitem__(self, name: str) -> Tensor:
        return self.box(name, None)

    def fragment(self, name: str) -> Fragment | None:
        """Return what this process holds of a sharded tensor; ValueError for one that is put together from such."""
        tensor = self.tensors[name]
        if isinstance(tensor, Assembly) and (same := tensor.renamed(self.source)) is not None:
            return self.source.fragment(same)
        if sharded := [part for part in tensor.names if self.source.fragment(part) is not None]:
            raise ValueError(
                f"{name!r} of {self.origin} would be put together from {sharded[0]!r}, which is sharded; "
                "pass the module itself, or a path"
            )
        return None

    def box(self, name: str, box: tuple[slice, ...] | None) -> Tensor:
        """Return a box of a tensor, None for all of it, reading nothing else."""
        tensor = self.tensors[name]
        if isinstance(tensor, Conversion):
            made = tensor.convert({part: self.source[part] for part in tensor.names})
            return made if box is None else made[box]
        if (same := tensor.renamed(self.source)) is not None:
            return self.source.box(same, box)
        given = [slice(*side.indices(size)[:2]) for side, size in zip(box or (), tensor.shape, strict=False)]
        cut = (*given, *whole_box(tensor.shape)[len(given) :])
        filled = torch.empty([side.stop - side.start for side in cut], dtype=self.dtype(name))
        for part in filter(None, (piece.within(cut) for piece in tensor.pieces)):
            sides = zip(filter(None, part.box), cut, strict=True)
            target = filled[tuple(slice(side.start - c.start, side.stop - c.start) for side, c in sides)]
            target.copy_(self.source.box(part.name, tuple(filter(None, part.source))).reshape(target.shape))
        return filled

    def files(self) -> tuple[Path, ...]:
        """Return the files behind the source."""
        return self.source.files()

    def ranges(self, name: str) -> list[tuple[FileRange, int]] | None:
        """Return where row-major elements lie and how many, range after range; None if they do not lie in ranges."""
        tensor = self.tensors[name]
        found: dict[int, tuple[FileRange, int]] = {}
        for piece in () if isinstance(tensor, Conversion) else tensor.pieces:
            here = _flat(piece.box, tensor.shape)
            there = _flat(piece.source, self.source.shape(piece.name))
            lies = self.source.ranges(piece.name)
            if here is None or there is None or lies is None or len(lies) != 1:
                return None
            place = lies[0][0]
            found[here.start] = place._replace(offset=place.offset + there.start * place.dtype.itemsize), len(there)
        return [found[start] for start in sorted(found)] or None


def _flat(box: Box, shape: Sequence[int]) -> range | None:
    """Return the row-major indices of a box, None if they do not follow one another."""
    start, stride, numel, whole = 0, 1, 1, True
    for side, size in zip(reversed([*filter(None, box)]), reversed(shape), strict=True):
        length = side.stop - side.start
        if not whole and length != 1:
            return None
        start, stride, numel = start + side.start * stride, stride * size, numel * length
        whole = whole and length == size
    return range(start, start + numel)
