"""Named tensors from a module, a state dict, a safetensors file or a Hugging Face folder, read one at a time.

`open_source` gives all four the same face: a mapping from canonical names to tensors whose shapes and dtypes
are known without reading any data. Nothing here ever unpickles a file.
"""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from fused_merge.distributed import Fragment, fragment_of, is_sharded, local_part
from fused_merge.io.files import bytes_of, check_unchanged, expanded, read_into, reading, stamp_of
from fused_merge.io.formats import ADAPTER_CONFIG, ADAPTER_FILE, adapter_config, refuse_other_formats
from fused_merge.io.headers import METADATA, Entry, open_safetensors, read_json
from fused_merge.names import MAY_BE_WRAPPED, adapter_of, canonical_name, some

logger = logging.getLogger("fused_merge")

PathLike: TypeAlias = "str | os.PathLike[str]"
SourceLike: TypeAlias = "nn.Module | Mapping[str, Tensor] | PathLike"

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MERGED = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_NEVER_PICKLE = "pickle files are never loaded: convert them with safetensors.torch.save_file"
_BIT_PATTERN = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TensorSource(Mapping[str, Tensor]):
    """Tensors by canonical name, in the order of their source; read-only: files are mapped, modules' are their own."""

    origin: str  # what messages call this source: a path, or what was passed
    aliases: dict[str, str]  # name -> the first name of the tensor that both share (tied weights)
    buffers: frozenset[str] = frozenset()  # the names that are a module's buffers
    ordered: bool = False  # whether the order is known to be that of the model's parameters
    _kinds: dict[str, tuple[torch.Size, torch.dtype]]

    def __contains__(self, name: object) -> bool:
        # A mapping's own test would read the tensor.
        return name in self._kinds

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def kind(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Return shape and dtype of a tensor; reads no data."""
        return self._kinds[name]

    def is_like(self, other: TensorSource) -> bool:
        """Return whether both hold tensors of the same names, shapes and dtypes, in whatever order; reads no data."""
        return self._kinds == other._kinds

    @property
    def dtypes(self) -> dict[torch.dtype, str]:
        """Each dtype that a tensor has, and the last of these tensors."""
        return {dtype: name for name, (_, dtype) in self._kinds.items()}

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor; reads no data."""
        return self._kinds[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor; reads no data."""
        return self._kinds[name][1]

    @abstractmethod
    def box(self, name: str, box: tuple[slice, ...] | None) -> Tensor:
        """Return a box of a tensor, None for all of it, reading nothing else; of a sharded one what is held here."""

    def fragment(self, name: str) -> Fragment | None:
        """Return what this process holds of a sharded tensor, None of a whole one."""
        return None

    def head(self, name: str, n: int) -> Tensor:
        """Return the first `n` row-major elements, or all, as a vector; of a sharded tensor those of this process."""
        return self.part(name, whole_box(self.shape(name)), slice(0, min(n, self.shape(name).numel())))

    def part(self, name: str, box: tuple[slice, ...], elements: slice | None) -> Tensor:
        """Return a box of a tensor or, as a vector, some of its row-major elements, for which little else is read.

        Of a sharded tensor it is a box of what this process holds, from the first row of that on.
        """
        shape, wanted = self.shape(name), box
        if elements is not None:
            wanted, elements = _rows_of(box, elements)
        if any(side.start >= side.stop for side in wanted) or elements == slice(0, 0):
            sizes = [side.stop - side.start for side in box] if elements is None else [0]
            return torch.empty(sizes, dtype=self.dtype(name))
        found = self.box(name, None if wanted == whole_box(shape) else wanted)
        if elements is not None:
            return found.reshape(-1)[elements]
        return found[: box[0].stop - box[0].start] if box else found

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the model, as in its `config.json`; empty if there is none."""
        return {}

    def files(self) -> tuple[Path, ...]:
        """Return the safetensors files behind this source; none for tensors in memory."""
        return ()

    def ranges(self, name: str) -> list[tuple[FileRange, int]] | None:
        """Return where row-major elements lie in files and how many, range after range; None if they do not."""
        return None

    def is_merged(self, name: str) -> bool:
        """Return whether a tensor is merged, as integers are not; ValueError if it is floating but cannot be."""
        dtype = self.dtype(name)
        if dtype not in _MERGED and (dtype.is_floating_point or dtype.is_complex):
            raise ValueError(
                f"{name!r} of {self.origin} is {dtype}, which cannot be merged; "
                "convert it to bfloat16, float16, float32 or float64 first"
            )
        return dtype in _MERGED


class MemorySource(TensorSource):
    """The tensors of a module or a state dict; nothing is copied."""

    def __init__(self, named: Iterable[tuple[Any, Any]], origin: str, module: nn.Module | None = None) -> None:
        self.origin, self.module, self.ordered = origin, module, module is not None
        buffers = () if module is None else persistent_buffers(module)
        self.buffers = frozenset(map(canonical_name, buffers))
        self._tensors: dict[str, Tensor] = {}
        self.aliases = {}
        first: dict[tuple[object, ...], str] = {}
        for raw, tensor in named:
            if not isinstance(raw, str) or not isinstance(tensor, Tensor):
                raise TypeError(f"{origin} must map names to tensors, but {raw!r} is a {type(tensor).__name__}")
            if tensor.layout != torch.strided or tensor.is_meta:
                kind = "a meta tensor without data" if tensor.is_meta else f"stored as {tensor.layout}"
                raise ValueError(f"{raw!r} of {origin} is {kind}; pass a dense tensor with its values")
            name = _new_name(raw, self._tensors, origin)
            self._tensors[name] = tensor.detach()
            owner = first.setdefault(_location(tensor), name) if tensor.numel() else name
            if owner != name:
                self.aliases[name] = owner
        self._kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in self._tensors.items()}

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of a model of Transformers."""
        to_dict = getattr(getattr(self.module, "config", None), "to_dict", None)
        return to_dict() if to_dict else {}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def fragment(self, name: str) -> Fragment | None:
        """Return what this process holds of a sharded tensor, None of a whole one."""
        return fragment_of(self._tensors[name])

    def box(self, name: str, box: tuple[slice, ...] | None) -> Tensor:
        """Return a box of a tensor, None for all of it."""
        tensor = self._tensors[name]
        return local_part(tensor) if box is None or is_sharded(tensor) else tensor[box]


class FileRange(NamedTuple):
    """Where row-major elements lie: they are little-endian, and follow one another from byte `offset` of `file` on."""

    file: Path
    offset: int
    dtype: torch.dtype


class FileSource(TensorSource):
    """The tensors of a safetensors file, a Hugging Face folder or an adapter; headers are read now, data on demand.

    Reading raises OSError if a file has changed since: a shorter one that is still mapped would end the process.
    """

    index: dict[str, Any] | None = None  # the parsed `model.safetensors.index.json`

    def __init__(self, path: Path) -> None:
        self.path = path
        self.origin, self.aliases = str(path), {}
        self.adapter = adapter_config(path)  # of PEFT; None if this is a model
        listed: dict[str, set[str]] = {path.name: set()}
        if path.is_dir():
            self.index, listed = _read_folder(path)
        self._paths = {file: path / file if path.is_dir() else path for file in listed}
        self.stamps = {each: stamp_of(each) for each in self._paths.values()}  # of the files as they were opened
        self._opened = {file: open_safetensors(each) for file, each in self._paths.items()}
        # Where each tensor is: its file, its name there, and what the header says of it.
        self._stored: dict[str, tuple[str, str, Entry]] = {}
        self.shards: dict[str, tuple[str, ...]] = {}  # name of each file -> the canonical names of its tensors
        for file, (_, header) in self._opened.items():
            if self.index is not None and header.entries.keys() != listed[file]:
                lacking, unlisted = listed[file] - header.entries.keys(), header.entries.keys() - listed[file]
                names = some([f"{name!r:.200}" for name in sorted(lacking or unlisted)])
                fault = (
                    f"lists {names} in {file}, which lacks it"
                    if lacking
                    else f"does not list {names}, which {file} holds"
                )
                raise ValueError(f"{path / INDEX_FILE} {fault}; index and shards must come from one download")
            self.shards[file] = tuple(_new_names(header.entries, self._stored, self.origin))
            for name, (raw, entry) in zip(self.shards[file], header.entries.items(), strict=True):
                self._stored[name] = (file, raw, entry)
        self._kinds = {
            name: (cast(torch.Size, entry.shape), entry.dtype) for name, (_, _, entry) in self._stored.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name, ())

    def box(self, name: str, box: tuple[slice, ...] | None) -> Tensor:
        """Return a box of a tensor, reading nothing else, or all of it."""
        return self._read(name, box) if box else self[name]

    def _read(self, name: str, box: tuple[slice, ...]) -> Tensor:
        file, raw, entry = self._stored[name]
        path, opened = self._paths[file], self._opened[file][0]
        check_unchanged({path: self.stamps[path]})
        if opened is None:
            return _read_box(self.file_range(name), entry.shape, box)
        tensor: Tensor = opened.get_slice(raw)[box] if box else opened.get_tensor(raw)
        return tensor

    @property
    def config_path(self) -> Path | None:
        """The `config.json` beside a whole model."""
        path = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
        whole = self.adapter is None and (self.path.is_dir() or self.path.name == SINGLE_FILE)
        return path if whole and path.is_file() else None

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The parsed `config.json` beside a whole model; ValueError if it is no JSON object."""
        path = self.config_path
        if path is None:
            return {}
        # Transformers itself writes infinities there.
        if isinstance(config := read_json(path, finite=False), dict):
            return config
        raise ValueError(f"{path} is not a JSON object; download it again")

    def files(self) -> tuple[Path, ...]:
        """Return the safetensors files, in the order of their names."""
        return tuple(self._paths.values())

    def ranges(self, name: str) -> list[tuple[FileRange, int]]:
        """Return where the elements of a tensor lie, and how many they are."""
        return [(self.file_range(name), self._kinds[name][0].numel())]

    def metadata(self, file: str) -> dict[str, str]:
        """Return the free-form metadata of one of the files in `shards`."""
        return dict(self._opened[file][1].metadata)

    def file_range(self, name: str) -> FileRange:
        """Return where in which file the elements of a tensor lie."""
        file, _, entry = self._stored[name]
        return FileRange(self._paths[file], self._opened[file][1].data + entry.start, entry.dtype)


def open_source(source: SourceLike, *, role: str = "source") -> TensorSource:
    """Open named tensors, wherever they are.

    Args:
        source: a module (its parameters and persistent buffers; of a model of PEFT those of its active adapter), a
            state dict, the path of a `.safetensors` file, or of a Hugging Face folder with `model.safetensors`,
            `model.safetensors.index.json`, or `adapter_model.safetensors` and `adapter_config.json`.
        role: what messages call tensors in memory, e.g. `"base"`.

    Raises:
        FileNotFoundError: if the path, or a shard that the index names, is not there.
        ValueError: if a file is not what it claims; the sentence names it.
        TypeError: if `source` is none of the four.
    """
    if isinstance(source, nn.Module):
        named = [*source.named_parameters(remove_duplicate=False), *persistent_buffers(source).items()]
        if adapters := {name: adapter for name, _ in named if (adapter := adapter_of(name)) is not None}:
            chosen = _active_adapter(source, dict.fromkeys(adapters.values()), role)
            named = [(name, tensor) for name, tensor in named if adapters.get(name) == chosen]
        return MemorySource(named, f"{role} (module)", source)
    if isinstance(source, Mapping):
        return MemorySource(source.items(), f"{role} (state dict)")
    if isinstance(source, (str, os.PathLike)):
        return open_files(source)
    raise TypeError(f"{role} must be a module, a state dict or a path, got a {type(source).__name__}")


def _active_adapter(module: nn.Module, adapters: Collection[str], role: str) -> str:
    """Return the one of several adapters of a model of PEFT that is active."""
    if len(adapters) == 1:
        return next(iter(adapters))
    # Of a layer of PEFT a name or a list of names; models of Transformers have a function of that name.
    found = (getattr(part, "active_adapter", ()) for part in module.modules())
    given = (names for names in found if isinstance(names, (str, list, tuple)))
    listed = (name for names in given for name in ([names] if isinstance(names, str) else names))
    active = {name for name in listed if name in adapters}
    if len(active) == 1:
        return active.pop()
    raise ValueError(
        f"{role} (module) has the adapters {some(map(repr, adapters))}, of which {len(active)} are active; choose one "
        "with model.set_adapter(name), or give its folder"
    )


def open_files(path: PathLike, *, role: str = "source") -> FileSource:
    """Open a safetensors file or a Hugging Face folder; raises TypeError for what is no path, else as `open_source`."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{role} must be the path of a safetensors file or a model folder, not a {type(path).__name__}")
    path = expanded(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a local .safetensors file or a downloaded model folder")
    if path.is_file() and path.suffix in _PICKLES:
        raise ValueError(f"{path} is not a safetensors file; {_NEVER_PICKLE}")
    refuse_other_formats(path)
    return FileSource(path)


def bits(tensor: Tensor) -> Tensor:
    """Return the bit patterns of a tensor as integers of its width: a view of the same memory."""
    return tensor.view(_BIT_PATTERN[tensor.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have one shape, one dtype and the same bits; −0.0 and NaN count as bits."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b).to(a.device))


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a module saves, by name."""
    return {
        f"{prefix}.{leaf}".removeprefix("."): buffer
        for prefix, part in module.named_modules(remove_duplicate=False)
        for leaf, buffer in part._buffers.items()
        if buffer is not None and leaf not in part._non_persistent_buffers_set
    }


def read_range(handle: int, place: FileRange, start: int, numel: int) -> Tensor:
    """Read elements of a place in an open file, from the one at `start` on."""
    tensor = torch.empty(numel, dtype=place.dtype)
    read_into(handle, place.file, bytes_of(tensor), place.offset + start * place.dtype.itemsize)
    return tensor


def _new_names(raw: Mapping[str, Any], known: Mapping[str, Any], origin: str) -> list[str]:
    """Return the canonical names of tensors that join those already known."""
    if not MAY_BE_WRAPPED.search("\n".join(raw)) and known.keys().isdisjoint(raw):
        return list(raw)
    names = dict.fromkeys(known)
    for each in raw:
        names[_new_name(each, names, origin)] = None
    return list(names)[len(known) :]


def _new_name(raw: str, known: Container[str], origin: str) -> str:
    """Return the canonical name of a tensor that joins those already known."""
    name = canonical_name(raw)
    if name == METADATA:
        raise ValueError(f"{origin} holds {raw!r}, a name that safetensors files keep for their metadata; rename it")
    if name in known:
        raise ValueError(
            f"{origin} holds two tensors called {name!r} when prefixes of wrappers are dropped; rename one"
        )
    return name


def _read_box(place: FileRange, shape: Sequence[int], box: Sequence[slice]) -> Tensor:
    """Return a box of a tensor, for which whole rows are read, without mapping the file."""
    first, last, _ = box[0].indices(shape[0]) if box else (0, 1, 1)
    row = shape[1:] if box else shape
    rows = torch.empty(max(0, last - first) * prod(row), dtype=place.dtype)
    with reading(place.file) as handle:
        read_into(handle, place.file, bytes_of(rows), place.offset + first * prod(row) * place.dtype.itemsize)
    return rows.view(last - first, *row)[(slice(None), *box[1:])].contiguous() if box else rows.view(shape)


def whole_box(shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the box that is all of a tensor."""
    return tuple(slice(0, size) for size in shape)


def _rows_of(box: tuple[slice, ...], elements: slice) -> tuple[tuple[slice, ...], slice]:
    """Return the smallest box of neighboring rows that holds some elements of a box, and which of its own they are."""
    narrowed, start, stop = list(box), elements.start, max(elements.start, elements.stop)
    for dim, side in enumerate(box):
        inner = prod(each.stop - each.start for each in box[dim + 1 :])
        if start == stop or inner == 0:
            return tuple(narrowed), slice(0, 0)
        first, last = start // inner, -(-stop // inner)
        narrowed[dim] = slice(side.start + first, side.start + last)
        start, stop = start - first * inner, stop - first * inner
        if last - first > 1:
            break
    return tuple(narrowed), slice(start, stop)


def _location(tensor: Tensor) -> tuple[object, ...]:
    """Return what tied tensors have in common: of a sharded one what this process holds, if it holds anything."""
    part = local_part(tensor)
    place = part.data_ptr() if part.numel() else id(tensor)
    return tensor.device, place, tensor.dtype, tensor.shape, tensor.stride()


def _read_folder(folder: Path) -> tuple[dict[str, Any] | None, dict[str, set[str]]]:
    """Return the index, None for a single file, and for each shard the tensors that the index lists."""
    if (folder / SINGLE_FILE).exists():
        if (folder / INDEX_FILE).exists():
            both = folder, SINGLE_FILE, INDEX_FILE, SINGLE_FILE
            logger.warning("%s holds both %s and %s; only %s is read, as Transformers does", *both)
        return None, {SINGLE_FILE: set()}
    path = folder / INDEX_FILE
    if not path.exists() and (folder / ADAPTER_FILE).exists() and (folder / ADAPTER_CONFIG).exists():
        return None, {ADAPTER_FILE: set()}
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
        if not isinstance(file, str) or file not in listed:
            # Nothing that an index says may make us read, or later write, anywhere but in its own folder.
            plain = isinstance(file, str) and Path(file).name == file and "\\" not in file and file.isprintable()
            if not plain or not file.endswith(".safetensors"):
                fault = f"puts {name!r:.200} into {file!r:.200}, which does not name a .safetensors file in its folder"
                raise ValueError(f"{path} {fault}; correct the index")
            listed[file] = set()
        listed[file].add(name)
    for file in listed:
        # Not that of Path, which fails on names that are too long.
        if not os.path.exists(folder / file):
            raise FileNotFoundError(f"{path} names {file:.200}, which is not there; download the missing shard")
    return index, dict(sorted(listed.items()))
