"""A tokenizer for the models of `tiny.llama`: one token for each word."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


def tokenizer() -> PreTrainedTokenizerFast:
    """Words are `w3` to `w47`; any other is 0."""
    words = Tokenizer(WordLevel({"<u>": 0, "<p>": 1, "<e>": 2} | {f"w{i}": i for i in range(3, 48)}, unk_token="<u>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<u>", pad_token="<p>", eos_token="<e>")
