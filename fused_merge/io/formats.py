"""Files and folders that hold an adapter, and those in another format than ours, refused as what they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fused_merge.io.headers import read_json
from fused_merge.names import some

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
MERGE_ADAPTER = (
    "merge it into its base first, with merge_checkpoints(base, {adapter: 1.0}, 'task_arithmetic', out) or, in memory, "
    "with merge_and_unload() of PEFT"
)


def adapter_config(path: Path) -> dict[str, Any] | None:
    """Return the configuration of the adapter that a folder or file holds; None for a model, and for lone factors."""
    if path.is_dir():
        # A whole model that an adapter's configuration lies beside is a model.
        config = None if any(path.glob("model*.safetensors*")) else path / ADAPTER_CONFIG
    else:
        config = path.parent / ADAPTER_CONFIG if path.name.startswith("adapter_model") else None
    if config is None or not config.is_file():
        return None
    if isinstance(content := read_json(config, finite=False), dict):
        return content
    raise ValueError(f"{config} is not a JSON object; save the adapter again")


def refuse_other_formats(path: Path) -> None:
    """Raise ValueError for a GGUF file, a folder that holds no model but such files, or an adapter but of LoRA."""
    config = adapter_config(path)
    if config is not None:
        if (kind := config.get("peft_type")) != "LORA":
            raise ValueError(
                f"{path} is an adapter of the type {kind!r}, as {ADAPTER_CONFIG} says, and only LoRA is read; merge it "
                "into its base first, with merge_and_unload() of PEFT"
            )
        return
    if path.is_dir():
        files = [] if any(path.glob("model*.safetensors*")) else sorted(path.glob("*.gguf"))
    else:
        files = [path] if path.is_file() and _begins_with(path, b"GGUF") else []
    if files:
        what = "is a GGUF file" if path == files[0] else f"holds {some(file.name for file in files)}, in GGUF"
        raise ValueError(
            f"{path} {what}, whose tensors are other ones and mostly quantized; take the safetensors checkpoint that "
            f"it was made of, or load it with Transformers and gguf_file={files[0].name!r}, and save that"
        )


def _begins_with(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError:
        # Whoever reads it says why it cannot be read.
        return False
