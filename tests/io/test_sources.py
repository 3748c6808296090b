"""Four kinds of sources with one face; every broken file in one sentence that names it."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file
from tiny import llama, save
from torch import nn

from fused_merge.io.sources import open_files, open_source, same_bits


def weights(**tensors):
    return {name: torch.as_tensor(value, dtype=torch.float32) for name, value in tensors.items()}


# --- reading


@pytest.mark.parametrize("kind", ["module", "state dict", "file", "folder", "shards"])
def test_all_sources_give_the_same_tensors(kind, tmp_path):
    model = llama(0)
    folder = save(model, tmp_path, shard="4KB" if kind == "shards" else "5GB")
    kinds = {"module": model, "state dict": model.state_dict(), "file": str(folder / "model.safetensors")}
    opened = open_source(kinds.get(kind, folder))
    parameters = dict(model.named_parameters())
    assert set(opened) - set(opened.aliases) == set(parameters)
    for name, parameter in parameters.items():
        assert opened.shape(name) == parameter.shape
        assert opened.dtype(name) == parameter.dtype
        assert same_bits(opened[name], parameter.detach())
    if kind == "shards":
        assert len(opened.files()) == len(opened.shards) > 2
        assert sorted(name for names in opened.shards.values() for name in names) == sorted(opened)
    else:
        assert len(opened.files()) == (kind in ("file", "folder"))


def test_wrappers_do_not_change_names(tmp_path):
    assert list(open_source(nn.DataParallel(nn.Linear(2, 3)))) == ["weight", "bias"]
    save_file({"module._orig_mod.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    source = open_source(tmp_path / "x.safetensors")
    assert list(source) == ["weight"]
    assert source["weight"].tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="two tensors called 'weight' when prefixes of wrappers are dropped"):
        open_source({"weight": torch.ones(1), "module.weight": torch.ones(1)})


def test_a_module_gives_parameters_and_persistent_buffers():
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    module[0].register_buffer("scratch", torch.zeros(2), persistent=False)
    source = open_source(module)
    assert set(source) == set(module.state_dict())
    assert source.buffers == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert not source.is_merged("1.num_batches_tracked")
    assert source.is_merged("1.running_mean")


def test_tied_weights_are_one_tensor_under_their_first_name():
    model = llama(0)
    assert open_source(model).aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    tied = torch.randn(4)
    source = open_source({"a": tied, "b": tied, "view": tied[:2], "empty": tied[:0], "void": torch.empty(0)})
    assert source.aliases == {"b": "a"}
    assert source["b"] is not None


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (1, 9), (4, 0), (2, 3, 4), (5, 1, 6)])
@pytest.mark.parametrize("n", [1, 4, 6, 13, 1000])
def test_head_is_the_first_row_major_elements(shape, n, tmp_path):
    tensor = torch.arange(60.0)[: torch.Size(shape).numel()].reshape(shape)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    for source in (open_source({"x": tensor}), open_source(tmp_path / "x.safetensors")):
        assert torch.equal(source.head("x", n), tensor.reshape(-1)[:n])
    if tensor.ndim == 2:
        assert torch.equal(open_source({"x": tensor.T}).head("x", n), tensor.T.reshape(-1)[:n])


def test_a_path_like_object(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (folder,) = [entry for entry in os.scandir(tmp_path.parent) if entry.name == tmp_path.name]
    assert list(open_source(folder)) == ["w"]


def test_bits_tell_apart_what_values_do_not():
    zero = torch.tensor([0.0, float("nan")])
    assert same_bits(zero, zero.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.double())


# --- what is refused


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (3, TypeError, "base must be a module, a state dict or a path, got a int"),
        ({"a": 3}, TypeError, r"base \(state dict\) must map names to tensors, but 'a' is a int"),
        ({3: torch.ones(1)}, TypeError, "but 3 is a Tensor"),
        ({"a": torch.ones(2).to_sparse()}, ValueError, "'a' of base .* stored as torch.sparse_coo"),
        ({"a": torch.ones(2, device="meta")}, ValueError, "'a' of base .* a meta tensor without data"),
    ],
)
def test_sources_that_are_none(source, error, message):
    with pytest.raises(error, match=message):
        open_source(source, role="base")


def test_dtypes_that_cannot_be_merged():
    dtypes = {"c": torch.complex64, "f8": torch.float8_e4m3fn, "i": torch.int64}
    source = open_source({name: torch.ones(2).to(dtype) for name, dtype in dtypes.items()})
    assert not source.is_merged("i")
    for name, dtype in [("c", "complex64"), ("f8", "float8_e4m3fn")]:
        with pytest.raises(ValueError, match=f"'{name}' of .* is torch.{dtype}, which cannot be merged; convert"):
            source.is_merged(name)


def test_paths_that_are_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/model does not exist; give a local \.safetensors"):
        open_source("nowhere/model")
    with pytest.raises(TypeError, match="tuned must be the path of a safetensors file or a model folder, not a dict"):
        open_files({}, role="tuned")
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor .*index\.json; give the"):
        open_source(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a safetensors file; pickle files are never"):
        open_source(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"it holds pytorch_model\.bin, and pickle files are never loaded"):
        open_source(tmp_path)


def test_a_single_file_beside_an_index_is_read_and_said(tmp_path, caplog):
    save_file(weights(a=[1, 2]), tmp_path / "model.safetensors")
    open_source(tmp_path)
    assert caplog.messages == []
    save_file(weights(a=[3, 4]), tmp_path / "shard.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "shard.safetensors"}}')
    assert open_source(tmp_path)["a"].tolist() == [1, 2]
    (sentence,) = caplog.messages
    assert sentence == (
        f"{tmp_path} holds both model.safetensors and model.safetensors.index.json; only model.safetensors is read, "
        "as Transformers does"
    )
