"""Headers of safetensors files, and JSON from outside.

A file is the length of its header (8 bytes, little endian), the header, and the data. The safetensors library reads the
header and verifies it: JSON in UTF-8 of at most 100 MB, dtypes that it knows, and tensors that follow one another
without a gap and fill the file. So their order, dtypes and shapes say where each of them lies. Here is refused what the
library lets through: pipes and devices, which have no end, and tensors that torch cannot hold. Where a name stands
twice in a header, the last one counts, for the library and therefore for us. Where a file system has no mmap, which the
library needs, it is given a copy of the header in a file of the same size.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from fused_merge.io.files import explained

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
# What the safetensors library says, without a number, where a file cannot be mapped.
_NO_MMAP = f"os error {errno.ENODEV}"
# How the file begins that Git leaves where Git LFS has not put the real one.
_POINTER = b"version https://git-lfs"


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


def open_safetensors(path: Path) -> tuple[Any | None, Header]:
    """Open a file with `safe_open`, and read its header but no data; OSError or, if it breaks the rules, ValueError.

    Where the file system has no mmap, None stands for the opened file: what the header says of it is all the same.
    """
    try:
        with _opened(path) as (file, size):
            length = int.from_bytes(file.read(8), "little")
            opened, mapped = _verified(path, file, size, length)
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
        numel = math.prod(shape)
        if code not in DTYPES or len(shape) > _MOST_DIMENSIONS or not 0 < numel < 2**63:
            _check_usable(path, name, code, shape)
        end = place + numel * DTYPES[code].itemsize
        entries[name] = Entry(DTYPES[code], torch.Size(shape), place, end)
        place = end
    return opened if mapped else None, Header(entries, opened.metadata() or {}, 8 + length)


def _check_usable(path: Path, name: str, code: str, shape: Sequence[int]) -> None:
    """Raise ValueError for a tensor that the format allows and that nothing can be done with."""
    # Torch multiplies the sizes up even where one of them is 0.
    odd = len(shape) > _MOST_DIMENSIONS or math.prod(size or 1 for size in shape) >= 2**63
    fault = f"of shape {shape!s:.100}, which torch cannot hold; convert it first" if odd else None
    if code not in DTYPES:
        fault = f"{code}, which torch cannot hold; convert it first"
    if code in ("F4", "F6_E2M3", "F6_E3M2"):
        # Torch has a dtype for pairs of F4, but no arithmetic.
        fault = f"{code}, packed codes that mean nothing without their scales; dequantize the model first"
    if fault is not None:
        raise ValueError(f"{path} cannot be used: {name!r:.200} is {fault}")


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
        if isinstance(value, (dict, list)) and _levels(value) > _MOST_LEVELS:
            raise ValueError("it is nested too deeply")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    return value


def load_json(text: bytes, *, finite: bool = True) -> Any:
    """Parse JSON from outside, by the letter of the standard; ValueError or, if it is too deep, RecursionError.

    A key that stands twice is refused, since readers differ in which one they take, and so is what other readers
    could not read when it is written again: halves of surrogate pairs and, if `finite`, NaN and infinities.
    """
    number = _finite if finite else float
    value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=number, parse_float=number)
    if b"\\u" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text:.20} is no number that JSON can hold")
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r:.200} stands in it twice")
    return values


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file that has an end, unlike pipes and devices; also yield its size."""
    with explained(f"{path} cannot be read", "make it readable or copy it again"):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is not a regular file")
        with open(path, "rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise ValueError("it is a pointer of Git LFS to a file that is not here: run `git lfs pull`")
            file.seek(0)
            yield file, os.fstat(file.fileno()).st_size


def _verified(path: Path, file: BinaryIO, size: int, length: int) -> tuple[Any, bool]:
    """Return what the library makes of a file, and whether it could map that, or else the copy of its header."""
    try:
        return safe_open(path, framework="pt", device="cpu"), True
    except OSError as error:
        if _NO_MMAP not in str(error):
            raise
    with NamedTemporaryFile() as copy:
        file.seek(0)
        copy.write(file.read(8 + min(length, _LONGEST_JSON)))
        copy.flush()
        os.truncate(copy.name, size)
        return safe_open(copy.name, framework="pt", device="cpu"), False


def _levels(value: dict[str, Any] | list[Any]) -> int:
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max((_levels(each) for each in inner if isinstance(each, (dict, list))), default=0)
