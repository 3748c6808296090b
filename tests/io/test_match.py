"""Which tensors of two models belong together: the rules, each on the smallest models that show it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny import count_reads

from fused_merge.io.match import explain, match
from fused_merge.io.options import PairingOptions
from fused_merge.io.sources import open_files, open_source
from fused_merge.options import resolve

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def weights(**tensors):
    return {name: torch.as_tensor(value, dtype=torch.float32) for name, value in tensors.items()}


def named(names, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name in names}


@pytest.fixture
def folder(tmp_path):
    """Write a model folder and open it."""

    def folder(name, tensors, **config):
        path = tmp_path / name
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config))
        return open_files(path)

    return folder


def pairs(base, tuned, **options):
    return match(open_source(base, role="base"), open_source(tuned, role="tuned"), **options)


def refusal(base, tuned, **options):
    """The sentence with which two models are refused."""
    with pytest.raises(ValueError, match=r"\w") as refused:
        pairs(base, tuned, **options)
    return str(refused.value)


# --- one name


def test_equal_names_in_the_order_of_the_first():
    found = pairs(weights(b=1, a=2), weights(a=5, b=4))
    assert list(found.pairs.items()) == [("b", ("b", "b")), ("a", ("a", "a"))]
    assert (found.aliases, found.only, found.untied, found.shares) == ({}, ((), ()), (), (1.0, 1.0))


def test_of_parameters_alone_buffers_and_integers_are_left_out():
    base, tuned = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2).state_dict()
    assert [*match(open_source(base), open_source(tuned), parameters=True).pairs] == ["weight", "bias"]
    assert len(match(open_source(base), open_source(tuned)).pairs) == 5
    assert [*pairs(weights(a=1) | {"n": torch.tensor(1)}, weights(a=2), parameters=True).pairs] == ["a"]


def test_other_vocabularies_architectures_and_dtypes():
    base = weights(a=[1, 2], b=[[1, 2]])
    rows = weights(a=[1, 2], b=[[1, 2], [3, 4]])
    assert refusal(base, rows).endswith(
        "'b' is [1, 2] and [2, 2]; pass align_vocabulary=True, or resize one model to the vocabulary of the other"
    )
    assert [*pairs(base, rows, align_vocabulary=True).pairs] == ["a", "b"]
    assert refusal(base, weights(a=[1, 2, 3], b=[[1, 2]])).endswith("[3]; both must be of one architecture")
    more = weights(a=[1, 2, 3], b=[[1, 2], [3, 4], [5, 6]])
    assert "'a' has 2 and 3 rows, 'b' has 1 and 3 rows: these are not" in refusal(base, more, align_vocabulary=True)
    half = {name: tensor.half() for name, tensor in base.items()}
    assert len(pairs(base, half).pairs) == 2
    assert "'a' is torch.float32 and torch.float16" in refusal(base, half, same_dtype=True)
    assert "'a' is torch.float32 and torch.int64" in refusal(base, {name: x.long() for name, x in base.items()})


# --- what only one holds


def test_what_is_missing_is_counted_and_named():
    message = refusal(weights(a=[1] * 9, b=2, c=3, d=4, e=5), weights(a=[1] * 9, z=9))
    assert "tuned (state dict) lacks 'b', 'c', 'd' and 1 more of base (state dict); base (state dict) lacks" in message
    found = pairs(weights(a=[1] * 9, b=2), weights(a=[1] * 9, z=9), unmatched="copy")
    assert (found.only, found.shares) == ((("b",), ("z",)), (0.9, 0.9))


@pytest.mark.parametrize("unmatched", ["error", "copy", "drop", "ignore"])
def test_less_than_half_is_no_pair_whatever_becomes_of_the_rest(unmatched):
    small, large = weights(a=[1, 2]), weights(a=[1, 2], b=[3, 4, 5])
    for sides in ((small, large), (large, small)):
        message = refusal(*sides, unmatched=unmatched)
        assert message.startswith("only 40% of the bytes of ")
        assert message.endswith(
            "lacks 'b' of "
            + message.split(" belong")[0].split("bytes of ")[1]
            + "; two models of one architecture are needed"
        )
    assert refusal(small, weights(b=[1, 2]), unmatched=unmatched).startswith(
        "no tensor is in both of base (state dict)"
    )
    assert len(pairs(large, weights(b=[3, 4, 5]), unmatched="copy").pairs) == 1


# --- tied weights


def test_a_tied_weight_that_one_of_two_writes_out():
    tied, written = weights(**{EMBED: [1, 2], NORM: [1, 1]}), weights(**{EMBED: [3, 4], NORM: [1, 1], HEAD: [3, 4]})
    for sides in ((tied, written), (written, tied)):
        found = pairs(*sides)
        assert ([*found.pairs], found.aliases) == ([EMBED, NORM], {HEAD: EMBED})
        assert found.resolve(HEAD) == EMBED
    # In both: two tensors like any other.
    assert len(pairs(written, written).pairs) == 3


def test_tied_storage_meets_either_name():
    tensor = torch.tensor([1.0, 2.0])
    module = {"embed": tensor, "head": tensor}
    for held, alias in (("embed", "head"), ("head", "embed")):
        found = pairs(module, weights(**{held: [3, 4]}))
        assert ([*found.pairs], found.aliases) == ([held], {alias: held})
    assert pairs(module, module).aliases == {"head": "embed"}
    assert [*pairs(module, weights(embed=[3, 4], head=[5, 6])).pairs] == ["embed", "head"]


def test_only_embeddings_and_heads_are_tied():
    """A layer that an upscaled model has twice is a layer, and a fresh norm equals another by accident."""
    small = weights(**{"layers.0.up": [1, 2], "embed": [3, 4], "norm": [1, 1]})
    for more in ({"layers.1.up": [1, 2]}, {"norm_2": [1, 1]}, {"head": [3, 5]}, {"up_2": [1, 2]}):
        assert f"lacks {next(iter(more))!r}" in refusal(small, {**small, **weights(**more)})
    constant = weights(embed=[1, 1], norm=[5, 6])
    assert "lacks 'head'" in refusal(constant, {**constant, **weights(head=[1, 1])})


def test_a_tied_head_is_its_embedding(folder):
    tied, untied = named([EMBED, NORM], 4, 2), named([EMBED, NORM, HEAD], 4, 2, seed=1)
    said = folder("said", tied, tie_word_embeddings=True), folder("silent", tied, model_type="any")
    nested = folder("nested", tied, text_config={"tie_word_embeddings": True})
    tuned = folder("tuned", untied, tie_word_embeddings=False)
    for base in (*said, nested):
        found = match(base, tuned)
        assert (found.pairs[HEAD], found.untied, found.only) == ((EMBED, HEAD), (HEAD,), ((), ()))
        assert match(tuned, base).pairs[HEAD] == (HEAD, EMBED)


def test_a_head_that_nothing_ties_is_missing(folder):
    tied, untied = named([EMBED, NORM], 4, 2), named([EMBED, NORM, HEAD], 4, 2, seed=1)
    tuned = folder("tuned", untied, tie_word_embeddings=False)
    not_tied = folder("not tied", tied, tie_word_embeddings=False)
    two = folder("two", {**tied, **named(["model.embed_images.weight"], 4, 2)}, tie_word_embeddings=True)
    both = folder("both", {**untied, **named(["model.embed_images.weight"], 4, 2)})
    other_size = folder("other size", {**named([EMBED], 4, 3), **named([NORM], 4, 2)}, tie_word_embeddings=True)
    wide = folder("wide", {**untied, **named([EMBED], 4, 3)})
    for base, other in ((not_tied, tuned), (two, both), (other_size, wide)):
        assert explain(base, other, unmatched="copy").only[1] == (HEAD,)
    with pytest.raises(ValueError, match=f"lacks '{HEAD}' of"):
        match(open_source(tied), open_source(untied))


# --- other names


PREFIXES = ["model.", "net.", "bert.", "pretrained_model.", "base_model.model."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_that_one_has(prefix):
    plain = named(["embed.weight", "layers.0.up.weight", "layers.1.up.weight"], 2, 3)
    wrapped = {prefix + name: tensor for name, tensor in named(plain, 2, 3, seed=1).items()}
    for sides in ((plain, wrapped), (wrapped, plain)):
        assert f"; 3 of them would match with strip_prefix={prefix!r}; check the paths" in refusal(*sides)
        found = pairs(*sides, **resolve({"strip_prefix": prefix}, PairingOptions))
        # The first one's own names are those that are written.
        assert [*found.pairs] == [*sides[0]]
        for name, (a, b) in found.pairs.items():
            short = name.removeprefix(prefix)
            ends = [next(x for own, x in end.items() if own.endswith(short)) for end in sides]
            assert found.first[a] is not None
            assert torch.equal(found.first[a], ends[0])
            assert torch.equal(found.second[b], ends[1])


def test_a_prefix_of_each_and_renamed_components():
    first = named(["net.embed.w", "net.layers.0.w"], 2)
    second = named(["bert.embed.w", "bert.layers.0.w"], 2, seed=1)
    assert "2 of them would match with strip_prefix=('net.', 'bert.')" in refusal(first, second)
    assert [*pairs(first, second, strip_prefix=("net.", "bert.")).pairs] == [*first]
    under_both = pairs(first, second, strip_prefix=("net.", "bert."), memory=True)
    assert [*under_both.pairs] == ["embed.w", "layers.0.w"]
    assert [*pairs(first, second, rename={r"^bert\.": "net."}).pairs] == [*first]
    swapped = pairs(named(["a.w", "b.w"], 2), named(["h.0", "h.1"], 2), rename={r"^h\.0$": "a.w", r"^h\.1$": "b.w"})
    assert swapped.only == ((), ())
    assert "'net.embed.w' and 'net.layers.0.w' of base (state dict) would both be called 'x'" in refusal(
        first, second, rename={".*w": "x"}
    )


def test_options_of_names_are_read_once():
    assert resolve({"rename": ["a=b", r"x(\d)=y=\1"], "strip_prefix": "m."}, PairingOptions) == {
        "align_vocabulary": False,
        "strip_prefix": ("m.",),
        "rename": {"a": "b", r"x(\d)": r"y=\1"},
        "any_architecture": False,
    }
    with pytest.raises(
        ValueError, match="rename must be a regular expression and what replaces it, 'layer=layers', got"
    ):
        resolve({"rename": ["a"]}, PairingOptions)


# --- many


def test_no_data_are_read_to_pair_or_refuse_many_tensors(tmp_path, monkeypatch):
    reads = count_reads(monkeypatch)
    for end in ("base", "tuned"):
        names = [f"layers.{i}.{'up' if end == 'base' or i > 400 else 'renamed'}.weight" for i in range(4000)]
        save_file(named([*names, "embed.weight"], 1), tmp_path / f"{end}.safetensors")
    sources = [open_files(tmp_path / f"{end}.safetensors") for end in ("base", "tuned")]
    found = explain(*sources)
    assert (len(found.pairs), *map(len, found.only)) == (3600, 401, 401)
    assert "lacks 'layers.0.renamed.weight', 'layers.1.renamed.weight', 'layers.10" in found.faults[0]
    assert reads == []


# --- what is told


def test_a_report_of_every_kind(folder):
    base = {**named([EMBED, NORM, "mtp.weight"], 4, 2), **named(["net.up"], 64)}
    tuned = {**named([EMBED, NORM, HEAD], 4, 2, seed=1), **named(["net.up"], 64), "tail.weight": torch.ones(2)}
    first = folder("base", base, tie_word_embeddings=True)
    found = explain(first, folder("tuned", tuned, tie_word_embeddings=False), rename={"net.": "model."})
    entries = [(each["kind"], each["first"], each["second"], each["bytes"]) for each in found.report()]
    assert sorted(entries) == [
        ("first only", ["mtp.weight"], [], 32),
        ("same name", [EMBED], [EMBED], 32),
        ("same name", [NORM], [NORM], 32),
        ("same name", ["net.up"], ["net.up"], 256),
        ("second only", [], ["tail.weight"], 8),
        ("untied", [EMBED], [HEAD], 32),
    ]
    written = folder("written", {**base, HEAD: base[EMBED].clone()})
    assert [entry for entry in explain(first, written).report() if entry["kind"] == "tied"] == [
        {"kind": "tied", "name": EMBED, "first": [], "second": [HEAD], "bytes": 32}
    ]
    renamed = explain(
        first, folder("short", {name.removeprefix("model."): x for name, x in base.items()}), strip_prefix=("model.",)
    )
    kinds = {entry["name"]: (entry["kind"], entry["second"]) for entry in renamed.report()}
    assert kinds[EMBED] == ("converted", ["embed_tokens.weight"])
    assert kinds["net.up"] == ("same name", ["net.up"])
