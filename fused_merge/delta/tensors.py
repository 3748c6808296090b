"""Where the tensors of a reference delta come from: two checkpoints; `in_memory` and `file` have the other sources."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_merge.distributed import ALONE, Fragment, Processes
from fused_merge.eager.precision import compute_dtype
from fused_merge.eager.sparse import SparseTensor
from fused_merge.eager.sparsify import SPARSIFY
from fused_merge.io.match import has_first_rows, match
from fused_merge.io.sources import PathLike, TensorSource, open_files, whole_box


class TensorSpec(NamedTuple):
    """Dtype and shape of one tensor of tau."""

    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return self.shape.numel() * self.dtype.itemsize


class Sparsity(NamedTuple):
    """How tau was sparsified: F, a key of SPARSIFY; p, the share of elements it keeps; the seed of random masks."""

    method: str
    reserve_rate: float
    seed: int

    @classmethod
    def checked(cls, method: str | None, reserve_rate: float, seed: int) -> Sparsity:
        """Return a sparsity, or raise ValueError for an unknown method or a rate out of range."""
        if method is None or method == "none" or method not in SPARSIFY:
            choices = " or ".join(repr(name) for name in SPARSIFY if name != "none")
            raise ValueError(f"method must be {choices}, got {method!r}")
        if not 0.0 < reserve_rate <= 1.0:
            raise ValueError(f"reserve_rate must lie in (0, 1], got {reserve_rate}")
        return cls(method, float(reserve_rate), seed)

    def __str__(self) -> str:
        seed = f", seed={self.seed}" if self.method == "random" else ""
        return f"method={self.method!r}, reserve_rate={self.reserve_rate}{seed}"


class Part(NamedTuple):
    """A box of a tensor or, as a vector, some of the row-major elements of the box."""

    box: tuple[slice, ...]
    elements: slice | None = None

    @classmethod
    def all(cls, shape: torch.Size) -> Part:
        """Return the part that is all of a tensor."""
        return cls(whole_box(shape))

    @classmethod
    def first(cls, shape: torch.Size, n: int) -> Part:
        """Return the first `n` row-major elements of a tensor, or all."""
        return cls(whole_box(shape), slice(0, min(n, shape.numel())))

    @classmethod
    def of(cls, name: str, shape: torch.Size, fragment: Fragment) -> Part:
        """Return what a fragment of a parameter is of its tau, which perhaps has fewer rows.

        Raises ValueError if the parameter has another shape.
        """
        whole = torch.Size(fragment.shard.shape)
        if whole != shape and not has_first_rows(shape, whole):
            raise ValueError(
                f"{name!r} has a reference delta of {list(shape)} and a part of {list(whole)} is asked for; "
                "train the model that the delta was made of"
            )
        box, elements = fragment.box, fragment.elements
        if whole != shape:
            start, stop = (min(end, shape[0]) for end in (box[0].start, box[0].stop))
            box = (slice(start, stop), *box[1:])
        if elements is not None:
            numel = prod(side.stop - side.start for side in box)
            elements = slice(min(elements.start, numel), min(elements.stop, numel))
        return cls(box, elements)

    def __str__(self) -> str:
        box = f"[{', '.join(f'{side.start}:{side.stop}' for side in self.box)}]"
        return box if self.elements is None else f"elements {self.elements.start}:{self.elements.stop} of {box}"


class TauSource(ABC):
    """The tensors of tau by canonical name. It is pickled as its tensors if they are in memory, else as its paths."""

    specs: Mapping[str, TensorSpec]
    # Whether `specs` is known to follow the model's own order of parameters.
    ordered: bool = False
    # Base and tuned -> the files that tau is computed from, and the paths that it is read from, for error messages.
    files: Mapping[str, tuple[Path, ...]] = {}
    origin: str = "memory"
    # What a saved file tells: its path, its identity, which files it was made of, as JSON, and, if it is sparse, how it
    # was made so and how many bytes all tensors take as stored.
    path: str | None = None
    identity: str | None = None
    sources: str | None = None
    sparsity: Sparsity | None = None
    packed_nbytes: int | None = None
    # Those that hold it together, each a part.
    processes: Processes = ALONE

    @abstractmethod
    def read(self, name: str, dtype: torch.dtype, part: Part | None = None) -> Tensor | SparseTensor:
        """Return a tensor in a dtype, or a part of it, for which little else is read; one stored sparse comes so."""

    def whole(self, name: str, dtype: torch.dtype) -> Tensor | SparseTensor:
        """Return a whole tensor in a dtype, to which all `processes` must come."""
        return self.read(name, dtype)


class TauOfCheckpoints(TauSource):
    """tau of two checkpoints: headers are read now, and each tensor when it is asked for."""

    def __init__(self, base: PathLike, tuned: PathLike, options: Mapping[str, Any]) -> None:
        ends = open_files(base, role="base"), open_files(tuned, role="tuned")
        self._pairs = Pairs(*ends, options)
        self.ordered, self.specs = self._pairs.ordered, self._pairs.specs
        self.files = {role: end.files() for role, end in zip(("base", "tuned"), ends, strict=True)}
        self._arguments = os.path.abspath(ends[0].path), os.path.abspath(ends[1].path), options
        self.origin = " and ".join(self._arguments[:2])

    def read(self, name: str, dtype: torch.dtype, part: Part | None = None) -> Tensor:
        """Return a tensor in a dtype, or a part of it, for which little else is read."""
        return self._pairs.subtract(name, dtype, part)

    def __reduce__(self) -> tuple[Callable[..., TauOfCheckpoints], tuple[Any, ...]]:
        return TauOfCheckpoints, self._arguments


class Pairs:
    """The tensors that have a tau: parameters that both models hold, under the names that they have in memory."""

    def __init__(self, base: TensorSource, tuned: TensorSource, options: Mapping[str, Any]) -> None:
        found = match(base, tuned, memory=True, parameters=True, **options)
        self._ends, self._names = (found.first, found.second), found.pairs
        self.ordered = found.first.ordered and not (found.untied or any(found.only))
        if options["config"] is not None and not self.ordered:
            raise ValueError(
                f"the model of {options['config']} does not have the tensors of {base.origin} and {tuned.origin}; give "
                "the configuration of their model, or leave config out"
            )
        self.specs: dict[str, TensorSpec] = {}
        for name, (a, b) in found.pairs.items():
            dtype = torch.promote_types(found.first.dtype(a), found.second.dtype(b))
            # Of two vocabularies the rows of the smaller.
            self.specs[name] = TensorSpec(dtype, min(found.first.shape(a), found.second.shape(b), key=torch.Size.numel))

    def fragment(self, name: str) -> Fragment | None:
        """Return what this process holds of a sharded tensor, None of a whole one.

        Raises ValueError if the two models hold other parts of it.
        """
        found = [end.fragment(own) for end, own in zip(self._ends, self._names[name], strict=True)]
        held = [fragment for fragment in found if fragment is not None]
        parts = [Part.of(name, self.specs[name].shape, fragment) for fragment in held]
        if len(held) == 2 and parts[0] != parts[1]:
            raise ValueError(
                f"{name!r} is sharded in two ways: this process holds {parts[0]} in base and {parts[1]} in tuned; "
                "shard both models alike, or pass one of them whole or as a path"
            )
        return held[0] if held else None

    def subtract(self, name: str, dtype: torch.dtype, part: Part | None = None) -> Tensor:
        """Return tuned - base of one tensor, or of a part of it."""
        part = part or Part.all(self.specs[name].shape)
        base, tuned = (end.part(own, *part) for end, own in zip(self._ends, self._names[name], strict=True))
        wide = compute_dtype(base.dtype, tuned.dtype)
        return tuned.to("cpu", wide, copy=True).sub_(base.cpu()).to(dtype).contiguous()


def check_finite(name: str, tau: Tensor, *, rounded: bool = False) -> None:
    """Raise ValueError if an element of tau is NaN or infinite, perhaps since it was `rounded` to another dtype."""
    # The extremes carry NaN along, and take no memory.
    if tau.numel() and not torch.stack(tau.aminmax()).isfinite().all():
        fault, way_out = "a NaN or infinite element", ""
        if rounded:
            fault, way_out = f"an element that is not finite in {tau.dtype}", " or choose a wider dtype"
        raise ValueError(f"the reference delta of {name!r} has {fault}; check both checkpoints{way_out}")
