"""What a folder that was written holds, read without the library."""

from __future__ import annotations

import json
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
