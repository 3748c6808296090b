"""What stands in a model folder beside its weights: companions, manifest and card; and whether the weights are whole.

The manifest, `fused_merge.json`, says how the folder was made and has the checksum of every tensor, as
`fused_merge.checkpoints.checksum` defines it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from fused_merge._version import __version__
from fused_merge.checkpoints.checksum import checksums, text
from fused_merge.checkpoints.disk import read_blocks
from fused_merge.io.headers import load_json, read_header, read_json
from fused_merge.io.sources import FileSource, PathLike
from fused_merge.names import some

MANIFEST = "fused_merge.json"
CARD = "README.md"

# What a model folder needs beside its weights, and nothing that only its training left there.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "*tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*chat_template*",
    "*processor_config.json",
    "*.py",
)


def companions(source: FileSource, dtype: torch.dtype | None) -> dict[str, Path | bytes]:
    """Return the files of a folder that a model needs beside its weights: where they are, or what they become.

    Args:
        source: a folder, or a single file, which has none.
        dtype: what the weights are converted to, which the configuration then says; None if they are not.

    Raises:
        ValueError: if `config.json` is not JSON.
    """
    if not source.path.is_dir():
        return {}
    found: dict[str, Path | bytes] = {
        path.name: path
        for path in sorted(source.path.iterdir())
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _COMPANIONS)
    }
    if dtype is not None and "config.json" in found:
        config = _with_dtype(read_config(source.path), str(dtype).removeprefix("torch."))
        found["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Return the parsed `config.json` of a folder, empty if there is none.

    Raises:
        ValueError: if it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object; download it again")
    return config


def manifest(recipe: Mapping[str, Any], plan: str, checksums: Mapping[str, Mapping[str, str]]) -> bytes:
    """Return the text of a manifest.

    Args:
        recipe: how the folder was made.
        plan: identity of the job that made it.
        checksums: file -> tensor -> checksum.
    """
    content = {
        "fused_merge": __version__,
        "recipe": recipe,
        "plan": plan,
        "checksums": checksums,
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def made_by(folder: Path) -> str | None:
    """Return the identity of the job that made a folder, or None if no finished one did."""
    try:
        plan = load_json((folder / MANIFEST).read_bytes())["plan"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return plan if isinstance(plan, str) else None


def verify_checkpoint(folder: PathLike) -> int:
    """Read every tensor of a folder from the disk again and compare it with the checksums of its manifest.

    Args:
        folder: written by `interpolate_checkpoints` or `merge_checkpoints`.

    Returns:
        The bytes that were read.

    Raises:
        FileNotFoundError: if there is no manifest.
        ValueError: if a tensor or file is missing or has changed; the sentence names it.
        OSError: if a file cannot be read.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {MANIFEST}, so nothing says what it should hold; write it again")
    try:
        files = {file: dict(tensors) for file, tensors in load_json(path.read_bytes())["checksums"].items()}
        if any(Path(file).name != file for file in files):
            raise ValueError("a file outside the folder")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest of this library ({error}); write the folder again") from error
    return sum(verify_file(folder / file, expected) for file, expected in files.items())


def verify_file(path: Path, expected: Mapping[str, str]) -> int:
    """Read every tensor of a file from the disk again and compare it with its checksum; returns the bytes read.

    Raises:
        ValueError: if the file is missing or broken, or a tensor is missing, unknown or changed.
        OSError: if it cannot be read.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing; write the folder again")
    header = read_header(path)
    if odd := sorted(header.entries.keys() ^ expected.keys()):
        raise ValueError(f"{path} and its manifest differ in {some(map(repr, odd))}; write the folder again")
    read = 0
    for name, entry in header.entries.items():
        found, offset = torch.zeros(1, 2, dtype=torch.int64), 0
        for block in read_blocks(path, header.data + entry.start, entry.end - entry.start):
            found += checksums(block[None], offset)
            offset += len(block)
        if text(found) != [expected[name]]:
            raise ValueError(f"{name!r} in {path} is not what was written; write the folder again")
        read += entry.end - entry.start
    return read


def card(title: str, about: str, recipe: Mapping[str, Any]) -> bytes:
    """Return a model card: what the folder is, and the recipe to the last digit."""
    return (
        "---\n"
        "library_name: transformers\n"
        "tags:\n- merge\n- fused_merge\n"
        "---\n"
        f"# {title}\n\n{about}\n\n"
        f"Made by fused_merge {__version__}. Checksums of all tensors are in `{MANIFEST}`.\n\n"
        f"```json\n{json.dumps(recipe, indent=2)}\n```\n"
    ).encode()


def describe_source(source: FileSource) -> dict[str, Any]:
    """Return what a recipe says of an input."""
    return {"path": source.origin, "bytes": {path.name: path.stat().st_size for path in source.files()}}


def _with_dtype(config: Any, dtype: str) -> Any:
    """Return a configuration, also nested ones, that says what the weights are converted to."""
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in ("dtype", "torch_dtype") and isinstance(value, str) else _with_dtype(value, dtype)
        for key, value in config.items()
    }
