"""A small real model and its checkpoints, for tests of everything that reads or writes them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fused_merge.io.sources import FileSource


def llama(seed: int, *, tied: bool = True, vocabulary: int = 48, dtype: torch.dtype = torch.float32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def save(model, folder: Path, shard: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def count_reads(monkeypatch) -> list[tuple[str, str]]:
    """Return a list that every whole tensor read from a file is added to, as (origin, name)."""
    reads: list[tuple[str, str]] = []
    read = FileSource.__getitem__

    def counted(self, name):
        reads.append((self.origin, name))
        return read(self, name)

    monkeypatch.setattr(FileSource, "__getitem__", counted)
    return reads


def write_raw(path: Path, header: dict[str, object] | bytes, data: bytes = b"") -> Path:
    """A safetensors file that says whatever it is told to say."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path
