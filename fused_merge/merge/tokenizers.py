"""Which token each row of an embedding stands for, as the files of a tokenizer say it."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fused_merge.io.headers import read_json

_VOCABULARY = ("vocab.json", "vocab.txt", "*.model", "*.spm", "*.tiktoken", "tekken.json", "added_tokens.json")


def vocabulary(folder: Path) -> Any:
    """Return what two folders have in common if rows of their embeddings stand for the same tokens.

    That is the id of each token in `tokenizer.json`, or, where there is none, the bytes of the files that hold the
    vocabulary; None for a folder without either. What else a tokenizer does, such as to truncate, pad or fill a chat
    template, does not count.

    Raises ValueError if `tokenizer.json` is not JSON, OSError if a file cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        names = sorted(file.name for file in folder.iterdir() if any(fnmatch(file.name, each) for each in _VOCABULARY))
        return {name: (folder / name).read_bytes() for name in names} or None
    content = read_json(path)
    try:
        tokens = content["model"]["vocab"]
        # A list of tokens and scores for models of the kind "Unigram".
        ids = dict(tokens) if isinstance(tokens, dict) else {token: i for i, (token, _) in enumerate(tokens)}
        return ids | {added["content"]: added["id"] for added in content.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError):
        return content
