"""Two small checkpoints, jobs on them, and ways to disturb those; for the tests of `fused_merge.checkpoints`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fused_merge.checkpoints import disk, job
from fused_merge.checkpoints.interpolate import interpolate_checkpoints

RATIOS = [0.0, 0.3]
NAMES = ["r0.00", "r0.30"]
WORK = ".fused_merge.part"
FILES = ["a.safetensors", "b.safetensors"]


def write_model(folder: Path, seed: int, rows: int) -> Path:
    """Files of weights, norms, integers and tensors without elements, an index and a configuration."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    places = {}
    for i, file in enumerate(FILES):
        tensors = {
            f"{i}.weight": torch.randn((1 + i) * rows, 257, generator=generator).bfloat16(),
            f"{i}.norm": torch.randn(7, generator=generator),
            f"{i}.steps": torch.tensor([seed, i]),
            f"{i}.empty": torch.zeros(0, 4),
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps({"seed": seed}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and every folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@contextmanager
def patched(owner: object, name: str, replacement: Callable) -> Iterator[None]:
    """Replace a function; the replacement is called with the original first."""
    original = getattr(owner, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, lambda *args, **options: replacement(original, *args, **options))
        yield


def refuse(reason: int) -> Callable:
    """What replaces a function, with `patched`, that the operating system refuses for a reason."""

    def refused(*_, **__):
        raise OSError(reason, os.strerror(reason))

    return refused


@contextmanager
def unhurried() -> Iterator[None]:
    """Wait for no disk: a process that ends loses nothing that it has written to the page cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(disk, "_DIRECT", 0)
        yield


class DeadError(BaseException):
    """What ends a job as a kill would, as far as the job can tell."""


def leave_unfinished(models, ratios, out) -> None:
    """Let a job die after the first file."""

    def fail(original, file, *args):
        if file.name != FILES[0]:
            raise DeadError
        return original(file, *args)

    with patched(job, "write_file", fail), pytest.raises(DeadError):
        interpolate_checkpoints(*models, ratios, out, threads=1, overwrite=True)


def flip(path: Path, at: int) -> None:
    """Change one bit, and neither size nor time."""
    stamp, held = path.stat(), bytearray(path.read_bytes())
    held[at] ^= 4
    path.write_bytes(held)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


def open_handles() -> int:
    return len(os.listdir("/dev/fd"))


def stop_before_the_name_of(folder: Path, run: Callable[[], object]) -> None:
    """Let a run die when everything is written, and the folders before this one have their names."""

    def stop(replace, source, target):
        if Path(target) == folder:
            raise DeadError
        replace(source, target)

    with patched(os, "replace", stop), pytest.raises(DeadError):
        run()


def count_bytes_read(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> list[tuple[Path, int, int]]:
    """Return a list that every read of one of the modules is added to, as (path, offset, bytes)."""
    reads: list[tuple[Path, int, int]] = []
    read = modules[0].read_into

    def counted(handle, path, view, at):
        reads.append((path, at, len(view)))
        read(handle, path, view, at)

    for module in modules:
        monkeypatch.setattr(module, "read_into", counted)
    return reads
