"""Folders for many ratios; nothing left behind when something fails."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import equal_bits, llama, save, write_raw
from transformers import LlamaForCausalLM

from fused_merge.checkpoints import engine, interpolate_checkpoints, plan_interpolation
from fused_merge.eager.interpolate import interpolate as eager_interpolate
from fused_merge.interpolation.interpolate import interpolate
from fused_merge.io.headers import CODES, read_header

RATIOS = [0.0, 0.1, 0.125, 1.0, -0.5]
NAMES = ["r0.00", "r0.10", "r0.125", "r1.00", "r-0.50"]


@pytest.fixture
def models():
    return llama(0, dtype=torch.bfloat16), llama(1, dtype=torch.bfloat16)


@pytest.fixture
def folders(models, tmp_path):
    base, tuned = (save(model, tmp_path / name) for model, name in zip(models, ["base", "tuned"], strict=True))
    return base, tuned


def everything_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_folders_that_transformers_loads(models, tmp_path):
    base, tuned = models
    tuned.generation_config.temperature = 0.25
    tuned.generation_config.do_sample = True
    ends = save(base, tmp_path / "base", shard="3KB"), save(tuned, tmp_path / "tuned")
    out = tmp_path / "new" / "out"
    made = interpolate_checkpoints(*ends, RATIOS, str(out))
    assert made == [out / name for name in NAMES]
    assert sorted(os.listdir(out)) == sorted(NAMES)

    points = interpolate(base.state_dict(), tuned.state_dict(), RATIOS)
    for folder, point in zip(made, points, strict=True):
        weights = sorted(path.name for path in ends[0].glob("*.safetensors"))
        assert sorted(path.name for path in folder.glob("*.safetensors")) == weights
        for file in weights:
            with safe_open(ends[0] / file, "pt") as original, safe_open(folder / file, "pt") as copy:
                assert copy.keys() == original.keys()
                assert copy.metadata() == original.metadata()
        index = "model.safetensors.index.json"
        assert json.loads((folder / index).read_text()) == json.loads((ends[0] / index).read_text())
        assert (folder / "generation_config.json").read_text() == (ends[1] / "generation_config.json").read_text()

        loaded = LlamaForCausalLM.from_pretrained(folder)
        assert loaded.generation_config.temperature == 0.25
        for name, tensor in loaded.state_dict().items():
            assert equal_bits(tensor, point[name]), name


def test_the_ends_are_the_inputs(folders, tmp_path):
    start, end = interpolate_checkpoints(*folders, [0, 1], tmp_path / "out")
    for copy, original in ((start, folders[0]), (end, folders[1])):
        written, stored = load_file(copy / "model.safetensors"), load_file(original / "model.safetensors")
        assert written.keys() == stored.keys()
        assert all(equal_bits(written[name], stored[name]) for name in stored)


def test_single_files_and_integers(tmp_path):
    torch.manual_seed(0)
    base = {
        "w": torch.randn(3, 5),
        "zero": torch.tensor([-0.0, float("nan")]),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(2.0),
        "count": torch.tensor([1, 2]),
        "flag": torch.tensor(True),
    }
    tuned = {name: tensor + 1 if tensor.dtype != torch.bool else ~tensor for name, tensor in base.items()}
    save_file(base, tmp_path / "a.safetensors")
    save_file(tuned, tmp_path / "b.safetensors")
    made = interpolate_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors", [0, 0.3, 1], tmp_path)
    assert everything_below(made[1]) == ["README.md", "fused_merge.json", "model.safetensors"]
    start, between, end = (load_file(folder / "model.safetensors") for folder in made)
    for name in base:
        assert equal_bits(start[name], base[name])
        assert equal_bits(end[name], tuned[name])
        if base[name].is_floating_point():
            assert equal_bits(between[name], interpolate(base[name], tuned[name], [0.3])[0])
        else:
            assert equal_bits(between[name], tuned[name])
    assert load_file(made[0] / "model.safetensors")["zero"].signbit().tolist() == [True, False]


def test_what_is_copied_from_the_tuned_folder(folders, tmp_path):
    wanted = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "spiece.model", "modeling_x.py"]
    left = ["optimizer.pt", "trainer_state.json", "training_args.bin", "all_results.json"]
    for name in wanted + left:
        (folders[1] / name).write_text(f"tuned {name}")
        (folders[0] / name).write_text("base")
    (folder,) = interpolate_checkpoints(*folders, [0.5], tmp_path / "out")
    made = ["README.md", "config.json", "fused_merge.json", "generation_config.json", "model.safetensors", *wanted]
    assert sorted(os.listdir(folder)) == sorted(made)
    assert (folder / "tokenizer.json").read_text() == "tuned tokenizer.json"


def add_head(folder: Path, change: float = 0.0) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_tied_weight_that_one_checkpoint_writes_out(folders, tmp_path):
    add_head(folders[1])
    (folder,) = interpolate_checkpoints(*folders, [0.5], tmp_path / "absent")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")

    (folder,) = interpolate_checkpoints(*folders[::-1], [0.5], tmp_path / "present")
    made = load_file(folder / "model.safetensors")
    assert equal_bits(made["lm_head.weight"], made["model.embed_tokens.weight"])

    config = json.loads((folders[1] / "config.json").read_text())
    (folders[1] / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"base leaves out 'lm_head.weight', which .*config\.json does not tie; set"):
        interpolate_checkpoints(*folders, [0.5], tmp_path / "asked for")
    (folders[1] / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        interpolate_checkpoints(*folders, [0.5], tmp_path / "asked for")


def test_overwrite_replaces_whole_folders(folders, tmp_path):
    out = tmp_path / "out"
    (folder,) = interpolate_checkpoints(*folders, [0.5], out)
    (folder / "old").touch()
    with pytest.raises(FileExistsError, match=r"r0\.50 exists; pass overwrite=True to replace a folder, or choose"):
        interpolate_checkpoints(*folders, [0.25, 0.5], out)
    assert everything_below(out) == ["r0.50", *sorted(f"r0.50/{name}" for name in os.listdir(folder))]
    interpolate_checkpoints(*folders, [0.5], out, overwrite=True)
    assert not (folder / "old").exists()
    assert os.listdir(out) == ["r0.50"]
    (out / "r0.75").touch()
    with pytest.raises(FileExistsError, match=r"r0\.75 exists"):
        interpolate_checkpoints(*folders, [0.75], out, overwrite=True)


@pytest.mark.parametrize(
    ("ratios", "names"),
    [
        ([0.1, 1, 2, -0.0], ["r0.10", "r1.00", "r2.00", "r0.00"]),
        ([0.1 + 0.2, 1 / 3], ["r0.30", "r0.333333333"]),
        ([1e-7, 0.995], ["r1e-07", "r0.995"]),
        (torch.linspace(0, 1, 5).tolist(), ["r0.00", "r0.25", "r0.50", "r0.75", "r1.00"]),
    ],
)
def test_names_of_folders(ratios, names, folders, tmp_path):
    made = interpolate_checkpoints(*folders, ratios, tmp_path / "out")
    assert [folder.name for folder in made] == names


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ([], "ratios is empty"),
        ([0.1, float("inf")], "a ratio must be finite, got inf"),
        ([0.5, 0.25, 0.5], r"ratios 0.5 and 0.5 would share the folder r0.50; drop one"),
        ([0.3, 0.1 + 0.2], "would share the folder r0.30"),
        ([0.0, -0.0], "would share the folder r0.00"),
    ],
)
def test_ratios(ratios, message, folders, tmp_path):
    with pytest.raises(ValueError, match=message):
        interpolate_checkpoints(*folders, ratios, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change_weights(folder: Path, **changes) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: changes.get(name.split(".")[-2], lambda x: x)(tensor) for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: None, r"tuned lacks 'model.norm.weight' of .*base; both must hold the same tensors"),
        (lambda x: torch.cat([x, x]), r"'model.norm.weight' is \[16\] and \[32\]; both must be of one architecture"),
        (lambda x: x.float(), "'model.norm.weight' is torch.bfloat16 and torch.float32"),
        (lambda x: x.int(), "'model.norm.weight' is torch.bfloat16 and torch.int32"),
    ],
)
def test_checkpoints_that_do_not_match(change, message, folders, tmp_path):
    change_weights(folders[1], norm=change)
    with pytest.raises(ValueError, match=message):
        interpolate_checkpoints(*folders, [0.5], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_paths(models, tmp_path):
    with pytest.raises(TypeError, match="base must be the path of a safetensors file or a model folder, not a Llama"):
        interpolate_checkpoints(*models, [0.5], tmp_path)


def test_an_output_that_would_replace_an_input(folders, tmp_path):
    held = tmp_path / "r0.50" / "base"
    shutil.copytree(folders[0], held)
    with pytest.raises(ValueError, match=r"r0\.50 holds the input .*model.safetensors, which it would replace; choose"):
        interpolate_checkpoints(held, folders[1], [0.5], tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="which it would replace"):
        interpolate_checkpoints(folders[0], held, [0.5], tmp_path, overwrite=True)


def test_an_output_that_cannot_be_written_to(folders, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to .*file/out: .*file is not a folder that you may write to"):
        interpolate_checkpoints(*folders, [0.5], tmp_path / "file" / "out")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match=f"cannot write to .*out: {tmp_path} is not a folder that you may write to"):
        interpolate_checkpoints(*folders, [0.5], tmp_path / "out")


def test_a_disk_that_is_too_small(folders, tmp_path, monkeypatch):
    size = (folders[0] / "model.safetensors").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2 * size))
    with pytest.raises(OSError, match=r"out needs .* GB of .* GB free; make room or write less at once"):
        interpolate_checkpoints(*folders, [0.1, 0.2, 0.3], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 9 * size))
    interpolate_checkpoints(*folders, [0.1, 0.2, 0.3], tmp_path / "out")


def test_a_disk_that_fills_up_on_the_way(folders, tmp_path, request):
    change_weights(folders[0], norm=lambda x: x.repeat(2**12))
    change_weights(folders[1], norm=lambda x: x.repeat(2**12))
    request.getfixturevalue("_small_files")
    with pytest.raises(OSError, match=r"cannot write .*model\.safetensors: File too large; nothing of it is left"):
        interpolate_checkpoints(*folders, [0.1, 0.2], tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_each_byte_is_read_once(tmp_path, monkeypatch):
    torch.manual_seed(0)
    tensors = {"w": torch.randn(700, 1000), "b": torch.randn(3).bfloat16(), "n": torch.arange(5)}
    ends = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for end in ends:
        save_file(tensors, end)
    reads = []
    read = engine.read_into

    def counted(handle, path, view, at):
        reads.append((path, at, len(view)))
        read(handle, path, view, at)

    monkeypatch.setattr(engine, "read_into", counted)
    interpolate_checkpoints(*ends, [0.1, 0.2, 0.3], tmp_path / "out")
    for end in ends:
        begun = read_header(end).data
        for path, at, nbytes in sorted(reads):
            if path == end:
                assert at == begun
                begun += nbytes
        assert begun == end.stat().st_size


# --- blocks, dtypes and places


def load(folder):
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def manifest_of(folder):
    return json.loads((folder / "fused_merge.json").read_text())


def everything_in(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


SHAPES = {"up": (61, 83), "down": (1025,), "norm": (7,), "scalar": ()}


def ends_of(folder, dtypes, shapes=SHAPES):
    """Two files of one tensor for each shape, and an integer one."""
    generator = torch.Generator().manual_seed(0)
    ends = []
    for i, dtype in enumerate(dtypes):
        tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        ends.append({**tensors, "count": torch.arange(3000) + i})
        folder.mkdir(exist_ok=True)
        save_file(ends[-1], folder / f"{i}.safetensors")
    return [folder / f"{i}.safetensors" for i in range(2)], ends


FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("dtypes", "dtype"),
    [
        ((FP32, FP32), None),
        ((BF16, BF16), None),
        ((FP16, FP16), None),
        ((FP64, FP64), None),
        ((BF16, BF16), "float32"),
        ((FP32, FP32), torch.bfloat16),
        ((FP32, BF16), "float16"),
        ((FP16, FP64), "bfloat16"),
        ((FP64, BF16), "float64"),
    ],
)
def test_streams_have_the_bits_of_whole_tensors(dtypes, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_LARGEST_BLOCK", 4096)
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
            assert equal_bits(made[name], want.to(written)), (ratio, name)
        assert torch.equal(made["count"], (base if ratio == 0 else tuned)["count"])


def test_nothing_but_integers(tmp_path):
    paths, ends = ends_of(tmp_path / "ends", (FP32, FP32), shapes={})
    ratios = [0.0, 0.5, 1.0]
    for folder, i in zip(interpolate_checkpoints(*paths, ratios, tmp_path / "out"), (0, 1, 1), strict=True):
        assert torch.equal(load(folder)["count"], ends[i]["count"])


def test_integers_are_the_bases_only_where_every_ratio_is_0(tmp_path):
    paths, ends = ends_of(tmp_path / "ends", (FP32, FP32))
    ratios = {"none": {".*": 0.0}, "one": {"norm": 1e-9, ".*": 0}}
    none, one = interpolate_checkpoints(*paths, ratios, tmp_path / "out")
    assert torch.equal(load(none)["count"], ends[0]["count"])
    assert torch.equal(load(one)["count"], ends[1]["count"])


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


@pytest.mark.parametrize("byte", range(8))
def test_tensors_that_begin_at_any_byte(byte, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_LARGEST_BLOCK", 4096)
    torch.manual_seed(0)
    base = {
        "flag": torch.tensor([True, False, True]),
        "w": torch.randn(3001),
        "byte": torch.arange(5).byte(),
        "h": torch.randn(2500).half(),
        "count": torch.arange(700),
        "tied": torch.randn(41),
        "d": torch.randn(900, dtype=torch.float64),
    }
    tuned = {name: x if x.dtype in (torch.bool, torch.uint8) else x + 1 for name, x in reversed(base.items())}
    # A further name of a tensor, which is found bit by bit.
    tuned["head"] = tuned["tied"].clone()
    paths = write_at(byte, tmp_path / "a.safetensors", base), write_at(7 - byte, tmp_path / "b.safetensors", tuned)
    start, half, end = interpolate_checkpoints(*paths, [0, 0.5, 1], tmp_path / "out")
    for name in base:
        assert equal_bits(load(start)[name], base[name])
        assert equal_bits(load(end)[name], tuned[name])
        if base[name].is_floating_point():
            assert equal_bits(load(half)[name], eager_interpolate(base[name], tuned[name], 0.5))
    assert "head" not in load(half)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_what_is_never_merged_is_copied_bit_for_bit(dtype, tmp_path):
    patterns = torch.arange(256).byte().repeat(8)
    save_file({"w": torch.ones(2), "odd": patterns.view(dtype)}, tmp_path / "a.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "b.safetensors")
    ends = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    with pytest.raises(ValueError, match=f"'odd' of .*a.safetensors is {dtype}, which cannot be merged; convert it to"):
        interpolate_checkpoints(ends[0], ends[0], [0.5], tmp_path / "out")
    for folder in interpolate_checkpoints(*ends, [0, 0.5], tmp_path / "out", unmatched="copy"):
        assert torch.equal(load(folder)["odd"].view(torch.uint8), patterns)
    (folder,) = interpolate_checkpoints(*ends, [0.5], tmp_path / "drop", unmatched="drop")
    assert load(folder).keys() == {"w"}


def test_one_model_is_both_ends(folders, tmp_path):
    ends = [os.fspath(folders[0]) + "/", folders[0]]
    for folder in interpolate_checkpoints(*ends, [0.0, 0.3, 2.0], tmp_path / "out"):
        made, stored = load(folder), load(folders[0])
        assert all(equal_bits(made[name], stored[name]) for name in stored)


# --- the accuracy that docs/numerics.md promises


def rounded_once(exact):
    """The nearest bf16 of an fp64: torch goes by fp32, which is made odd where it is inexact, and so never a tie."""
    x = exact.float()
    towards = torch.where(exact > x, torch.inf, -torch.inf).float()
    odd = torch.where((x.double() != exact) & (x.view(torch.int32) % 2 == 0), torch.nextafter(x, towards), x)
    return odd.bfloat16()


@pytest.mark.parametrize("crossing", [False, True])
def test_almost_every_element_is_the_exact_value_rounded_once(crossing, tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(400_000, generator=generator)
    step = 0.02 if crossing else 1e-3
    ends = base.bfloat16(), (base + step * torch.randn(len(base), generator=generator)).bfloat16()
    for i, end in enumerate(ends):
        save_file({"w": end}, tmp_path / f"{i}.safetensors")
    ratios = [0.1, 1 / 3, 0.5, 0.9, 1.2]
    paths = tmp_path / "0.safetensors", tmp_path / "1.safetensors"
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


# --- configuration, files, names


def test_an_output_dtype_is_written_into_every_configuration(models, tmp_path):
    ends = [save(model, tmp_path / name) for model, name in zip(models, ["base", "tuned"], strict=True)]
    config = json.loads((ends[1] / "config.json").read_text())
    config |= {
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "inner": {"torch_dtype": "bfloat16"}, "hidden_size": 16},
        "quantizer": {"dtype": None},
        "dtypes": ["bfloat16"],
        "name": "dtype",
    }
    (ends[1] / "config.json").write_text(json.dumps(config))
    (plain,) = interpolate_checkpoints(*ends, [0.5], tmp_path / "plain")
    assert (plain / "config.json").read_bytes() == (ends[1] / "config.json").read_bytes()
    (wide,) = interpolate_checkpoints(*ends, [0.5], tmp_path / "wide", dtype="float32")
    assert json.loads((wide / "config.json").read_text()) == config | {
        "dtype": "float32",
        "torch_dtype": "float32",
        "text_config": {"dtype": "float32", "inner": {"torch_dtype": "float32"}, "hidden_size": 16},
    }


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_transformers_loads_an_output_in_its_dtype(dtype, folders, tmp_path):
    (folder,) = interpolate_checkpoints(*folders, [0.5], tmp_path / "out", dtype=dtype)
    loaded = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    assert {str(tensor.dtype) for tensor in loaded.state_dict().values()} == {f"torch.{dtype}"}
    written = load(folder)
    for name, tensor in loaded.state_dict().items():
        assert equal_bits(tensor, written[name if name in written else "model.embed_tokens.weight"])


@pytest.mark.parametrize("size", [1, "2KB", 3000, "5GB"])
def test_files_by_size_that_transformers_loads(size, models, tmp_path):
    ends = [save(model, tmp_path / name, "3KB") for model, name in zip(models, ["base", "tuned"], strict=True)]
    (folder,) = interpolate_checkpoints(*ends, [0.3], tmp_path / "out", max_shard_size=size)
    files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    if size == "5GB":
        assert [*files] == ["model.safetensors"]
        assert not index.exists()
    else:
        most = {1: 1, "2KB": 2000, 3000: 3000}[size]
        assert all(len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= most for tensors in files.values())
        listed = json.loads(index.read_text())
        assert listed["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
        assert listed["metadata"]["total_size"] == sum(x.nbytes for xs in files.values() for x in xs.values())
        assert sorted(files) == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    (point,) = interpolate(models[0].state_dict(), models[1].state_dict(), [0.3])
    for name, tensor in LlamaForCausalLM.from_pretrained(folder).state_dict().items():
        assert equal_bits(tensor, point[name]), name


@pytest.mark.parametrize("files_from", ["base", "tuned"])
def test_whose_files_go_along(files_from, folders, tmp_path):
    for folder in folders:
        (folder / "tokenizer.json").write_text(folder.name)
    (made,) = interpolate_checkpoints(*folders, [0.5], tmp_path / "out", files_from=files_from)
    assert (made / "tokenizer.json").read_text() == files_from
    with pytest.raises(ValueError, match="files_from must be 'base' or 'tuned', got 'sft'"):
        interpolate_checkpoints(*folders, [0.5], tmp_path / "out", files_from="sft")


# --- ratios by name


class ByLayer(Mapping):
    """Ratios of tensors by their exact names."""

    def __init__(self, values):
        self._values = values

    def __getitem__(self, name):
        return self._values[name]

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)


def test_ratios_of_patterns_and_of_exact_names(folders, tmp_path):
    base, tuned = map(load, folders)
    patterns = {"model.norm.weight": 0.9, r"model\.layers\.\d+\.mlp\..*": np.float32(0.25), ".*": 0.5}
    by_name = {name: 0.9 if name == "model.norm.weight" else 0.25 if ".mlp." in name else 0.5 for name in base}
    assert {*by_name.values()} == {0.9, 0.25, 0.5}
    labelled = {"patterns": patterns, "names": ByLayer(by_name), "all": 0.25}
    folders_made = interpolate_checkpoints(*folders, labelled, tmp_path / "out")
    assert [folder.name for folder in folders_made] == ["patterns", "names", "all"]
    for folder, ratio_of in zip(folders_made, (by_name.get, by_name.get, lambda name: 0.25), strict=True):
        made = load(folder)
        for name in base:
            assert equal_bits(made[name], eager_interpolate(base[name], tuned[name], ratio_of(name))), name
    recipes = [manifest_of(folder)["recipe"]["ratio"] for folder in folders_made]
    assert recipes == [{**patterns, r"model\.layers\.\d+\.mlp\..*": 0.25}, by_name, 0.25]


def test_patterns_that_do_not_fit(folders, tmp_path):
    for ratio, message in [
        ({"norm": 0.5, ".*": 0.1}, "'norm' of the ratios matches no tensor that an earlier key leaves"),
        ({"model.norm.weight": 0.5}, "no ratio is given for 'model.embed_tokens.weight'; add its name, or"),
        ({".*": float("nan")}, r"a ratio of '\.\*' must be finite, got nan"),
        ({"(": 0.5}, r"'\(' of the ratios is no regular expression"),
    ]:
        with pytest.raises(ValueError, match=message):
            interpolate_checkpoints(*folders, [ratio], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mapping_without_a_label_is_named_after_what_it_decides(tmp_path):
    paths, _ = ends_of(tmp_path / "ends", (FP32, FP32), shapes={"ab": (3,), "ac": (3,), "bb": (3,), "bc": (3,)})
    first = {"a.*": 0.25, ".*b": 0.75, ".*": 0.5}
    # The same keys in another order decide otherwise, and other keys the same.
    other, same = {".*b": 0.75, "a.*": 0.25, ".*": 0.5}, {"a[bc]": 0.25, "bb": 0.75, "bc": 0.5}
    # The mean of the first, of other tensors.
    mirrored = {"b.*": 0.25, ".*c": 0.75, ".*": 0.5}
    points = [first, other, 0.25, mirrored]
    names = [folder.name for folder in interpolate_checkpoints(*paths, points, tmp_path / "out")]
    assert re.fullmatch(r"r0\.44-[0-9a-f]{6}", names[0])
    assert re.fullmatch(r"r0\.56-[0-9a-f]{6}", names[1])
    assert names[2] == "r0.25"
    assert re.fullmatch(r"r0\.44-[0-9a-f]{6}", names[3])
    assert plan_interpolation(*paths, [same], tmp_path / "other").outputs == [tmp_path / "other" / names[0]]
    with pytest.raises(ValueError, match=rf"ratios .* and .* would share the folder {names[0]}; drop one"):
        interpolate_checkpoints(*paths, [first, same], tmp_path / "twice")


@pytest.mark.parametrize("label", ["", "a/b", "..", ".hidden", 5])
def test_labels_that_name_no_folder(label, folders, tmp_path):
    with pytest.raises(ValueError, match=rf"{label!r} cannot name the folder of a ratio; use a plain name such as"):
        interpolate_checkpoints(*folders, {label: 0.5}, tmp_path / "out")


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        (0.5, r"ratios must be a sequence, got 0.5; put it into a list"),
        ("0.5", "a ratio must be a number, got '0'"),
        ([[0.5]], r"a ratio must be a number, got \[0.5\]"),
        ([None], "a ratio must be a number, got None"),
        ({"half": "0.5"}, "a ratio must be a number, got '0.5'"),
        ([{".*": "0.5"}], r"a ratio of '\.\*' must be a number, got '0.5'"),
    ],
)
def test_ratios_that_are_no_numbers(ratios, message, folders, tmp_path):
    with pytest.raises(TypeError, match=message):
        interpolate_checkpoints(*folders, ratios, tmp_path / "out")


def test_ratios_of_any_kind_of_number(tmp_path):
    paths, _ = ends_of(tmp_path / "ends", (FP32, FP32))
    ratios = [np.float32(0.5), torch.tensor(0.25), 1, np.int64(2), True]
    with pytest.raises(ValueError, match=r"ratios 1.0 and 1.0 would share the folder r1.00; drop one"):
        interpolate_checkpoints(*paths, ratios, tmp_path / "out")
    made = interpolate_checkpoints(*paths, iter(ratios[:-1]), tmp_path / "out")
    assert [manifest_of(folder)["recipe"]["ratio"] for folder in made] == [0.5, 0.25, 1.0, 2.0]


# --- tensors and rows that only one end has


def test_tensors_that_only_one_end_holds(tmp_path):
    paths, (base, tuned) = ends_of(tmp_path / "ends", (BF16, BF16))
    old, new = torch.randn(5000).bfloat16(), torch.randn(3).bfloat16()
    save_file({**base, "old": old}, paths[0])
    save_file({**tuned, "new": new}, paths[1])
    with pytest.raises(ValueError, match=r"1.safetensors lacks 'old' of .*; .*0.safetensors lacks 'new' of .*; both"):
        interpolate_checkpoints(*paths, [0, 0.5], tmp_path / "out")
    with pytest.raises(ValueError, match="unmatched must be 'refuse' or 'copy' or 'drop', got 'keep'"):
        interpolate_checkpoints(*paths, [0, 0.5], tmp_path / "out", unmatched="keep")
    dropped = interpolate_checkpoints(*paths, [0, 0.5, 1], tmp_path / "drop", unmatched="drop")
    copied = interpolate_checkpoints(*paths, [0, 0.5, 1], tmp_path / "copy", unmatched="copy")
    for without, all_of_it in zip(map(load, dropped), map(load, copied), strict=True):
        assert without.keys() == base.keys()
        assert equal_bits(all_of_it.pop("old"), old)
        assert equal_bits(all_of_it.pop("new"), new)
        assert all(equal_bits(all_of_it[name], without[name]) for name in without)
    save_file({"new": new}, paths[1])
    with pytest.raises(ValueError, match=r"no tensor is in all of .*0.safetensors and .*1.safetensors, so that no"):
        interpolate_checkpoints(*paths, [0.5], tmp_path / "nothing", unmatched="drop")


@pytest.mark.parametrize("rows", [(40, 43), (43, 40)])
@pytest.mark.parametrize("files_from", ["base", "tuned"])
def test_vocabularies_of_two_sizes(rows, files_from, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_LARGEST_BLOCK", 4096)
    names = "base", "tuned"
    ends = [save(llama(i, vocabulary=rows[i]), tmp_path / name) for i, name in enumerate(names)]
    with pytest.raises(
        ValueError,
        match=rf"'model.embed_tokens.weight' is \[{rows[0]}, 16\] and \[{rows[1]}, 16\]; resize one model to the vocab",
    ):
        interpolate_checkpoints(*ends, [0.5], tmp_path / "out")
    options = {"align_vocabulary": True, "files_from": files_from}
    made = interpolate_checkpoints(*ends, [0, 0.3, 1], tmp_path / "out", **options)
    leader = names.index(files_from)
    name = "model.embed_tokens.weight"
    base, tuned = (load(end)[name] for end in ends)
    for folder, ratio in zip(made, (0, 0.3, 1), strict=True):
        got = load(folder)[name]
        assert got.shape == (rows[leader], 16)
        assert equal_bits(got[:40], eager_interpolate(base[:40], tuned[:40], ratio))
        assert equal_bits(got[40:], (base, tuned)[leader][40:])
        assert LlamaForCausalLM.from_pretrained(folder).config.vocab_size == rows[leader]
    # An end that leads comes out as it was.
    made, stored = load(made[leader * 2]), load(ends[leader])
    assert made.keys() == stored.keys()
    assert all(equal_bits(made[name], stored[name]) for name in stored)


# --- manifest and card


def test_the_recipe_is_everything_that_it_takes(folders, tmp_path):
    ratios = {"half": 0.5, "by name": {"model.norm.weight": np.float32(0.25), ".*": torch.tensor(0.75)}}
    asked = {"dtype": torch.float32, "unmatched": "copy", "files_from": "base", "max_shard_size": "3KB"}
    made = interpolate_checkpoints(*folders, ratios, tmp_path / "out", align_vocabulary=True, **asked)
    found = {}
    for folder in made:
        manifest = manifest_of(folder)
        recipe = manifest["recipe"]
        assert [recipe[end]["path"] for end in ("base", "tuned")] == [str(folder) for folder in folders]
        size = (folders[0] / "model.safetensors").stat().st_size
        assert recipe["base"]["bytes"] == {"model.safetensors": size}
        found[folder.name] = recipe["ratio"]
        card = (folder / "README.md").read_text()
        assert json.loads(card.split("```json\n")[1].split("```")[0]) == recipe
        assert f"# Ratio {folder.name}" in card
    options = ("dtype", "unmatched", "align_vocabulary", "files_from", "max_shard_size")
    again = plan_interpolation(
        recipe["base"]["path"],
        recipe["tuned"]["path"],
        found,
        tmp_path / "out",
        **{key: recipe[key] for key in options},
    )
    assert again.identity == manifest["plan"]


def test_a_line_made_twice_is_the_same(folders, tmp_path):
    first, again = (interpolate_checkpoints(*folders, [0.3], tmp_path / name) for name in ("first", "again"))
    assert everything_in(first[0]) == everything_in(again[0])
    assert interpolate_checkpoints(*folders, [0.3], tmp_path / "first") == first


# --- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("stored", [FP32, BF16, FP16, FP64])
def test_a_gpu_makes_the_same_bytes(stored, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_LARGEST_BLOCK", 4096)
    paths, _ = ends_of(tmp_path / "ends", (stored, stored))
    ratios = [*RATIOS, {"norm": 0.25, ".*": 0.75}]
    made = [
        interpolate_checkpoints(*paths, ratios, tmp_path / device, dtype=dtype, device=device)
        for device in ("cpu", "cuda")
    ]
    for ours, theirs in zip(*made, strict=True):
        assert everything_in(ours) == everything_in(theirs)


def test_bytes_of_booleans_are_copied_as_they_are(tmp_path):
    header = {"flags": {"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]}}
    ends = [
        write_raw(tmp_path / f"{name}.safetensors", header, data)
        for name, data in (("a", b"\0\1\2\xff"), ("b", b"\3\0\1\1"))
    ]
    for folder, data in zip(
        interpolate_checkpoints(*ends, [0, 1], tmp_path), (b"\0\1\2\xff", b"\3\0\1\1"), strict=True
    ):
        assert (folder / "model.safetensors").read_bytes().endswith(data)
