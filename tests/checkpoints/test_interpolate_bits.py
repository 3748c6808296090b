"""The bits of interpolated checkpoints: those of whole tensors, whatever the dtypes, places and blocks."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from bits import same_bits
from folders import everything_in, load, manifest_of
from jobs import count_bytes_read
from safetensors.torch import load_file, save_file
from tiny import llama, save, write_raw
from transformers import LlamaForCausalLM

from fused_merge.checkpoints import engine
from fused_merge.checkpoints.interpolate import interpolate_checkpoints, plan_interpolation
from fused_merge.eager.interpolate import interpolate as eager_interpolate
from fused_merge.interpolation.interpolate import interpolate
from fused_merge.io.headers import CODES, read_header

RATIOS = [0.0, 0.1, 0.125, 1.0, -0.5]


def save_ends(folder, *ends):
    """A file for each mapping of tensors."""
    folder.mkdir(exist_ok=True)
    for i, tensors in enumerate(ends):
        save_file(tensors, folder / f"{i}.safetensors")
    return [folder / f"{i}.safetensors" for i in range(len(ends))]


@pytest.fixture
def _many_blocks(monkeypatch):
    monkeypatch.setattr(engine, "_LARGEST_BLOCK", 4096)


def test_single_files_and_integers(tmp_path):
    torch.manual_seed(0)
    base = {"w": torch.randn(3, 5), "zero": torch.tensor([-0.0, float("nan")]), "none": torch.zeros(0, 4)}
    base |= {"scalar": torch.tensor(2.0), "count": torch.tensor([1, 2]), "flag": torch.tensor(True)}
    tuned = {name: tensor + 1 if tensor.dtype != torch.bool else ~tensor for name, tensor in base.items()}
    made = interpolate_checkpoints(*save_ends(tmp_path, base, tuned), [0, 0.3, 1], tmp_path)
    assert [*everything_in(made[1])] == ["README.md", "fused_merge.json", "model.safetensors"]
    start, between, end = (load_file(folder / "model.safetensors") for folder in made)
    for name in base:
        assert same_bits(start[name], base[name])
        assert same_bits(end[name], tuned[name])
        floating = base[name].is_floating_point()
        assert same_bits(between[name], interpolate(base[name], tuned[name], [0.3])[0] if floating else tuned[name])
    assert load_file(made[0] / "model.safetensors")["zero"].signbit().tolist() == [True, False]


def test_each_byte_is_read_once(tmp_path, monkeypatch):
    torch.manual_seed(0)
    tensors = {"w": torch.randn(700, 1000), "b": torch.randn(3).bfloat16(), "n": torch.arange(5)}
    ends = save_ends(tmp_path, tensors, tensors)
    reads = count_bytes_read(monkeypatch, engine)
    interpolate_checkpoints(*ends, [0.1, 0.2, 0.3], tmp_path / "out")
    for end in ends:
        begun = read_header(end).data
        for path, at, nbytes in sorted(reads):
            if path == end:
                assert at == begun
                begun += nbytes
        assert begun == end.stat().st_size


SHAPES = {"up": (61, 83), "down": (1025,), "norm": (7,), "scalar": ()}


def ends_of(folder, dtypes, shapes=SHAPES):
    """Two files of one tensor for each shape, and an integer one."""
    generator = torch.Generator().manual_seed(0)
    ends = []
    for i, dtype in enumerate(dtypes):
        tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        ends.append({**tensors, "count": torch.arange(3000) + i})
    return save_ends(folder, *ends), ends


FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.mark.usefixtures("_many_blocks")
@pytest.mark.parametrize(
    ("dtypes", "dtype"),
    [
        *(((each, each), None) for each in (FP32, BF16, FP16, FP64)),
        *(((BF16, BF16), "float32"), ((FP32, FP32), torch.bfloat16), ((FP32, BF16), "float16")),
        *(((FP16, FP64), "bfloat16"), ((FP64, BF16), "float64")),
    ],
)
def test_streams_have_the_bits_of_whole_tensors(dtypes, dtype, tmp_path):
    paths, (base, tuned) = ends_of(tmp_path / "ends", dtypes)
    folders = interpolate_checkpoints(*paths, RATIOS, tmp_path / "out", dtype=dtype, threads=3)
    written = dtypes[0] if dtype is None else getattr(torch, str(dtype).removeprefix("torch."))
    wide = FP64 if FP64 in dtypes else FP32
    for folder, ratio in zip(folders, RATIOS, strict=True):
        made = load(folder)
        for name in SHAPES:
            # The ends are converted as they are; the rest is rounded once, from the precision of the arithmetic.
            if ratio in (0, 1):
                want = (base, tuned)[int(ratio)][name]
            else:
                want = eager_interpolate(base[name].to(wide), tuned[name].to(wide), ratio)
            assert same_bits(made[name], want.to(written)), (ratio, name)
        assert torch.equal(made["count"], (base if ratio == 0 else tuned)["count"])


def test_integers_are_the_bases_only_where_every_ratio_is_0(tmp_path):
    for shapes in ({}, SHAPES):
        paths, ends = ends_of(tmp_path / "ends", (FP32, FP32), shapes)
        ratios = {"none": {".*": 0.0}, "one": {"norm": 1e-9, ".*": 0}, "half": 0.5, "start": 0.0, "end": 1.0}
        ratios = ratios if shapes else {name: ratios[name] for name in ("start", "half", "end")}
        for folder in interpolate_checkpoints(*paths, ratios, tmp_path / f"out{len(shapes)}"):
            chosen = ends[folder.name not in ("none", "start")]
            assert torch.equal(load(folder)["count"], chosen["count"]), folder


def write_at(byte, path, tensors):
    """A file whose data begin at that byte of a word, tensor after tensor without regard for their sizes."""
    header, data = {}, b""
    for name, x in tensors.items():
        place = [len(data), len(data) + x.nbytes]
        header[name] = {"dtype": CODES[x.dtype], "shape": list(x.shape), "data_offsets": place}
        data += x.flatten().view(torch.uint8).numpy().tobytes()
    text = json.dumps(header).encode()
    write_raw(path, text + b" " * ((byte - len(text)) % 8), data)
    assert read_header(path).data % 8 == byte
    return path


@pytest.mark.usefixtures("_many_blocks")
@pytest.mark.parametrize("byte", range(8))
def test_tensors_that_begin_at_any_byte(byte, tmp_path):
    torch.manual_seed(0)
    base = {"flag": torch.tensor([True, False, True]), "w": torch.randn(3001), "byte": torch.arange(5).byte()}
    base |= {"h": torch.randn(2500).half(), "count": torch.arange(700), "embed": torch.randn(41)}
    base["d"] = torch.randn(900, dtype=torch.float64)
    tuned = {name: x if x.dtype in (torch.bool, torch.uint8) else x + 1 for name, x in reversed(base.items())}
    # A further name of a tensor, which is found bit by bit.
    tuned["head"] = tuned["embed"].clone()
    paths = write_at(byte, tmp_path / "a.safetensors", base), write_at(7 - byte, tmp_path / "b.safetensors", tuned)
    start, half, end = interpolate_checkpoints(*paths, [0, 0.5, 1], tmp_path / "out")
    for name in base:
        assert same_bits(load(start)[name], base[name])
        assert same_bits(load(end)[name], tuned[name])
        if base[name].is_floating_point():
            assert same_bits(load(half)[name], eager_interpolate(base[name], tuned[name], 0.5))
    assert "head" not in load(half)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_what_is_never_merged_is_copied_bit_for_bit(dtype, tmp_path):
    patterns = torch.arange(256).byte().repeat(8)
    ends = save_ends(tmp_path, {"w": torch.ones(999), "odd": patterns.view(dtype)}, {"w": torch.zeros(999)})
    for folder in interpolate_checkpoints(*ends, [0, 0.5], tmp_path / "out", unmatched="copy"):
        assert torch.equal(load(folder)["odd"].view(torch.uint8), patterns)


def test_one_model_is_both_ends(tmp_path):
    (model, _), (stored, _) = ends_of(tmp_path / "ends", (BF16, BF16))
    for folder in interpolate_checkpoints(str(model), model, [0.0, 0.3, 2.0], tmp_path / "out"):
        made = load(folder)
        assert all(same_bits(made[name], stored[name]) for name in stored)


# --- the accuracy that docs/explanation/numerics.md promises


def rounded_once(exact):
    """The nearest bf16 of an fp64: torch goes by fp32, which is made odd where it is inexact, and so never a tie."""
    x = exact.float()
    towards = torch.where(exact > x, torch.inf, -torch.inf).float()
    odd = torch.where((x.double() != exact) & (x.view(torch.int32) % 2 == 0), torch.nextafter(x, towards), x)
    return odd.bfloat16()


@pytest.mark.parametrize("crossing", [False, True])
def test_almost_every_element_is_the_exact_value_rounded_once(crossing, tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(100_000, generator=generator)
    step = 0.02 if crossing else 1e-3
    ends = base.bfloat16(), (base + step * torch.randn(len(base), generator=generator)).bfloat16()
    ratios = [0.1, 1 / 3, 0.5, 0.9, 1.2]
    paths = save_ends(tmp_path, *({"w": end} for end in ends))
    for folder, ratio in zip(interpolate_checkpoints(*paths, ratios, tmp_path / "out"), ratios, strict=True):
        ours = load(folder)["w"]
        a, b = (end.double() for end in ends)
        exact = a + ratio * (b - a)
        nearest = rounded_once(exact)
        order = [torch.where((x := y.view(torch.int16).int()) >= 0, x, -(2**15) - x) for y in (ours, nearest)]
        apart = (order[0] - order[1]).abs()
        assert (apart != 0).double().mean() <= 1e-4
        error = (ours.double() - exact).abs()
        cancelled = error <= 2**-23 * torch.stack([a, b]).abs().amax(0)
        assert ((apart <= 1) | cancelled).all()
        if not crossing:
            assert apart.max() <= 1


def test_ratios_of_any_kind_of_number(tmp_path):
    paths, _ = ends_of(tmp_path / "ends", (FP32, FP32))
    ratios = [np.float32(0.5), torch.tensor(0.25), 1, np.int64(2), True]
    with pytest.raises(ValueError, match=r"ratios 1.0 and 1.0 would share the folder r1.00; drop one"):
        interpolate_checkpoints(*paths, ratios, tmp_path / "out")
    made = interpolate_checkpoints(*paths, iter(ratios[:-1]), tmp_path / "out")
    assert [manifest_of(folder)["recipe"]["ratio"] for folder in made] == [0.5, 0.25, 1.0, 2.0]


def test_a_mapping_without_a_label_is_named_after_what_it_decides(tmp_path):
    paths, _ = ends_of(tmp_path / "ends", (FP32, FP32), shapes={"ab": (3,), "ac": (3,), "bb": (3,), "bc": (3,)})
    first = {"a.*": 0.25, ".*b": 0.75, ".*": 0.5}
    # The same keys in another order decide otherwise, and other keys the same.
    other, same = {".*b": 0.75, "a.*": 0.25, ".*": 0.5}, {"a[bc]": 0.25, "bb": 0.75, "bc": 0.5}
    # The mean of the first, of other tensors.
    mirrored = {"b.*": 0.25, ".*c": 0.75, ".*": 0.5}
    points = [first, other, 0.25, mirrored]
    names = [folder.name for folder in interpolate_checkpoints(*paths, points, tmp_path / "out")]
    assert re.fullmatch(r"r0\.44-\w{6} r0\.56-\w{6} r0\.25 r0\.44-\w{6}", " ".join(names))
    assert re.fullmatch(r"[0-9a-f]{18}", "".join(name[6:] for name in names))
    assert plan_interpolation(*paths, [same], tmp_path / "other").outputs == [tmp_path / "other" / names[0]]
    with pytest.raises(ValueError, match=rf"ratios .* and .* would share the folder {names[0]}; drop one"):
        interpolate_checkpoints(*paths, [first, same], tmp_path / "twice")


# --- tensors and rows that only one end has


def test_tensors_that_only_one_end_holds(tmp_path):
    _, (base, tuned) = ends_of(tmp_path / "ends", (BF16, BF16))
    old, new = torch.randn(5000).bfloat16(), torch.randn(3).bfloat16()
    paths = save_ends(tmp_path, {**base, "old": old}, {**tuned, "new": new})
    dropped = interpolate_checkpoints(*paths, [0, 0.5, 1], tmp_path / "drop", unmatched="drop")
    copied = interpolate_checkpoints(*paths, [0, 0.5, 1], tmp_path / "copy", unmatched="copy")
    for without, all_of_it in zip(map(load, dropped), map(load, copied), strict=True):
        assert without.keys() == base.keys()
        assert same_bits(all_of_it.pop("old"), old)
        assert same_bits(all_of_it.pop("new"), new)
        assert all(same_bits(all_of_it[name], without[name]) for name in without)


@pytest.mark.usefixtures("_many_blocks")
@pytest.mark.parametrize("rows", [(40, 43), (43, 40)])
@pytest.mark.parametrize("config_from", ["base", "tuned"])
def test_vocabularies_of_two_sizes(rows, config_from, tmp_path):
    names = "base", "tuned"
    ends = [save(llama(i, vocabulary=rows[i]), tmp_path / name) for i, name in enumerate(names)]
    made = interpolate_checkpoints(*ends, [0, 0.3, 1], tmp_path, align_vocabulary=True, config_from=config_from)
    chosen = names.index(config_from)
    name = "model.embed_tokens.weight"
    base, tuned = (load(end)[name] for end in ends)
    for folder, ratio in zip(made, (0, 0.3, 1), strict=True):
        got = load(folder)[name]
        assert got.shape == (rows[chosen], 16)
        assert same_bits(got[:40], eager_interpolate(base[:40], tuned[:40], ratio))
        assert same_bits(got[40:], (base, tuned)[chosen][40:])
        assert LlamaForCausalLM.from_pretrained(folder).config.vocab_size == rows[chosen]
    # The end whose configuration it has comes out as it was.
    made, stored = load(made[chosen * 2]), load(ends[chosen])
    assert made.keys() == stored.keys()
    assert all(same_bits(made[name], stored[name]) for name in stored)


# --- on a GPU


@pytest.mark.usefixtures("_many_blocks")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("stored", [FP32, BF16, FP16, FP64])
def test_a_gpu_makes_the_same_bytes(stored, dtype, tmp_path):
    paths, _ = ends_of(tmp_path / "ends", (stored, stored))
    ratios = [*RATIOS, {"norm": 0.25, ".*": 0.75}]
    ours = interpolate_checkpoints(*paths, ratios, tmp_path / "cpu", dtype=dtype)
    theirs = interpolate_checkpoints(*paths, ratios, tmp_path / "cuda", dtype=dtype, device="cuda")
    assert list(map(everything_in, ours)) == list(map(everything_in, theirs))


def test_bytes_of_booleans_are_copied_as_they_are(tmp_path):
    header = {"flags": {"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]}}
    stored = b"\0\1\2\xff", b"\3\0\1\1"
    ends = [write_raw(tmp_path / f"{i}.safetensors", header, data) for i, data in enumerate(stored)]
    for folder, data in zip(interpolate_checkpoints(*ends, [0, 1], tmp_path), stored, strict=True):
        assert (folder / "model.safetensors").read_bytes().endswith(data)
