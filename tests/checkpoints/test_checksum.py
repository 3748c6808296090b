"""The manifest against its definition and its documentation, and damage that is found by name."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
from jobs import FILES, flip
from safetensors.torch import save_file

from fused_merge.checkpoints.folders import verify_checkpoint
from fused_merge.checkpoints.interpolate import interpolate_checkpoints
from fused_merge.io.headers import read_header

PIECE = 2**21


@pytest.fixture
def line(models, tmp_path):
    (folder,) = interpolate_checkpoints(*models, [0.3], tmp_path)
    return folder


def test_the_manifest_has_the_hash_of_every_piece(big, tmp_path):
    sizes = set()
    # Blocks of many sizes, of which none divides a piece but the largest.
    for memory in ("300KB", "700KB", None):
        for folder in interpolate_checkpoints(*big, [0, 0.3], tmp_path, threads=2, max_memory=memory, overwrite=True):
            checksums = json.loads((folder / "fused_merge.json").read_text())["checksums"]
            assert {**checksums, "files": None} == {"hash": "xxh3_64", "piece_bytes": PIECE, "files": None}
            assert sorted(checksums["files"]) == FILES
            for file, found in checksums["files"].items():
                held = (folder / file).read_bytes()
                assert found == [xxhash.xxh3_64_hexdigest(held[at : at + PIECE]) for at in range(0, len(held), PIECE)]
                sizes.add(len(found))
    assert sizes == {2, 3}


def test_the_check_in_the_documentation(big, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "explanation" / "checkpoints.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert code.count("\n") <= 10
    (folder,) = interpolate_checkpoints(*big, [0.2], tmp_path / "line")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    os.truncate(folder / FILES[0], (folder / FILES[0]).stat().st_size + 1)
    with pytest.raises(AssertionError, match=FILES[0]):
        exec(code, {})
    os.truncate(folder / FILES[0], (folder / FILES[0]).stat().st_size - 1)
    flip(folder / FILES[1], 2 * PIECE)
    with pytest.raises(AssertionError, match=rf"'{FILES[1]}', {2 * PIECE}"):
        exec(code, {})


def test_every_bit_of_every_file_is_in_the_checksums(line):
    total = 0
    for name in FILES:
        size = (line / name).stat().st_size
        total += size
        for at in (0, 9, 4095, 4096, size // 2, size - 1):
            flip(line / name, at)
            with pytest.raises(ValueError, match=rf"{name} is not what was written.*; write the folder again$"):
                verify_checkpoint(line)
            flip(line / name, at)
    assert verify_checkpoint(line) == total


def test_the_tensors_of_the_pieces_that_changed_are_named(big, tmp_path):
    (folder,) = interpolate_checkpoints(*big, [0.3], tmp_path / "out")
    path = folder / FILES[1]
    header = read_header(path)
    # Its last tensor begins in its first piece.
    assert [header.data + header.entries["1.weight"].start < PIECE, path.stat().st_size > 2 * PIECE] == [True, True]
    flip(path, 2 * PIECE)
    with pytest.raises(ValueError, match=r"written, in pieces that hold '1\.weight'; write"):
        verify_checkpoint(folder)
    flip(path, header.data)
    with pytest.raises(ValueError, match=r"written, in pieces that hold '1\.steps', '1\.norm', '1\.weight'; write"):
        verify_checkpoint(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"r0\.30/b\.safetensors is missing; write the folder again"),
        *((lambda path, size=size: os.truncate(path, size), r"b\.safetensors is not what was written; write the folder")
          for size in (9000, 0)),
        (lambda path: shutil.copy(path.with_name("a.safetensors"), path),
         r"b\.safetensors is not what was written, in pieces that hold '0\.steps', '0\.norm', '0\.weight'; write"),
        (lambda path: shutil.copy(path, path.with_name("c.safetensors")),
         r"r0\.30 holds c\.safetensors, which fused_merge\.json does not list; remove it or write it again"),
    ],
)  # fmt: skip
def test_damage_is_found_by_name(damage, message, line):
    damage(line / FILES[1])
    with pytest.raises(ValueError, match=message):
        verify_checkpoint(line)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"plan"', ""), ("b.safetensors", "../b.safetensors"), ("xxh3_64", "md5"), ("2097152", "1"), ("piece_bytes", "x")],
)
def test_a_manifest_that_is_none(old, new, line):
    path = line / "fused_merge.json"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=r"fused_merge\.json is not a manifest of this version \(.*\); write"):
        verify_checkpoint(line)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"r0\.30 has no fused_merge\.json, so nothing says what it"):
        verify_checkpoint(line)


def test_without_xxhash_it_is_a_hash_of_the_standard_library(tmp_path):
    """In another process: which one it is is decided once."""
    base, tuned = ({"w": torch.full((5,), float(i))} for i in range(2))
    for name, tensors in (("a", base), ("b", tuned)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    code = (
        "import sys; sys.modules['xxhash'] = None\n"
        "import fused_merge as fm\n"
        "from fused_merge.checkpoints.folders import verify_checkpoint\n"
        f"(out,) = fm.interpolate_checkpoints({str(tmp_path / 'a.safetensors')!r}, {str(tmp_path / 'b.safetensors')!r},"
        f" [0.5], {str(tmp_path / 'out')!r}, progress=False)\n"
        "print(verify_checkpoint(out))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    folder = tmp_path / "out" / "r0.50"
    assert int(done.stdout) == (folder / "model.safetensors").stat().st_size, done.stderr
    checksums = json.loads((folder / "fused_merge.json").read_text())["checksums"]
    content = (folder / "model.safetensors").read_bytes()
    assert checksums["hash"] == "blake2b_64"
    assert checksums["files"] == {"model.safetensors": [hashlib.blake2b(content, digest_size=8).hexdigest()]}
    with pytest.raises(ValueError, match="its checksums are blake2b_64, and xxh3_64 is what can be computed here"):
        verify_checkpoint(folder)
