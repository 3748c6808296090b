"""Files and folders that hold a model in another format than ours, refused as what they are."""

from __future__ import annotations

from pathlib import Path

from fused_merge.names import some

_ADAPTER = "adapter_config.json"
MERGE_ADAPTER = (
    "merge it into its base first, with PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained"
)


def refuse_other_formats(path: Path) -> None:
    """Raise ValueError for a GGUF file, or a folder that holds no model but an adapter or such files."""
    if path.is_dir():
        if any(path.glob("model*.safetensors*")):
            return
        if (path / _ADAPTER).exists():
            raise ValueError(f"{path} is an adapter, as its {_ADAPTER} says; {MERGE_ADAPTER}")
        files = sorted(path.glob("*.gguf"))
    else:
        if path.name.startswith("adapter_model") and (path.parent / _ADAPTER).exists():
            raise ValueError(f"{path} is an adapter, as the {_ADAPTER} beside it says; {MERGE_ADAPTER}")
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
