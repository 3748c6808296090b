"""Whose tokenizer goes along, where a file for mergekit says so, and when all are equal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mergekit_files import models


def tokenizer(folder, *words, added=(), **more):
    ids = {word: i for i, word in enumerate(words)}
    content = {"model": {"type": "BPE", "vocab": ids}, "added_tokens": [{"content": x, "id": i} for x, i in added]}
    (Path(folder) / "tokenizer.json").write_text(json.dumps({**content, **more}))


def tokenizer_from(read, more, base="base"):
    return read(models("linear", ("a", "weight: 1"), ("b", "weight: 1"), base=base, more=more)).options[
        "tokenizer_from"
    ]


SOURCES = [("tokenizer_source: {}", "tokenizer_source"), ("tokenizer: {{source: {}}}", "tokenizer")]


@pytest.mark.parametrize(("form", "key"), SOURCES)
def test_a_tokenizer_is_copied_where_all_are_equal(form, key, read):
    assert [tokenizer_from(read, form.format(each)) for each in ("base", "b", "union")] == [
        *map(Path, ("base", "b", "base"))
    ]
    assert tokenizer_from(read, form.format("union"), base=None) == Path("a")
    tokenizer("a", "x", "y", added=[("<s>", 2)])
    # The base has none, and union means one of those that are there.
    assert tokenizer_from(read, form.format("union")) == Path("a")
    # It is the same whatever is done with templates, padding and the order of what is written.
    tokenizer("b", "x", "y", added=[("<s>", 2)], padding={"strategy": "Fixed"}, version="1.0")
    (Path("b") / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
    (Path("b") / "vocab.txt").write_text("x")
    assert tokenizer_from(read, form.format("union") + "\nchat_template: auto") == Path("a")
    assert tokenizer_from(read, form.format("b")) == Path("b")
    message = f"{key} 'base' would have to move tokens, for the tokenizer of 'a' is not that of 'base', and they are"
    with pytest.raises(ValueError, match=message):
        tokenizer_from(read, form.format("base"))
    for other in (["y", "x"], ["x", "y", "z"], ["x"]):
        tokenizer("b", *other, added=[("<s>", 2)])
        message = f"{key} 'union' .* tokenizer of 'b' is not that of 'a', .* one tokenizer, or leave {key} out"
        with pytest.raises(ValueError, match=message):
            tokenizer_from(read, form.format("union"))
    tokenizer("b", "x", "y", added=[("<s>", 3)])
    with pytest.raises(ValueError, match="tokenizer of 'a' is not that of 'b'"):
        tokenizer_from(read, form.format("b"))
    # Nothing is asked for.
    assert tokenizer_from(read, "chat_template: auto") == Path("base")


def test_tokenizers_of_other_kinds(read):
    for kind in ({"vocab": [["x", -1.0], ["y", -2.0]]}, {"vocab": {"y": 1, "x": 0}}):
        tokenizer("a", "x", "y")
        tokenizer("b", model=kind)
        assert tokenizer_from(read, "tokenizer_source: union") == Path("a")
    tokenizer("a", model={"type": "unheard of"})
    with pytest.raises(ValueError, match="tokenizer of 'b' is not that of 'a'"):
        tokenizer_from(read, "tokenizer_source: union")
    tokenizer("b", model={"type": "unheard of"})
    assert tokenizer_from(read, "tokenizer_source: union") == Path("a")
    # Without a tokenizer.json the files of the vocabulary are compared.
    for folder in "ab":
        (Path(folder) / "tokenizer.json").unlink()
        (Path(folder) / "tokenizer.model").write_bytes(b"pieces")
    assert tokenizer_from(read, "tokenizer: {}", base=None) == Path("a")
    (Path("b") / "tokenizer.model").write_bytes(b"others")
    with pytest.raises(ValueError, match="tokenizer 'union' would have to move tokens, for the tokenizer of 'b'"):
        tokenizer_from(read, "tokenizer: {}")
