"""Which tensors several checkpoints have in common, and where the elements of each lie."""

from __future__ import annotations

import json
import re
from itertools import product
from math import prod

import pytest
import torch
from bad_json import fuzz
from bits import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fused_merge.checkpoints.align import align
from fused_merge.checkpoints.options import PlanOptions
from fused_merge.checkpoints.plan import AlignedTensor, CopyRule, lay_out_files
from fused_merge.io.headers import read_header
from fused_merge.io.sources import open_files
from fused_merge.options import resolve

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def vary(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def source(tmp_path):
    """Write a folder and open it; the tensors of a list are those of one file each."""

    def source(name, *files, config=None):
        folder = tmp_path / name
        folder.mkdir()
        shards = {f"model-{i}.safetensors": tensors for i, tensors in enumerate(files)}
        if len(files) == 1:
            shards = {"model.safetensors": files[0]}
        else:
            weight_map = {key: file for file, tensors in shards.items() for key in tensors}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        for file, tensors in shards.items():
            save_file(tensors, folder / file, {"from": f"{name} {file}"})
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return open_files(folder)

    return source


def aligned(*sources, config_source=0, **options):
    return {tensor.name: tensor for tensor in align(sources, config_source, resolve(options, PlanOptions)).tensors}


def held(segment):
    """What a segment finds in each of its files."""
    return [
        torch.tensor(list(file.read_bytes()[offset:][: segment.numel * dtype.itemsize]), dtype=torch.uint8).view(dtype)
        for file, offset, dtype in segment.inputs
    ]


# --- tensors that all hold


def assert_held(segment, *expected):
    """Assert that a segment finds these elements in its files."""
    for got, want in zip(held(segment), expected, strict=True):
        assert same_bits(got, want.flatten())


def test_a_tensor_is_where_each_file_has_it(source):
    w, n = [vary(3, 5, seed=i) for i in range(3)], [torch.arange(4) + i for i in range(3)]
    base = source("base", {"w": w[0]}, {"n": n[0]})
    found = aligned(base, source("a", {"n": n[1], "w": w[1]}), source("b", {"n": n[2]}, {"w": w[2]}))
    assert [*found] == ["w", "n"]
    assert found["w"] == AlignedTensor("w", torch.float32, (3, 5), found["w"].segments)
    (of_w,), (of_n,) = found["w"].segments, found["n"].segments
    assert [of_w[::2], of_n[::2]] == [(15, True), (4, False)]
    assert_held(of_w, *w)
    assert_held(of_n, *n)


def test_dtypes_must_agree_unless_one_is_asked_for(source):
    base, a = source("base", {"w": vary(3, seed=0)}), source("a", {"w": vary(3, seed=1, dtype=torch.float16)})
    message = r"'w' is torch.float32 in .*base and torch.float16 in .*a; say which to write with dtype='bfl"
    with pytest.raises(ValueError, match=message):
        aligned(base, base, a)
    found = aligned(base, a, dtype=torch.bfloat16)["w"]
    assert found.dtype == torch.bfloat16
    assert [file_range.dtype for file_range in found.segments[0].inputs] == [torch.float32, torch.float16]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_integers_keep_their_dtype_and_must_agree_and_copies_are_converted(source, dtype):
    base, a = source("base", {"n": torch.arange(9)}), source("a", {"n": torch.arange(9).int()})
    more = source("more", {"n": torch.arange(9), "x": vary(3, seed=1), "copied": torch.arange(2)})
    found = aligned(base, more, unmatched="copy", dtype=dtype)
    dtypes = {"n": torch.int64, "x": dtype or torch.float32, "copied": torch.int64}
    assert {name: tensor.dtype for name, tensor in found.items()} == dtypes
    message = r"'n' is torch.int64 in .*base and torch.int32 in .*a; use one architecture"
    with pytest.raises(ValueError, match=message):
        aligned(base, a, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_what_cannot_be_merged_can_be_copied(source, dtype):
    odd = vary(2, seed=0).to(dtype)
    base, a = source("base", {"w": vary(8, seed=1), "odd": odd}), source("a", {"w": vary(8, seed=2)})
    with pytest.raises(ValueError, match=f"'odd' of .*base is {dtype}, which cannot be merged; convert it to"):
        aligned(base, base)
    found = aligned(base, a, unmatched="copy")["odd"]
    assert (found.dtype, found.segments[0].merged) == (dtype, False)
    assert [*aligned(base, a, unmatched="drop")] == ["w"]
    # There is no telling what its numbers mean in another dtype.
    with pytest.raises(ValueError, match=f"'odd' of .*base is {dtype}, which cannot be merged"):
        aligned(base, a, unmatched="copy", dtype=torch.bfloat16)


# --- tensors that only some hold


def test_what_not_all_hold_is_refused_dropped_or_copied(source):
    common = {"w": vary(3, seed=0)}
    base = source("base", {**common, "x": vary(2, seed=1), "z": vary(2, seed=2)})
    a = source("a", {**common, "y": vary(2, seed=3), "z": vary(2, seed=4)})
    b = source("b", {**common, "x": vary(2, seed=5), "y": vary(2, seed=6)})
    with pytest.raises(ValueError, match=r"a lacks 'x' of .*base; .*base lacks 'y' of .*a; both must hold the same"):
        aligned(base, a, b)
    assert [*aligned(base, a, b, unmatched="drop")] == ["w"]

    for config_source, homes in ((0, "base base a"), (1, "base a a"), (2, "b base b")):
        found = aligned(base, a, b, config_source=config_source, unmatched="copy")
        assert {*found} == {"w", "x", "y", "z"}
        assert next(iter(found)) == "w"
        for name, home in zip("xzy", homes.split(), strict=True):
            (segment,) = found[name].segments
            assert (segment.merged, segment.numel) == (False, 2)
            assert [file_range.file.parent.name for file_range in segment.inputs] == [home]
            assert_held(segment, {"base": base, "a": a, "b": b}[home][name])


def test_nothing_in_common(source):
    base, a, empty = source("base", {"x": vary(3, seed=0)}), source("a", {"y": vary(3, seed=0)}), source("empty", {})
    with pytest.raises(ValueError, match=r"no tensor is in both of .*base and .*a; check the paths"):
        aligned(base, a, unmatched="drop")
    with pytest.raises(ValueError, match=r"no tensor is in both of .*empty and .*empty; check the paths"):
        aligned(empty, empty)


# --- tied weights


def checkpoints(kinds, source):
    """Each holds the embedding without a head, with a tied head, or with another one."""
    sources, tensors = [], []
    for i, kind in enumerate(kinds):
        embed = vary(4, 3, seed=i)
        head = {"absent": None, "tied": embed.clone(), "apart": vary(4, 3, seed=i + 100)}[kind]
        tensors.append({EMBED: embed, NORM: torch.ones(4)} | ({} if head is None else {HEAD: head}))
        sources.append(source(f"{i} {kind}", tensors[-1]))
    return sources, tensors


@pytest.mark.parametrize("kinds", [*product(["absent", "tied", "apart"], repeat=3)], ids="-".join)
def test_tied_heads_in_every_combination(kinds, source):
    sources, tensors = checkpoints(kinds, source)
    # A head of its own has no counterpart in a checkpoint without one.
    if (kinds[0] == "absent" and "apart" in kinds) or (kinds[0] == "apart" and "absent" in kinds):
        with pytest.raises(ValueError, match=f"lacks '{HEAD}' of .*; both must hold the same tensors, tied copies"):
            aligned(*sources)
    else:
        found = aligned(*sources)
        # Written where the first writes it, from what each has for it.
        assert {*found} == {EMBED, NORM} | ({HEAD} if kinds[0] != "absent" else set())
        if HEAD in found:
            assert_held(found[HEAD].segments[0], *(own.get(HEAD, own[EMBED]) for own in tensors))
    for config_source in range(3):
        # A head of its own is never lost in a copy.
        found = aligned(*sources, config_source=config_source, unmatched="copy")
        assert (HEAD in found) == (kinds[0] != "absent" or "apart" in kinds)
        if HEAD in found and not found[HEAD].segments[0].merged:
            (copied,) = held(found[HEAD].segments[0])
            assert any(same_bits(copied, own[HEAD].flatten()) for own in tensors if HEAD in own)


def test_a_checkpoint_that_keeps_the_other_of_two_tied_names(source):
    embed, head = vary(4, 3, seed=0), vary(4, 3, seed=1)
    found = aligned(source("base", {EMBED: embed, HEAD: embed.clone()}), source("a", {HEAD: head}))
    assert {*found} == {EMBED, HEAD}
    assert_held(found[EMBED].segments[0], embed, head)
    assert_held(found[HEAD].segments[0], embed, head)


@pytest.mark.parametrize(("tie", "written"), [(False, True), (True, False), (None, False)])
def test_a_head_that_only_happens_to_be_the_embedding_is_written(tie, written, source):
    embed = vary(4, 3, seed=0)
    base = source("base", {EMBED: embed}, config={"tie_word_embeddings": True})
    config = {} if tie is None else {"tie_word_embeddings": tie}
    a = source("a", {EMBED: embed, HEAD: embed.clone()}, config=config)
    assert (HEAD in aligned(base, a, config_source=1)) == written
    assert {*aligned(a, base)} == {EMBED, HEAD}


def test_a_head_of_its_own_meets_the_embeddings_of_models_that_tie_it(source):
    embeds = [vary(4, 3, seed=i) for i in range(3)]
    head = vary(4, 3, seed=9)
    base, tied = (source(f"{i}", {EMBED: embeds[i]}, config={"tie_word_embeddings": True}) for i in (0, 2))
    untied = source("1", {EMBED: embeds[1], HEAD: head}, config={"tie_word_embeddings": False})
    for sources, held_by in (((base, untied, tied), (0, None, 2)), ((untied, tied, base), (None, 2, 0))):
        found = aligned(*sources)
        assert [*found] == [EMBED, HEAD] or [*found] == [HEAD, EMBED]
        assert_held(found[HEAD].segments[0], *(head if i is None else embeds[i] for i in held_by))


# --- other numbers of rows


def vocabularies(source, *rows):
    return [
        source(f"v{i}", {EMBED: vary(n, 3, seed=i), "bias": vary(n, seed=i + 50), NORM: vary(4, seed=i)})
        for i, n in enumerate(rows)
    ]


@pytest.mark.parametrize("rows", [(5, 7), (7, 5), (5, 5), (6, 5, 7), (5, 0)])
def test_rows_beyond_the_fewest_are_those_of_the_config_source(rows, source):
    sources = vocabularies(source, *rows)
    fewest = min(rows)
    for config_source, most in enumerate(rows):
        found = aligned(*sources, config_source=config_source, align_vocabulary=True)
        for name, width in ((EMBED, 3), ("bias", 1)):
            tensor = found[name]
            assert tensor.shape == ((most, 3) if name == EMBED else (most,))
            common, *beyond = tensor.segments
            assert (common.numel, common.merged) == (fewest * width, True)
            assert_held(common, *(own[name].flatten()[: fewest * width] for own in sources))
            more = (most - fewest) * width
            assert [(segment.numel, segment.merged) for segment in beyond] == ([(more, False)] if more else [])
            if beyond:
                assert_held(beyond[0], sources[config_source][name].flatten()[fewest * width :])
        assert len(found[NORM].segments) == 1


def test_tied_heads_have_the_rows_of_the_vocabulary(source):
    embeds = vary(5, 3, seed=0), vary(6, 3, seed=1)
    base, a = source("base", {EMBED: embeds[0], HEAD: embeds[0].clone()}), source("a", {EMBED: embeds[1]})
    found = aligned(base, a, config_source=1, align_vocabulary=True)
    for name in (EMBED, HEAD):
        assert found[name].shape == (6, 3)
        assert_held(found[name].segments[1], embeds[1].flatten()[15:])


@pytest.mark.parametrize(
    ("base", "other", "asked", "message"),
    [
        *(({"w": a}, {"w": b}, True, f"'w' is {a} and {b}; both must be of one architecture")
          for a, b in [([4, 3], [4, 2]), ([4, 3], [12]), ([1], []), ([], [1])]),
        ({"w": [5, 3]}, {"w": [7, 3]}, False, "'w' is [5, 3] and [7, 3]; pass align_vocabulary=True, or resize"),
        ({"w": [5, 3], "up": [8, 3]}, {"w": [7, 3], "up": [9, 3]}, True,
         "'up' has 8 and 9 rows, 'w' has 5 and 7 rows: these are not two sizes of one"),
    ],
)  # fmt: skip
def test_shapes_that_are_no_two_vocabularies_or_not_asked_for(base, other, asked, message, source):
    shapes = {"base": base, "other": other}
    sources = [source(end, {name: vary(*shape, seed=0) for name, shape in shapes[end].items()}) for end in shapes]
    with pytest.raises(ValueError, match=re.escape(message)):
        aligned(*sources, align_vocabulary=asked)


# --- files


def files_of(*sources, most=None, **options):
    return lay_out_files([*aligned(*sources, **options).values()], sources[0], lambda *_: CopyRule((0,)), most)


def test_files_are_those_of_the_base(source):
    base = source("base", {"w": vary(3, seed=0)}, {"n": torch.arange(3), "v": vary(2, seed=1)})
    a = source("a", {"w": vary(3, seed=2), "n": torch.arange(3), "v": vary(2, seed=3), "more": vary(1, seed=4)})
    files = files_of(base, a, unmatched="copy")
    found = {file.name: {*file.entries} for file in files}
    assert found == {"model-0.safetensors": {"w"}, "model-1.safetensors": {"n", "v", "more"}}
    for file in files:
        text = file.header[8:].decode()
        assert json.loads(text)["__metadata__"] == {"format": "pt", "from": f"base {file.name}"}


def test_a_file_without_a_tensor_is_none_and_a_bare_file_becomes_a_whole_model(tmp_path, source):
    base, a = source("base", {"w": vary(3, seed=0)}, {"v": vary(2, seed=1)}), source("a", {"w": vary(3, seed=2)})
    assert [file.name for file in files_of(base, a, unmatched="drop")] == ["model-0.safetensors"]
    save_file({"w": vary(3, seed=0)}, tmp_path / "epoch3.safetensors")
    assert [file.name for file in files_of(open_files(tmp_path / "epoch3.safetensors"), a)] == ["model.safetensors"]


@pytest.mark.parametrize("most", [1, 12, 24, 25, 60, 10**9])
def test_files_by_size(most, source):
    tensors = {f"w{i}": vary(n, seed=i) for i, n in enumerate([3, 1, 2, 7, 0, 3])}
    base = source("base", tensors)
    files = files_of(base, base, most=most)
    assert [name for file in files for name in file.entries] == [*base]
    for file, after in zip(files, [*files[1:], None], strict=True):
        assert file.nbytes <= most or len([entry for entry in file.entries.values() if entry.end > entry.start]) == 1
        # Nothing more would have fitted.
        if after is not None:
            first = next(iter(after.entries.values()))
            assert file.nbytes + first.end - first.start > most
    count = len(files)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert [file.name for file in files] == (["model.safetensors"] if count == 1 else names)


def test_elements_follow_one_another_whatever_their_dtype(source):
    tensors = {"n": torch.arange(3).byte(), "w": vary(3, seed=0, dtype=torch.float16), "v": vary(2, seed=1).double()}
    base = source("base", tensors)
    (file,) = files_of(base, base)
    assert [segment.name for segment in file.segments] == ["v", "w", "n"]
    place = 0
    for segment in file.segments:
        assert segment.start == place
        assert segment.start % segment.dtype.itemsize == 0
        place += segment.numel * segment.dtype.itemsize
    assert (place, len(file.header) % 4096) == (file.nbytes, 0)


# --- anything


@settings(fuzz, max_examples=60)
@given(
    holders=st.lists(st.sets(st.sampled_from("abcdef"), min_size=1), min_size=1, max_size=4),
    chosen=st.integers(0, 3),
    rows=st.lists(st.integers(0, 4), min_size=4, max_size=4),
)
def test_every_element_of_the_output_has_a_place(holders, chosen, rows, tmp_path):
    chosen %= len(holders)
    sources = []
    for i, names in enumerate(holders):
        path = tmp_path / f"{i}.safetensors"
        tensors = {name: vary(rows[i], 2, seed=10 * i + ord(name)) for name in names}
        # Most of each, since models with less in common are refused.
        save_file({**tensors, "most": vary(99, seed=i)}, path)
        sources.append(open_files(path))
    found = aligned(*sources, config_source=chosen, unmatched="copy", align_vocabulary=True)
    holders = [{*names, "most"} for names in holders]
    assert {*found} == set().union(*holders)
    common = set.intersection(*holders)
    for name, tensor in found.items():
        assert sum(segment.numel for segment in tensor.segments) == prod(tensor.shape)
        assert tensor.segments[0].merged == (name in common)
        order = (chosen, *range(len(holders)))
        home = next(i for i in order if name in holders[i])
        assert tensor.shape == ((99,) if name == "most" else (rows[home], 2))
        for segment in tensor.segments:
            assert len(segment.inputs) == (len(holders) if segment.merged else 1)
            for file_range in segment.inputs:
                header = read_header(file_range.file)
                assert header.data <= file_range.offset
                assert file_range.offset + segment.numel * 4 <= file_range.file.stat().st_size
    assert {*aligned(*sources, config_source=chosen, unmatched="drop", align_vocabulary=True)} == common
