"""tau = theta_SFT − theta_base, the reference delta: made of two models, saved dense or sparse."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_merge.delta.file import DeltaWriter, SavedDelta, describe_files
from fused_merge.delta.in_memory import TauInMemory
from fused_merge.delta.tensors import Part, Sparsity, TauOfCheckpoints, TauSource, TensorSpec, check_finite
from fused_merge.distributed import Fragment
from fused_merge.eager.sparse import SparseTensor
from fused_merge.functional import backend
from fused_merge.functional.sparsify import sparsify
from fused_merge.io.files import expanded
from fused_merge.io.headers import CODES
from fused_merge.io.options import DeltaOptions
from fused_merge.io.sources import PathLike, SourceLike, bits
from fused_merge.options import documented, resolve
from fused_merge.per_tensor import parse_dtype
from fused_merge.progress import progress_bar

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Bytes of each tensor that the identity of a delta depends on.
_HEAD_BYTES = 4096


class ReferenceDelta:
    """The reference delta tau = theta_SFT − theta_base, by canonical tensor name.

    Made by `from_models`, `from_checkpoints` or `load`. tau is computed in fp32 (fp64 if either model is) and rounded
    once to the wider dtype of the two models. Only floating tensors have one; tied weights have one together. Tensors
    are returned on the CPU and are read-only. Reading a tensor raises an error if an element is NaN or infinite.
    Source: Lu et al. 2024 (arXiv 2405.17931), algorithm 1.

    Attributes:
        names: canonical names of the tensors.
        path: the file that it was loaded from, or None.
        sparsity: how a stored delta was sparsified; None for a dense one.
        ordered: whether `names` is known to follow the model's own order of parameters: made of modules, of folders of
            a model that Transformers knows, or with its `config`.
        nbytes: bytes that all of tau takes as stored, or would take if it is read lazily.

    Example:
        >>> import fused_merge as fm
        >>> delta = fm.ReferenceDelta.from_checkpoints("base/", "sft/")
        >>> delta
        <ReferenceDelta: ... tensors, ... MB, dense>
        >>> delta.names[0], delta.shape("model.norm.weight")
        ('model.embed_tokens.weight', torch.Size([16]))
    """

    def __init__(self, source: TauSource, dtype: torch.dtype | None = None) -> None:
        """Not for users: see `from_models`, `from_checkpoints` and `load`. `dtype` is that of all tensors, if given."""
        self._source = source
        self._specs = {name: TensorSpec(dtype or spec.dtype, spec.shape) for name, spec in source.specs.items()}
        self.names = tuple(self._specs)
        self.ordered, self.path, self.sparsity = source.ordered, source.path, source.sparsity
        self._work = backend.work([spec.shape.numel() for spec in self._specs.values()])
        self.nbytes = source.packed_nbytes or sum(spec.nbytes for spec in self._specs.values())

    @classmethod
    @documented(DeltaOptions)
    def from_models(cls, base: SourceLike, tuned: SourceLike, **options: Unpack[DeltaOptions]) -> ReferenceDelta:
        """Compute tau now, one tensor after the other; nothing of the two models is kept.

        Of models that are sharded as DTensors (FSDP2, tensor parallelism), or one of them and the other whole or a
        path, each process computes and holds what it holds of the parameters. All processes make such a delta together,
        save it together, and raise together; its identity is that of the same delta of whole models.

        Args:
            base: theta_base: a module (its parameters, in their order), a state dict (its floating tensors), or a path.
            tuned: theta_SFT: the same.
            {options}

        Returns:
            The delta, in memory, under the names and in the order of `base`.

        Raises:
            ValueError: if names or shapes differ, tau is not finite, or the two are not sharded alike; the sentence
                names the tensor.

        Example:
            >>> import torch
            >>> import fused_merge as fm
            >>> base, sft = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
            >>> delta = fm.ReferenceDelta.from_models(base, sft)
            >>> delta.names
            ('weight', 'bias')
            >>> torch.equal(delta.tensor("bias"), sft.bias - base.bias)
            True
        """
        return cls(TauInMemory(base, tuned, resolve(options, DeltaOptions)))

    @classmethod
    @documented(DeltaOptions)
    def from_checkpoints(cls, base: PathLike, tuned: PathLike, **options: Unpack[DeltaOptions]) -> ReferenceDelta:
        """Read headers now and each tensor of the two checkpoints when it is asked for.

        Where Transformers knows the model, tensors have the names, the order and the packing that they have in memory.

        Args:
            base: theta_base: a safetensors file or a Hugging Face folder.
            tuned: theta_SFT: the same.
            {options}

        Returns:
            The delta; it keeps the paths and no tensor.

        Raises:
            FileNotFoundError: if a path or a shard is not there.
            ValueError: if a file is broken, or names or shapes differ; the sentence names it.

        Example:
            >>> import fused_merge as fm
            >>> delta = fm.ReferenceDelta.from_checkpoints("base/", "sft/")
            >>> delta.ordered  # as the parameters of the model are in memory
            True
            >>> delta.tensor("model.layers.0.mlp.down_proj.weight").shape[0]
            16
        """
        return cls(TauOfCheckpoints(base, tuned, resolve(options, DeltaOptions)))

    @classmethod
    def load(cls, path: PathLike) -> ReferenceDelta:
        """Open a saved delta: headers are read now and each tensor when it is asked for.

        Args:
            path: a file that `save` or `fused-merge delta` wrote.

        Returns:
            The delta, dense or sparse as it was saved.

        Raises:
            FileNotFoundError: if the file is not there.
            ValueError: if it is no saved delta, broken, or contradicts itself.

        Example:
            >>> import fused_merge as fm
            >>> delta = fm.ReferenceDelta.load("tau.safetensors")
            >>> delta.identity == fm.ReferenceDelta.from_checkpoints("base/", "sft/").identity
            True
        """
        return cls(SavedDelta(path))

    def save(
        self,
        path: PathLike,
        reserve_rate: float | None = None,
        method: str | None = None,
        seed: int = 0,
        dtype: torch.dtype | str | None = None,
    ) -> Path:
        """Write the delta to one safetensors file, tensor by tensor, and return `path`.

        For a delta made by `from_checkpoints` the file names the files it was made of, with their SHA-256 as they are
        now. That costs one more read of both checkpoints. A delta of sharded models is saved by all its processes at
        once: each tensor is put together on all of them in turn, and the first one writes it.

        Args:
            path: the file to write; an existing one is replaced when the new one is whole.
            reserve_rate: p, the share of each tensor to keep, in (0, 1]; None or 1 saves the delta dense. A
                delta that is stored sparse is saved as it is and takes no other rate.
            method: how to choose what is kept: `"random"`, `"magnitude"` or `"soft_threshold"`.
            seed: seed of the random masks.
            dtype: bf16, fp16, fp32 or fp64, as a dtype or by name, of every tensor of the file; None keeps those of
                the delta. tau is rounded once from the difference in fp32 (fp64), which a delta made by
                `from_checkpoints` computes anew, and then sparsified. A delta in memory or in a file that holds
                16-bit numbers, or a sparse one, takes no other dtype.

        Returns:
            `path`.

        Raises:
            ValueError: if options do not fit, tau is not finite in its dtype, or the delta is made of the file `path`.
            OSError: if the disk is full or refuses.

        Example:
            >>> import fused_merge as fm
            >>> delta = fm.ReferenceDelta.from_checkpoints("base/", "sft/")
            >>> path = delta.save("tau-sparse.safetensors", reserve_rate=0.1, method="magnitude", dtype="bfloat16")
            >>> fm.ReferenceDelta.load(path)
            <ReferenceDelta: ... tensors, ... MB, magnitude at 0.1, from 'tau-sparse.safetensors'>
        """
        asked, path = parse_dtype(dtype), expanded(path)
        if others := [name for name in self.names if asked not in (None, self.dtype(name))]:
            if self.sparsity is not None:
                raise ValueError(
                    f"{self.path} holds a sparse delta, which takes no other dtype; save the dense delta anew"
                )
            rounded = [name for name in others if self.dtype(name).itemsize < 4]
            if rounded and not self._source.files:
                raise ValueError(
                    f"{rounded[0]!r} was rounded to {self.dtype(rounded[0])} before and takes no other dtype; make the "
                    "delta with ReferenceDelta.from_checkpoints(base, tuned) and save that"
                )
            return ReferenceDelta(self._source, asked).save(path, reserve_rate, method, seed)
        sparsity = self.sparsity
        if reserve_rate is None and method is not None:
            raise ValueError(f"method {method!r} needs a reserve_rate below 1; leave both out to save densely")
        if reserve_rate is not None and (reserve_rate != 1.0 or sparsity is not None):
            sparsity = Sparsity.checked(method, reserve_rate, seed)
            self._check_sparsity(sparsity)
        files = [file for paths in self._source.files.values() for file in paths]
        if path.resolve() in [file.resolve() for file in files]:
            raise ValueError(f"{path} is a file that the delta is made of, which it would replace; choose another")
        total = sum(spec.nbytes for spec in self._specs.values()) + sum(file.stat().st_size for file in files)
        processes = self._source.processes
        with progress_bar("saving the reference delta", total, enabled=processes.is_first) as advance:
            metadata = {
                "identity": self.identity,
                "ordered": json.dumps(self.ordered),
                "sources": describe_files(self._source.files, advance) if files else self._source.sources,
            }
            writer = DeltaWriter(path, self._specs, sparsity, metadata) if processes.is_first else None
            with processes.raising_together(), ExitStack() as opened:
                with processes.raising_together():
                    opened.enter_context(writer or nullcontext())
                # Packed values follow one another in a file: the widest first keeps all of them aligned.
                for name in sorted(self.names, key=lambda name: -self.dtype(name).itemsize):
                    tau = self._source.whole(name, self.dtype(name))
                    with processes.raising_together():
                        self._checked(name, tau)
                        if writer is not None:
                            writer.write_tau(name, tau if sparsity is None else self.sparsified(name, tau, sparsity))
                    advance(self._specs[name].nbytes)
        return path

    @cached_property
    def identity(self) -> str:
        """SHA-256 over the names, dtypes, shapes and first 4 KiB of every tensor of the dense delta.

        A delta and its saved forms, dense and sparse, share it; saved in another dtype, with other numbers, it is
        another delta. Computed when first asked for, from the heads of the tensors alone.
        """
        if self._source.identity is not None and self._specs == self._source.specs:
            return self._source.identity
        digest = hashlib.sha256()
        # Sorted: the same delta read from modules and from files has its names in different orders.
        for name, (dtype, shape) in sorted(self._specs.items()):
            head = self._source.read(name, dtype, Part.first(shape, _HEAD_BYTES // dtype.itemsize))
            assert isinstance(head, Tensor)
            digest.update(json.dumps([name, CODES[dtype], list(shape)]).encode())
            digest.update(bits(head).numpy().tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self) -> tuple[Callable[..., ReferenceDelta], tuple[Any, ...]]:
        """Pickle a delta that was made in memory with its tensors, and one that is read from files as their paths."""
        return _unpickled, (self._source, self.identity)

    def __copy__(self) -> ReferenceDelta:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ReferenceDelta:
        return self

    def __repr__(self) -> str:
        how = "dense" if self.sparsity is None else f"{self.sparsity.method} at {self.sparsity.reserve_rate}"
        where = f", from {self.path!r}" if self.path else ""
        return f"<ReferenceDelta: {len(self)} tensors, {self.nbytes / 1e6:.3g} MB, {how}{where}>"

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor, or raise KeyError if there is none of that name; reads no data."""
        return self._spec(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, or raise KeyError if there is none of that name; reads no data."""
        return self._spec(name).dtype

    def tensor(self, name: str, fragment: Fragment | None = None) -> Tensor:
        """Return one tensor, dense and unscaled; for a sparse delta with zeros where nothing was kept.

        Args:
            name: one of `names`.
            fragment: what this process holds of the parameter; None for all of it. Little else is read and nothing
                else is kept. Of a parameter with more rows than tau it is what tau has of them.

        Returns:
            The tensor in the shape of the fragment's box, or `[n]` where the fragment holds some elements of it.

        Raises:
            KeyError: if there is none of that name.
            ValueError: if an element is NaN or infinite, the fragment is one of a tensor of another shape, or the delta
                was made of sharded models of which this process holds something else.

        Example:
            >>> import torch
            >>> import fused_merge as fm
            >>> delta = fm.ReferenceDelta.from_models({"w": torch.tensor([1.0, 5.0])}, {"w": torch.tensor([2.0, 3.0])})
            >>> delta.tensor("w")
            tensor([ 1., -2.])
        """
        stored = self.read(name, fragment)
        return stored.unpack() if isinstance(stored, SparseTensor) else stored

    def sparse(self, name: str, sparsity: Sparsity, fragment: Fragment | None = None) -> SparseTensor:
        """Return F(tau) of one tensor, as stored or sparsified now: `read` and then `sparsified`.

        Args:
            name: one of `names`.
            sparsity: F, the share p that it keeps, and the seed of random masks; as the attribute `sparsity` has it.
            fragment: as for `tensor`.

        Returns:
            What F keeps, unscaled: `unpack()` of it is dense.

        Raises:
            KeyError: if there is none of that name.
            ValueError: as for `tensor`, or if `sparsity` is out of range or another than that of a stored sparse delta.

        Example:
            >>> import torch
            >>> import fused_merge as fm
            >>> delta = fm.ReferenceDelta.from_models({"w": torch.zeros(3)}, {"w": torch.tensor([1.0, -3.0, 2.0])})
            >>> saved = fm.ReferenceDelta.load(delta.save("largest.safetensors", reserve_rate=0.4, method="magnitude"))
            >>> kept = saved.sparse("w", saved.sparsity)
            >>> kept.unpack()
            tensor([ 0., -3.,  0.])
            >>> torch.equal(delta.sparse("w", saved.sparsity).values, kept.values)
            True
        """
        self._check_sparsity(Sparsity.checked(*sparsity))
        return self.sparsified(name, self.read(name, fragment), sparsity, fragment)

    def read(self, name: str, fragment: Fragment | None = None) -> Tensor | SparseTensor:
        """Return one tensor as it is stored, dense or sparse; no collective operation. Arguments are those of `tensor`.

        Raises as `tensor`.
        """
        dtype, shape = self._spec(name)
        part = None if fragment is None else Part.of(name, shape, fragment)
        return self._checked(name, self._source.read(name, dtype, None if part == Part.all(shape) else part))

    def sparsified(
        self, name: str, tau: Tensor | SparseTensor, sparsity: Sparsity, fragment: Fragment | None = None
    ) -> SparseTensor:
        """Return F(tau) of what `read` returned, on the device of `tau`.

        Where F compares with the k-th largest magnitude of the whole tensor, the processes of the fragment's groups
        find it together, in four rounds (fp64: eight) of 2 KiB, on that device: all of them must come here.

        Raises:
            ValueError: if `sparsity` is out of range, or the delta was stored with another.
        """
        self._check_sparsity(Sparsity.checked(*sparsity))
        if isinstance(tau, SparseTensor):
            return tau
        shard = None if fragment is None else fragment.shard
        numel = self.shape(name).numel()
        return sparsify(tau, name=name, shard=shard, numel=numel, work=self._work, **sparsity._asdict())

    def _spec(self, name: str) -> TensorSpec:
        if name not in self._specs:
            raise KeyError(f"the reference delta has no tensor {name!r}; see its `names`")
        return self._specs[name]

    def _checked(self, name: str, stored: Tensor | SparseTensor) -> Tensor | SparseTensor:
        """Return what the source has, or raise ValueError if an element is NaN or infinite."""
        values = stored.values if isinstance(stored, SparseTensor) else stored
        check_finite(name, values, rounded=self.dtype(name) != self._source.specs[name].dtype)
        return stored

    def _check_sparsity(self, asked: Sparsity) -> None:
        stored = self.sparsity
        # A seed matters to random masks only.
        told = 3 if asked.method == "random" else 2
        if stored is not None and stored[:told] != asked[:told]:
            raise ValueError(
                f"{self.path} was saved with {stored} and {asked} is asked for; "
                "ask for the same or save the dense delta anew"
            )


def _unpickled(source: TauSource, identity: str) -> ReferenceDelta:
    """Return the delta of a source whose files still hold what they held when it was pickled."""
    delta = ReferenceDelta(source)
    if delta.identity != identity:
        raise ValueError(f"{source.origin} changed after the reference delta was pickled; pickle it again")
    return delta
