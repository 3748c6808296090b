"""The writer against safetensors itself; nothing left behind when something fails."""

from __future__ import annotations

import os

import pytest
import torch
from bad_json import fuzz
from bits import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fused_merge.io.writer import SafetensorsWriter

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def manifest_of(tensors):
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def write_file(path, manifest, tensors, metadata=None):
    with SafetensorsWriter(path, manifest, metadata) as writer:
        for name, tensor in tensors:
            writer.write(name, tensor)


@settings(fuzz, max_examples=60)
@given(
    specs=st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.booleans()),
        max_size=6,
    ),
    seed=st.integers(0, 99),
)
def test_safetensors_reads_what_was_written(specs, seed, tmp_path):
    generator = torch.Generator().manual_seed(seed)
    tensors, manifest = {}, {}
    for name, (dtype, shape, open_length) in specs.items():
        tensor = (8 * torch.randn(shape, generator=generator)).to(dtype)
        tensors[name] = tensor.flatten() if open_length else tensor.transpose(0, -1) if shape else tensor
        manifest[name] = (dtype, None if open_length else tensors[name].shape)
    path = tmp_path / "x.safetensors"
    write_file(path, manifest, reversed(tensors.items()), {"format": "pt", "ключ": "значение"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "ключ": "значение"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert same_bits(file.get_tensor(name), tensor)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_single_element_with_a_wide_stride(tmp_path):
    tensors = {"x": torch.arange(4.0).to(torch.bfloat16)[::4], "y": torch.arange(6.0)[::2]}
    write_file(tmp_path / "x.safetensors", manifest_of(tensors), tensors.items())
    assert load_file(tmp_path / "x.safetensors")["y"].tolist() == [0.0, 2.0, 4.0]


def test_an_existing_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"'a' is torch.float32"):
        write_file(path, manifest_of({"a": torch.zeros(2)}), [("a", torch.zeros(3))])
    assert load_file(path)["a"].tolist() == [1.0, 1.0]
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        ([], r"x\.safetensors was closed without 'a' of its manifest"),
        ([("a", torch.ones(3))], r"'a' is torch.float32 of \[3\], but the manifest of .*x\.safetensors says .* of \[2"),
        ([("a", torch.ones(2).half())], r"'a' is torch.float16 of \[2\], but"),
        ([("a", torch.ones(2)), ("a", torch.ones(2))], "'a' is written to .* a second time"),
    ],
)
def test_a_manifest_that_is_not_kept(write, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_file(tmp_path / "x.safetensors", manifest_of({"a": torch.ones(2)}), write)
    assert os.listdir(tmp_path) == []


def test_a_dtype_that_the_format_lacks(tmp_path):
    with pytest.raises(ValueError, match=r"'a' is torch.complex128, which safetensors files cannot hold; convert"):
        SafetensorsWriter(tmp_path / "x.safetensors", {"a": (torch.complex128, (2,))})


@pytest.mark.usefixtures("_small_files")
def test_a_full_disk(tmp_path):
    big = torch.zeros(2**16)
    writer = SafetensorsWriter(tmp_path / "x.safetensors", manifest_of({"a": big}))
    with pytest.raises(OSError, match=r"cannot write .*x\.safetensors: File too large; nothing of it is left"), writer:
        writer.write("a", big)
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*x\.safetensors: .*; nothing of it is left"):
        SafetensorsWriter(tmp_path / "file" / "x.safetensors", {}).__enter__()
