"""The header of a safetensors file, read with suspicion.

A file is the length of its header (8 bytes, little endian), the header, and the data. The header is a JSON object in
UTF-8, padded with spaces: for each tensor its dtype, its shape, and where its bytes begin and end in the data; under
`__metadata__` free-form strings. The bytes of the tensors lie one after the other and fill the file.

Nothing that a header says is believed before all of it has been held against the size of the file, so that whoever
reads by these offsets stays inside it.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

# The codes of the format that torch can hold.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}

METADATA = "__metadata__"
# As in the safetensors library, which reads no longer headers; no index comes near it.
_LONGEST_JSON = 100_000_000
# An index has two levels. Deeper ones may be read and, further down the stack, not written again.
_MOST_LEVELS = 100
# Those that every operation of torch takes; a list of a million sizes would only keep us multiplying.
_MOST_DIMENSIONS = 64


class Entry(NamedTuple):
    """What a header says of one tensor; `start` and `end` are bytes from the beginning of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    """A header that fits its file; `data` is where the data begin in the file."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data: int


class _UnheldDtypeError(ValueError):
    pass


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file and verify it against the file; reads no data.

    Raises:
        OSError: if the file cannot be opened or read; the sentence names it.
        ValueError: if it is no regular file, or the header is not what the format says; the sentence names the file.
    """
    try:
        with _opened(path) as (file, size):
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, _LONGEST_JSON):
                raise ValueError(f"its header cannot have {length} of its {size} bytes")
            text = file.read(length)
        return _parse(text, size)
    except _UnheldDtypeError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file ({error}); copy or download it again") from error


def read_json(path: Path) -> Any:
    """Read a JSON file from outside, as `load_json` parses it.

    Raises:
        OSError: if the file cannot be opened or read; the sentence names it.
        ValueError: if it is no regular file, longer than 100 MB, nested more than 100 levels deep, or not JSON; the
            sentence names the file.
    """
    try:
        with _opened(path) as (file, size):
            if size > _LONGEST_JSON:
                raise ValueError(f"it has {size} bytes")
            value = load_json(file.read(size))
        if _levels(value) > _MOST_LEVELS:
            raise ValueError("it is nested too deeply")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    return value


def encode_header(entries: Mapping[str, Entry], metadata: Mapping[str, str], *, multiple: int = 8) -> bytes:
    """Return the bytes that stand before the data: length, header, and spaces up to a `multiple` of bytes."""
    listed: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    for name, (dtype, shape, start, end) in entries.items():
        listed[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(listed, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // multiple) * multiple - 8
    return struct.pack("<Q", length) + text.ljust(length)


def load_json(text: bytes) -> Any:
    """Parse JSON from outside, by the letter of the standard.

    A key that stands twice is refused, since readers differ in which one they take, and so is what other readers
    could not read when it is written again: NaN, infinities, and halves of surrogate pairs.

    Raises:
        ValueError: if it is not such JSON in UTF-8.
        RecursionError: if it is nested too deeply.
    """

    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"{twice!r:.200} stands in it twice")
        return values

    def integer(digits: str) -> float:
        # The library of the format takes −0 for a float, and no float for a size.
        return -0.0 if digits == "-0" else int(digits)

    value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_int=integer)
    json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    return value


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file that has an end, unlike pipes and devices; also yield its size."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is not a regular file")
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror or error}; make it readable or copy it again") from error


def _levels(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_levels, inner), default=0)


def _parse(text: bytes, size: int) -> Header:
    listed = load_json(text)
    if not isinstance(listed, dict) or not text.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    metadata = listed.pop(METADATA, None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{METADATA!r} maps not only strings to strings")
    entries = {name: _entry(name, entry) for name, entry in listed.items()}
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != place:
            raise ValueError(f"{name!r:.200} begins at byte {entry.start} of the data, where {place} was expected")
        place = entry.end
    held = size - 8 - len(text)
    if place != held:
        raise ValueError(f"its tensors take {place} bytes, and the file holds {held}")
    return Header(entries, metadata, 8 + len(text))


def _entry(name: str, entry: Any) -> Entry:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r:.200} has not just dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    # Torch multiplies the sizes up even where one of them is 0.
    held = _are_sizes(shape) and len(shape) <= _MOST_DIMENSIONS and prod(size or 1 for size in shape) < 2**63
    if not held or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r:.200} has a shape or offsets that no tensor has")
    if not isinstance(code, str) or not code.isidentifier():
        raise ValueError(f"{name!r:.200} has no dtype")
    if code not in DTYPES:
        raise _UnheldDtypeError(f"{name!r:.200} is {code:.20}, which torch cannot hold; convert it first")
    dtype = DTYPES[code]
    start, end = offsets
    if prod(shape) * dtype.itemsize != end - start:
        raise ValueError(f"{name!r:.200} is {code} of {shape}, and its offsets {offsets} span another number of bytes")
    return Entry(dtype, tuple(shape), start, end)


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
