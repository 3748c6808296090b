"""What stands in a model folder beside its weights: small files, manifest and card; whether the weights are whole.

The manifest, `fused_merge.json`, says how the folder was made and has the checksums of its files, as
`fused_merge.checkpoints.checksum` defines them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_merge._version import __version__
from fused_merge.checkpoints.checksum import HASH, PIECE, verify_file
from fused_merge.io.files import expanded
from fused_merge.io.formats import ADAPTER_CONFIG
from fused_merge.io.headers import load_json, read_json
from fused_merge.io.sources import INDEX_FILE, FileSource, PathLike
from fused_merge.names import some

MANIFEST = "fused_merge.json"
CARD = "README.md"

# The most bytes of a file that goes along: several times the largest tokenizers.
LARGEST = 100 * 10**6

# Names, in lower case, of files and folders that stay behind by their kind.
STAYS = {
    "training state": (
        *("optimizer*", "scheduler*", "rng_state*", "random_states*", "trainer_state.json", "training_args*"),
        *("*_results.json", "checkpoint-*", "global_step*", "zero_to_fp32.py", "latest", "runs", "wandb", "mlruns"),
        *("*tfevents*", "*.log"),
    ),
    "weights": (
        *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.ckpt.*", "*.h5", "*.msgpack", "*.onnx", "*.onnx_*"),
        *("*.gguf", "*.ggml", "*.tflite", "*.pkl", "*.pickle", "*.npz", "*.distcp", "*.nemo", "*.mlpackage", "*.ot"),
        *("*.index*.json", "adapter_*", "consolidated*", "original"),
    ),
    "unfinished": ("*.part", "*.incomplete", "*.lock"),
}
# Names of what belongs to a tokenizer or processor, or of the folder that it is in.
_TOKENIZER = (
    *("*token*", "*vocab*", "*merges*", "*.model", "*.spm", "*.tiktoken", "*.bpe", "tekken.json", "normalizer.json"),
    *("*chat_template*", "*.jinja", "*process*"),
)


class Beside(NamedTuple):
    """What stands beside the weights of an output."""

    files: Mapping[str, Path | bytes]  # path in the output -> where it is, or what it holds
    left: Mapping[str, str]  # files and folders that stay behind -> why
    config: Mapping[str, Any]  # what the `config.json` among the files says


def beside(
    config_source: FileSource,
    tokenizer_source: FileSource,
    dtype: torch.dtype | None = None,
    config_values: Mapping[str, Any] | None = None,
    adapter: Mapping[str, Any] | None = None,
) -> Beside:
    """Return what stands beside the weights: everything small that is neither weights nor training state.

    Args:
        config_source: whose configuration, code and all else go along.
        tokenizer_source: whose tokenizer, processor and chat template go along, none of the other's.
        dtype: what every dtype in `config.json` is replaced by, also in nested configurations; None leaves them.
        config_values: keys that `config.json` gets, and their values; they replace those of nested configurations, too.
        adapter: the `adapter_config.json` of an output that is an adapter.
    """
    found, left = _small_files(config_source)
    theirs, theirs_left = _small_files(tokenizer_source)
    files: dict[str, Path | bytes] = {name: path for name, path in found.items() if not _is_tokenizer(name)}
    files |= {name: path for name, path in theirs.items() if _is_tokenizer(name)}
    if "chat_template.jinja" in files:
        # Transformers passes over a second template.
        content = _read_object(theirs.get("tokenizer_config.json"))
        if content.pop("chat_template", None) is not None:
            files["tokenizer_config.json"] = _json(content)
    if adapter is not None:
        files[ADAPTER_CONFIG] = _json(adapter)
    if "config.json" not in files:
        return Beside(files, left | theirs_left, {})
    config = dict(config_source.config)
    name, values = str(dtype).removeprefix("torch."), config_values or {}
    changed = config if dtype is None else _replaced(config, {"dtype": name, "torch_dtype": name})
    changed = {**_replaced(changed, values), **values}
    if changed != config:
        files["config.json"] = _json(changed)
    return Beside(files, left | theirs_left, changed)


def has_config(source: FileSource) -> bool:
    """Return whether a source is a folder with a configuration."""
    return source.path.is_dir() and (source.path / "config.json").is_file()


def has_tokenizer(source: FileSource) -> bool:
    """Return whether a source is a folder with a tokenizer."""
    return any(map(_is_tokenizer, _small_files(source)[0]))


def has_chat_template(source: FileSource) -> bool:
    """Return whether a source is a folder with a chat template, in a file of its own or not."""
    files = _small_files(source)[0]
    content = _read_object(files.get("tokenizer_config.json"))
    return bool(content.get("chat_template")) or any("chat_template" in name for name in files)


def _small_files(source: FileSource) -> tuple[dict[str, Path], dict[str, str]]:
    """Return what goes along from a folder, by its path there, and paths of what stays behind with the reasons.

    Passed over without a word: hidden files, what is read as weights, and what an output gets of its own.
    """
    files: dict[str, Path] = {}
    left: dict[str, str] = {}
    known = {*source.files(), *(source.path / name for name in (INDEX_FILE, MANIFEST))}
    if source.adapter is not None:
        known.add(source.path / ADAPTER_CONFIG)

    def walk(folder: Path, above: Sequence[Path]) -> None:
        for path in sorted(folder.iterdir()):
            name = path.relative_to(source.path).as_posix()
            if path.name.startswith(".") or path in known or name.lower() == CARD.lower():
                continue
            if why := _why_it_stays(path, above):
                left[str(path)] = why
            elif path.is_dir():
                walk(path, (*above, path.resolve()))
            else:
                files[name] = path

    if source.path.is_dir():
        walk(source.path, [source.path.resolve()])
    return files, left


def _why_it_stays(path: Path, above: Sequence[Path]) -> str | None:
    """Return why a file or folder stays behind, or None; `above` are the folders that it is in, outermost first."""
    if kind := _kind(path.name):
        return kind
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        return "not readable"
    if path.is_dir():
        resolved = path.resolve()
        if resolved in above or above[0] not in resolved.parents:
            return "a link to another folder"
        names = os.listdir(path)
        another = MANIFEST in names or ("config.json" in names and "weights" in map(_kind, names))
        return "another model" if another else None
    if not path.is_file():
        return "no regular file"
    size = path.stat().st_size
    return f"{size / 1e6:.4g} MB" if size > LARGEST else None


def _kind(name: str) -> str | None:
    kinds = (kind for kind, patterns in STAYS.items() for pattern in patterns if fnmatch(name.lower(), pattern))
    return next(kinds, None)


def _is_tokenizer(name: str) -> bool:
    return any(fnmatch(part, pattern) for part in name.lower().split("/") for pattern in _TOKENIZER)


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
    return _json(content)


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


def card(title: str, about: str, recipe: Mapping[str, Any], library: str) -> bytes:
    """Return a model card: what the folder is, the library that loads it, and the recipe to the last digit."""
    return (
        "---\n"
        f"library_name: {library}\n"
        "tags:\n- merge\n- fused_merge\n"
        "---\n"
        f"# {title}\n\n{about}\n\n"
        f"Made by fused_merge {__version__}. Checksums of all weights are in `{MANIFEST}`.\n\n"
        f"```json\n{json.dumps(recipe, indent=2)}\n```\n"
    ).encode()


def describe_source(source: FileSource) -> dict[str, Any]:
    """Return what a recipe says of an input."""
    return {"path": source.origin, "bytes": {path.name: path.stat().st_size for path in source.files()}}


def _replaced(config: Any, values: Mapping[str, Any]) -> Any:
    """Return a configuration in which values replace those of the same key and type, also in nested ones."""
    if not isinstance(config, dict):
        return config
    return {
        key: values[key] if key in values and isinstance(value, type(values[key])) else _replaced(value, values)
        for key, value in config.items()
    }


def _read_object(path: Path | None) -> dict[str, Any]:
    """Return a JSON object from a file that is not ours to judge, empty if it holds none or is not there."""
    with suppress(ValueError):
        content = None if path is None else read_json(path, finite=False)
        return content if isinstance(content, dict) else {}
    return {}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
