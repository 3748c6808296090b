"""What stands in a model folder beside its weights: sidecar files, manifest and card; whether the weights are whole.

The manifest, `fused_merge.json`, says how the folder was made and has the checksums of its files, as
`fused_merge.checkpoints.checksum` defines them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from fused_merge._version import __version__
from fused_merge.checkpoints.checksum import HASH, PIECE, verify_file
from fused_merge.io.files import expanded
from fused_merge.io.headers import load_json, read_json
from fused_merge.io.sources import FileSource, PathLike
from fused_merge.names import some

MANIFEST = "fused_merge.json"
CARD = "README.md"

# What a model folder needs beside its weights, and nothing that only its training left there.
_SIDECAR_FILES = (
    *("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("*tokenizer*", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken"),
    *("*chat_template*", "*processor_config.json", "*.py"),
)


def sidecar_files(source: FileSource, dtype: torch.dtype | None) -> dict[str, Path | bytes]:
    """Return the files that a model needs beside its weights: where they are, or the content that names a dtype."""
    if not source.path.is_dir():
        return {}
    found: dict[str, Path | bytes] = {
        path.name: path
        for path in sorted(source.path.iterdir())
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in _SIDECAR_FILES)
    }
    if dtype is not None and "config.json" in found:
        config = _with_dtype(read_config(source.path), str(dtype).removeprefix("torch."))
        found["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Return the parsed `config.json` of a folder, empty if there is none; ValueError if it is no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    if isinstance(config := read_json(path), dict):
        return config
    raise ValueError(f"{path} is not a JSON object; download it again")


def manifest(
    recipe: Mapping[str, Any],
    plan: str,
    digests: Mapping[str, Sequence[str]],
    not_finite: Mapping[str, Sequence[int]] | None = None,
) -> bytes:
    """Return a manifest: recipe and identity of the job that made the folder, and file -> digests of its pieces.

    `not_finite` maps names of merged tensors to two counts of elements that are not finite: since an input is not, and
    since the result is too large for its dtype.
    """
    checksums = {"hash": HASH, "piece_bytes": PIECE, "files": digests}
    content = {"fused_merge": __version__, "recipe": recipe, "plan": plan, "checksums": checksums}
    if not_finite:
        causes = ("inputs", "overflow")
        content["not_finite"] = {name: dict(zip(causes, own, strict=True)) for name, own in not_finite.items()}
    return (json.dumps(content, indent=2) + "\n").encode()


def made_by(folder: Path) -> str | None:
    """Return the identity of the job that made a folder, or None if no finished one did."""
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
        plan = load_json((folder / MANIFEST).read_bytes())["plan"]
        return plan if isinstance(plan, str) else None
    return None


def verify_checkpoint(folder: PathLike) -> int:
    """Read the weights that a job wrote to a folder again, compare them with its checksums, and return their bytes.

    Raises:
        FileNotFoundError: if there is no manifest.
        ValueError: if a file is missing, changed or not listed; the sentence names it, and tensors that changed.
        OSError: if a file cannot be read.
    """
    folder = expanded(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {MANIFEST}, so nothing says what it should hold; write it again")
    try:
        checksums = load_json(path.read_bytes())["checksums"]
        files = {file: list(digests) for file, digests in checksums["files"].items()}
        if (checksums["hash"], checksums["piece_bytes"]) != (HASH, PIECE):
            raise ValueError(f"its checksums are {checksums['hash']}, and {HASH} is what can be computed here")
        if any(Path(file).name != file for file in files):
            raise ValueError("a file outside the folder")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest of this version ({error}); write the folder again") from error
    if extra := sorted({file.name for file in folder.glob("*.safetensors")} - files.keys()):
        raise ValueError(f"{folder} holds {some(extra)}, which {MANIFEST} does not list; remove it or write it again")
    return sum(verify_file(folder / file, digests) for file, digests in files.items())


def card(title: str, about: str, recipe: Mapping[str, Any]) -> bytes:
    """Return a model card: what the folder is, and the recipe to the last digit."""
    return (
        "---\n"
        "library_name: transformers\n"
        "tags:\n- merge\n- fused_merge\n"
        "---\n"
        f"# {title}\n\n{about}\n\n"
        f"Made by fused_merge {__version__}. Checksums of all weights are in `{MANIFEST}`.\n\n"
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
