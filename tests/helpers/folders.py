"""What a folder that was written holds, read without the library, and what its permissions forbid."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, whatever its files."""
    return {name: x for file in sorted(Path(folder).glob("*.safetensors")) for name, x in load_file(file).items()}


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "fused_merge.json").read_text())


def recipe_of(folder: Path) -> dict[str, Any]:
    return manifest_of(folder)["recipe"]


def everything_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def bound_by_permissions(call: Callable[[], object]) -> None:
    """Call in a thread that may open and write only what permissions allow, also where the user is root on Linux."""

    def bound():
        if sys.platform == "linux":
            # Linux keeps capabilities by thread: the header is version 3 and "this thread", then come the sets
            # effective, permitted and inheritable, whose bits 1 and 2 override permissions.
            libc = ctypes.CDLL(None)
            header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
            assert libc.capget(header, sets) == 0
            sets[:2] = [bits & ~0b110 for bits in sets[:2]]
            assert libc.capset(header, sets) == 0
        call()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(bound).result()
