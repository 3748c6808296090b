"""Named tensors from a module, a state dict, a safetensors file or a Hugging Face folder, read one at a time.

`open_source` gives all four the same face: a mapping from canonical names to tensors whose shapes and dtypes
are known without reading any data. `match` says which tensors two sources have in common. Nothing here ever
unpickles a file.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fused_merge.distributed import is_sharded, local_part
from fused_merge.io.headers import METADATA, Entry, read_header, read_json
from fused_merge.names import canonical_name, some

PathLike: TypeAlias = "str | os.PathLike[str]"
SourceLike: TypeAlias = "nn.Module | Mapping[str, Tensor] | PathLike"

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MERGED = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_NEVER_PICKLE = "pickle files are never loaded: convert them with safetensors.torch.save_file"
_BIT_PATTERN = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TensorSource(Mapping[str, Tensor]):
    """Named tensors under canonical names, in the order of their source.

    The mapping holds every name; names that share one tensor are told apart by `aliases`. Treat the tensors
    as read-only: those of files are mapped and those of modules are the module's own.

    Attributes:
        origin: what messages call this source: a path, or what was passed.
        aliases: name -> the first name of the tensor that both share (tied weights); names that share
            nothing are absent.
        buffers: the names that are a module's buffers; empty for other sources.
    """

    origin: str
    aliases: Mapping[str, str]
    buffers: frozenset[str]

    @abstractmethod
    def shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor; reads no data."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor; reads no data."""

    @abstractmethod
    def head(self, name: str, n: int) -> Tensor:
        """Return the first `n` row-major elements, or as many as there are, as a vector; reads no others."""

    @abstractmethod
    def box(self, name: str, box: tuple[slice, ...] | None) -> Tensor:
        """Return a box of a tensor, None for all of it; of files nothing else is read."""

    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """Return the safetensors files behind this source; none for tensors in memory."""

    def is_merged(self, name: str) -> bool:
        """Return whether a tensor takes part in merging; integers and booleans do not.

        Raises:
            ValueError: for complex and 8-bit floating tensors, which cannot be merged.
        """
        dtype = self.dtype(name)
        if dtype in _MERGED:
            return True
        if dtype.is_floating_point or dtype.is_complex:
            raise ValueError(
                f"{name!r} of {self.origin} is {dtype}, which cannot be merged; "
                "convert it to bfloat16, float16, float32 or float64 first"
            )
        return False


class _MemorySource(TensorSource):
    """The tensors of a module or a state dict; nothing is copied."""

    def __init__(self, named: Iterable[tuple[Any, Any]], origin: str, buffers: Collection[str] = ()) -> None:
        self.origin = origin
        self.buffers = frozenset(map(canonical_name, buffers))
        self._tensors: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        first: dict[tuple[object, ...], str] = {}
        for raw, tensor in named:
            if not isinstance(raw, str) or not isinstance(tensor, Tensor):
                raise TypeError(f"{origin} must map names to tensors, but {raw!r} is a {type(tensor).__name__}")
            if tensor.layout != torch.strided or tensor.is_meta:
                kind = "a meta tensor without data" if tensor.is_meta else f"stored as {tensor.layout}"
                raise ValueError(f"{raw!r} of {origin} is {kind}; pass a dense tensor with its values")
            name = _add_name(self._tensors, raw, origin)
            self._tensors[name] = tensor.detach()
            owner = first.setdefault(_location(tensor), name) if tensor.numel() else name
            if owner != name:
                aliases[name] = owner
        self.aliases = aliases

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        return self._tensors[name].dtype

    def head(self, name: str, n: int) -> Tensor:
        """Return the first `n` row-major elements as a vector; of a sharded tensor those of this process."""
        tensor = local_part(self._tensors[name])
        return tensor[_leading(tensor.shape, n)].reshape(-1)[:n]

    def box(self, name: str, box: tuple[slice, ...] | None) -> Tensor:
        """Return a box of a tensor, or all of it; of a sharded one what this process holds, whatever is asked."""
        tensor = self._tensors[name]
        if box is None or is_sharded(tensor):
            return local_part(tensor)
        return tensor[box]

    def files(self) -> tuple[Path, ...]:
        """Return no files."""
        return ()


class FileRange(NamedTuple):
    """Where row-major elements lie: they are little-endian, and follow one another from byte `offset` of `file` on."""

    file: Path
    offset: int
    dtype: torch.dtype


class FileSource(TensorSource):
    """The tensors of a safetensors file or of a Hugging Face folder; headers are read now, data on demand.

    Attributes:
        path: the file or folder as given.
        shards: name of each safetensors file -> the canonical names of its tensors.
        index: the parsed `model.safetensors.index.json`, or None where there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.origin = str(path)
        self.aliases = {}
        self.buffers = frozenset()
        self.index: dict[str, Any] | None = None
        folder = path
        listed: dict[str, set[str]]
        if path.is_dir():
            self.index, listed = _read_folder(path)
        else:
            folder, listed = path.parent, {path.name: set()}
        self._folder = folder
        self._headers = {file: read_header(folder / file) for file in listed}
        self._handles = {file: _open_safetensors(folder / file) for file in listed}
        self._where: dict[str, tuple[str, str]] = {}
        for file, header in self._headers.items():
            if self.index is not None and header.entries.keys() != listed[file]:
                _raise_index_mismatch(folder, file, listed[file], set(header.entries))
            for raw in header.entries:
                self._where[_add_name(self._where, raw, self.origin)] = (file, raw)
        homes: dict[str, list[str]] = {file: [] for file in listed}
        for name, (file, _) in self._where.items():
            homes[file].append(name)
        self.shards: dict[str, tuple[str, ...]] = {file: tuple(names) for file, names in homes.items()}

    def _entry(self, name: str) -> Entry:
        file, raw = self._where[name]
        return self._headers[file].entries[raw]

    def __contains__(self, name: object) -> bool:
        # A mapping's own test would read the tensor.
        return name in self._where

    def __getitem__(self, name: str) -> Tensor:
        file, raw = self._where[name]
        tensor: Tensor = self._handles[file].get_tensor(raw)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor from its header."""
        return torch.Size(self._entry(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor from its header."""
        return self._entry(name).dtype

    def head(self, name: str, n: int) -> Tensor:
        """Return the first `n` row-major elements as a vector; reads only the rows that hold them."""
        cut = _leading(self.shape(name), n)
        file, raw = self._where[name]
        tensor: Tensor = self._handles[file].get_slice(raw)[cut] if cut else self[name]
        return tensor.reshape(-1)[:n]

    def box(self, name: str, box: tuple[slice, ...] | None) -> Tensor:
        """Return a box of a tensor, reading nothing else, or all of it."""
        if not box:
            return self[name]
        file, raw = self._where[name]
        tensor: Tensor = self._handles[file].get_slice(raw)[box]
        return tensor

    def files(self) -> tuple[Path, ...]:
        """Return the safetensors files, in the order of their names."""
        return tuple(self._folder / file for file in self.shards)

    def metadata(self, file: str) -> dict[str, str]:
        """Return the free-form metadata of one of the files in `shards`."""
        return dict(self._headers[file].metadata)

    def file_range(self, name: str) -> FileRange:
        """Return where in which file the elements of a tensor lie."""
        file, _ = self._where[name]
        entry = self._entry(name)
        return FileRange(self._folder / file, self._headers[file].data + entry.start, entry.dtype)


def open_source(source: SourceLike, *, role: str = "source") -> TensorSource:
    """Open named tensors, wherever they are.

    Args:
        source: a module (its parameters and persistent buffers), a state dict, the path of a `.safetensors`
            file, or of a Hugging Face folder with `model.safetensors` or `model.safetensors.index.json`.
        role: what messages call tensors in memory, e.g. `"base"`.

    Raises:
        FileNotFoundError: if the path, or a shard that the index names, is not there.
        ValueError: if a file is not what it claims; the sentence names it.
        TypeError: if `source` is none of the four.
    """
    if isinstance(source, nn.Module):
        buffers = {
            f"{prefix}.{leaf}" if prefix else leaf: buffer
            for prefix, module in source.named_modules(remove_duplicate=False)
            for leaf, buffer in module._buffers.items()
            if buffer is not None and leaf not in module._non_persistent_buffers_set
        }
        parameters = source.named_parameters(remove_duplicate=False)
        return _MemorySource([*parameters, *buffers.items()], f"{role} (module)", buffers)
    if isinstance(source, Mapping):
        return _MemorySource(source.items(), f"{role} (state dict)")
    if isinstance(source, (str, os.PathLike)):
        return _open_path(Path(source))
    raise TypeError(f"{role} must be a module, a state dict or a path, got a {type(source).__name__}")


def open_files(path: PathLike, *, role: str = "source") -> FileSource:
    """Open a safetensors file or a Hugging Face folder.

    Raises:
        TypeError: if `path` is not a path; otherwise as `open_source`.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{role} must be the path of a safetensors file or a model folder, not a {type(path).__name__}")
    return _open_path(Path(path))


class Match(NamedTuple):
    """What two sources have in common.

    Attributes:
        names: the tensors both hold, in the order of the first source, tied ones once.
        aliases: every further name of either source -> the one of `names` that holds the same bits.
        alone: names that only one of them holds; empty unless asked for.
    """

    names: tuple[str, ...]
    aliases: dict[str, str]
    alone: tuple[str, ...] = ()

    def resolve(self, name: str) -> str:
        """Return the one of `names` that stands for `name`."""
        return self.aliases.get(name, name)


def match(
    first: TensorSource,
    second: TensorSource,
    *,
    same_dtype: bool = False,
    any_rows: bool = False,
    partial: bool = False,
    ignore: Collection[str] = (),
) -> Match:
    """Pair the tensors of two sources by name and verify that they fit.

    A name that only one source holds is accepted if, there, it is bit-equal to a tensor that both hold: tied
    weights that one checkpoint writes out and the other does not. Reads data only to decide that.

    Args:
        first: gives the order of the result.
        second: the other source.
        same_dtype: also require equal dtypes.
        any_rows: accept tensors that differ along dim 0 only, as those of other vocabularies do.
        partial: list the tensors that only one holds instead of refusing them.
        ignore: names to leave out.

    Raises:
        ValueError: for missing, extra, reshaped or differently typed tensors; one sentence that names them.
    """
    common = [name for name in first if name in second and name not in ignore]
    changed = {name: text for name in common if (text := _difference(name, first, second, same_dtype, any_rows))}
    if changed:
        vocabulary = all(_other_vocabulary(first.shape(name), second.shape(name)) for name in changed)
        way_out = (
            "resize one model to the vocabulary of the other"
            if vocabulary
            else "both must be of one architecture" + " and one dtype" * same_dtype
        )
        raise ValueError(f"{first.origin} and {second.origin} do not match: {some(changed.values())}; {way_out}")

    names: dict[tuple[str, str], str] = {}
    aliases: dict[str, str] = {}
    for name in common:
        # Tied in both sources: one tensor under its first name.
        owners = (first.aliases.get(name, name), second.aliases.get(name, name))
        if names.setdefault(owners, name) != name:
            aliases[name] = names[owners]

    alone: list[str] = []
    unmatched: list[str] = []
    for here, there in ((first, second), (second, first)):
        missing = []
        lonely = [name for name in here if name not in there and name not in ignore]
        alike: dict[tuple[object, ...], list[str]] = {}
        for kept in names.values() if lonely else ():
            alike.setdefault(_look(here, kept), []).append(kept)
        for name in lonely:
            twin = next((kept for kept in alike.get(_look(here, name), ()) if _are_twins(here, name, kept)), None)
            if twin is None:
                missing.append(name)
            else:
                aliases[name] = twin
        alone += missing
        if missing:
            unmatched.append(f"{there.origin} lacks {some(map(repr, missing))} of {here.origin}")
    if unmatched and not partial:
        raise ValueError(f"{'; '.join(unmatched)}; both must hold the same tensors, tied copies apart")
    return Match(tuple(names.values()), aliases, tuple(alone))


def bits(tensor: Tensor) -> Tensor:
    """Return the bit patterns of a tensor as integers of its width: a view of the same memory."""
    return tensor.view(_BIT_PATTERN[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have one shape, one dtype and the same bits; −0.0 and NaN count as bits."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b).to(a.device))


def _add_name(known: Collection[str], raw: str, origin: str) -> str:
    name = canonical_name(raw)
    if name == METADATA:
        raise ValueError(f"{origin} holds {raw!r}, a name that safetensors files keep for their metadata; rename it")
    if name in known:
        raise ValueError(
            f"{origin} holds two tensors called {name!r} when prefixes of wrappers are dropped; rename one"
        )
    return name


def _location(tensor: Tensor) -> tuple[object, ...]:
    # The address of a DTensor is that of what this process holds of it; an empty part has none but the object.
    part = local_part(tensor)
    place = part.data_ptr() if part.numel() else id(tensor)
    return (tensor.device, place, tensor.dtype, tensor.shape, tensor.stride())


def _leading(shape: torch.Size, n: int) -> tuple[slice, ...]:
    """Return the smallest box that holds the first `n` row-major elements; empty if that is everything."""
    if prod(shape) <= n:
        return ()
    box = []
    for dim in range(len(shape)):
        inner = prod(shape[dim + 1 :])
        box.append(slice(0, min(shape[dim], -(-n // inner))))
    return tuple(box)


def _open_path(path: Path) -> FileSource:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give a local .safetensors file or a downloaded Hugging Face folder"
        )
    if path.is_file() and path.suffix in _PICKLES:
        raise ValueError(f"{path} is not a safetensors file; {_NEVER_PICKLE}")
    return FileSource(path)


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file ({error}); copy or download it again") from error


def _read_folder(folder: Path) -> tuple[dict[str, Any] | None, dict[str, set[str]]]:
    """Return the index, None for a single file, and for each shard the tensors that the index lists."""
    if (folder / SINGLE_FILE).exists():
        return None, {SINGLE_FILE: set()}
    path = folder / INDEX_FILE
    if not path.exists():
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
        way_out = f"it holds {some(pickled)}, and {_NEVER_PICKLE}" if pickled else "give the folder of a whole model"
        raise FileNotFoundError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; {way_out}")
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no 'weight_map' from tensor names to files; download it again")
    if not isinstance(index.get("metadata", {}), dict):
        raise ValueError(f"{path} has 'metadata' that are no JSON object; download it again")
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # Nothing that an index says may make us read, or later write, anywhere but in its own folder.
        plain = isinstance(file, str) and Path(file).name == file and "\\" not in file and file.isprintable()
        if not plain or not file.endswith(".safetensors"):
            raise ValueError(
                f"{path} puts {name!r:.200} into {file!r:.200}, which does not name a .safetensors file in its folder; "
                "correct the index"
            )
        listed.setdefault(file, set()).add(name)
    for file in listed:
        # Not that of Path, which fails on names that are too long.
        if not os.path.exists(folder / file):
            raise FileNotFoundError(f"{path} names {file:.200}, which is not there; download the missing shard")
    return index, dict(sorted(listed.items()))


def _raise_index_mismatch(folder: Path, file: str, listed: set[str], stored: set[str]) -> None:
    lacking, unlisted = ([f"{name!r:.200}" for name in sorted(names)] for names in (listed - stored, stored - listed))
    fault = (
        f"lists {some(lacking)} in {file}, which lacks it"
        if lacking
        else f"does not list {some(unlisted)}, which {file} holds"
    )
    raise ValueError(f"{folder / INDEX_FILE} {fault}; index and shards must come from one download")


def _difference(name: str, first: TensorSource, second: TensorSource, same_dtype: bool, any_rows: bool) -> str | None:
    """Return how the two tensors called `name` differ in kind, or None."""
    shapes = first.shape(name), second.shape(name)
    rows_apart = len(shapes[0]) == len(shapes[1]) > 0 and shapes[0][1:] == shapes[1][1:]
    if shapes[0] != shapes[1] and not (any_rows and rows_apart):
        return f"{name!r} is {list(shapes[0])} and {list(shapes[1])}"
    dtypes = first.dtype(name), second.dtype(name)
    if first.is_merged(name) != second.is_merged(name) or (same_dtype and dtypes[0] != dtypes[1]):
        return f"{name!r} is {dtypes[0]} and {dtypes[1]}"
    return None


def _other_vocabulary(a: torch.Size, b: torch.Size) -> bool:
    return len(a) > 1 and a[1:] == b[1:] and a[0] != b[0]


def _look(source: TensorSource, name: str) -> tuple[object, ...]:
    """Return what twins have in common, from the beginning of a tensor alone."""
    head = bits(source.head(name, 1024).contiguous()).cpu().numpy().tobytes()
    return source.shape(name), source.dtype(name), head


def _are_twins(source: TensorSource, name: str, other: str) -> bool:
    """Return whether two tensors that look alike are tied weights, by storage or bit for bit."""
    if source.aliases.get(name, name) == source.aliases.get(other, other):
        return True
    pattern = bits(source[name]).flatten()
    # Fresh norms and biases are constant and equal one another by accident.
    return bool((pattern != pattern[:1]).any()) and same_bits(source[name], source[other])
