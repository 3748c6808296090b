"""Headers of safetensors files, and JSON from outside.

A file is the length of its header (8 bytes, little endian), the header, and the data. The safetensors library reads the
header and verifies it: JSON in UTF-8 of at most 100 MB, dtypes that it knows, and tensors that follow one another
without a gap and fill the file. So their order, dtypes and shapes say where each of them lies. Here is refused what the
library lets through: pipes and devices, which have no end, and tensors that torch cannot hold. Where a name stands
twice in a header, the last one counts, for the library and therefore for us.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

# The codes of the format that torch can hold.
DTYPES: dict[str, torch.dtype] = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2": torch.float8_e5m2},
    **{"F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

METADATA = "__metadata__"
# As in the safetensors library, which reads no longer headers; no index comes near it.
_LONGEST_JSON = 100_000_000
# An index has two levels. Deeper ones may be read and, further down the stack, not written again.
_MOST_LEVELS = 100
# Those that every operation of torch takes.
_MOST_DIMENSIONS = 64


class Entry(NamedTuple):
    """What a header says of one tensor; `start` and `end` are bytes from the beginning of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    """A header that fits its file, its tensors in the order of the data; `data` is where the data begin in the file."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data: int


def open_safetensors(path: Path) -> tuple[Any, Header]:
    """Open a file with `safe_open`, and read its header but no data; OSError or, if it breaks the rules, ValueError."""
    try:
        with _opened(path) as (file, _):
            length = int.from_bytes(file.read(8), "little")
            opened: Any = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} cannot be read as a safetensors file ({reason}); copy or download it again"
        ) from error
    entries: dict[str, Entry] = {}
    place = 0
    for name in opened.offset_keys():
        tensor = opened.get_slice(name)
        code, shape = tensor.get_dtype(), tensor.get_shape()
        # Torch multiplies the sizes up even where one of them is 0.
        if code not in DTYPES or len(shape) > _MOST_DIMENSIONS or prod(size or 1 for size in shape) >= 2**63:
            kind = code if code not in DTYPES else f"of shape {shape!s:.100}"
            raise ValueError(
                f"{path} cannot be used: {name!r:.200} is {kind}, which torch cannot hold; convert it first"
            )
        end = place + prod(shape) * DTYPES[code].itemsize
        entries[name] = Entry(DTYPES[code], tuple(shape), place, end)
        place = end
    return opened, Header(entries, opened.metadata() or {}, 8 + length)


def read_header(path: Path) -> Header:
    """Return the header of a safetensors file; errors are those of `open_safetensors`."""
    return open_safetensors(path)[1]


def encode_header(entries: Mapping[str, Entry], metadata: Mapping[str, str], *, multiple: int = 8) -> bytes:
    """Return the bytes that stand before the data: length, header, and spaces up to a `multiple` of bytes."""
    listed = {
        name: {"dtype": CODES[dtype], "shape": shape, "data_offsets": (start, end)}
        for name, (dtype, shape, start, end) in entries.items()
    }
    text = json.dumps(({METADATA: dict(metadata)} if metadata else {}) | listed, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // multiple) * multiple - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def read_json(path: Path, *, finite: bool = True) -> Any:
    """Read a JSON file from outside, as `load_json` parses it; OSError, or ValueError if it is none or too large."""
    try:
        with _opened(path) as (file, size):
            if size > _LONGEST_JSON:
                raise ValueError(f"it has {size} bytes")
            value = load_json(file.read(size), finite=finite)
        if _levels(value) > _MOST_LEVELS:
            raise ValueError("it is nested too deeply")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    return value


def load_json(text: bytes, *, finite: bool = True) -> Any:
    """Parse JSON from outside, by the letter of the standard; ValueError or, if it is too deep, RecursionError.

    A key that stands twice is refused, since readers differ in which one they take, and so is what other readers
    could not read when it is written again: halves of surrogate pairs and, if `finite`, NaN and infinities.
    """
    value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    json.dumps(value, allow_nan=not finite, ensure_ascii=False).encode()
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r:.200} stands in it twice")
    return values


@contextmanager
def explained(what: str, way_out: str) -> Iterator[None]:
    """Say in one sentence what the operating system refuses: what could not be done, its reason, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{what}: {error.strerror or error}; {way_out}") from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file that has an end, unlike pipes and devices; also yield its size."""
    with explained(f"{path} cannot be read", "make it readable or copy it again"):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is not a regular file")
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size


def _levels(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_levels, inner), default=0)
