"""Four kinds of sources with one face; every broken file in one sentence that names it."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import llama, save
from torch import nn

import fused_merge as fm
from fused_merge.checkpoints.folders import verify_checkpoint
from fused_merge.io import headers
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


@pytest.fixture
def unmapped(monkeypatch):
    """Let no model file be mapped, in the words of the safetensors library, which has no number for it."""

    def refuse(path, **options):
        if str(path).endswith(".safetensors"):
            raise OSError("No such device (os error 19)")
        return safe_open(path, **options)

    return lambda: monkeypatch.setattr(headers, "safe_open", refuse)


BOXES = [None, (slice(0, 0),), (slice(1, 3),), (slice(0, 4), slice(1, 3)), (slice(2, 4), slice(0, 5), slice(1, 2))]


def test_a_file_system_without_mmap_is_read_alike(unmapped, tmp_path):
    path = tmp_path / "model.safetensors"
    shapes = {"scalar": (), "none": (0, 3), "vector": (7,), "matrix": (4, 5), "cube": (4, 5, 2)}
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    save_file({**tensors, "flag": torch.tensor([True, False]), "count": torch.tensor(3)}, path, {"format": "pt"})
    mapped = open_source(path)
    unmapped()
    source = open_source(tmp_path)
    assert (list(source), source.metadata(path.name)) == (list(mapped), {"format": "pt"})
    for name in source:
        assert same_bits(source[name], mapped[name])
        assert same_bits(source.head(name, 6), mapped.head(name, 6))
        for box in BOXES:
            if box is None or (len(box) <= len(source.shape(name)) and source.shape(name)[0] == 4):
                assert same_bits(source.box(name, box), mapped.box(name, box))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as a safetensors file .*; copy or"):
        open_source(path)


@pytest.mark.skipif(not os.path.exists("/sys/kernel/uevent_seqnum"), reason="no file that cannot be mapped")
def test_a_file_that_really_cannot_be_mapped():
    with pytest.raises(ValueError, match="uevent_seqnum cannot be read as a safetensors file"):
        open_source("/sys/kernel/uevent_seqnum")


def test_a_home_folder_is_found(tmp_path, monkeypatch, run):
    monkeypatch.setenv("HOME", str(tmp_path))
    for i, name in enumerate(("base", "tuned")):
        save(llama(i), tmp_path / name)
    assert open_source("~/base").origin == str(tmp_path / "base")
    assert fm.interpolate_checkpoints("~/base", "~/tuned", [0.5], "~/line") == [tmp_path / "line" / "r0.50"]
    merged = fm.merge_checkpoints("~/base", {"~/tuned": 0.5}, method="ties", config_from="~/tuned", out="~/merged")
    assert (merged, verify_checkpoint("~/merged") > 0) == (tmp_path / "merged", True)
    delta = fm.ReferenceDelta.from_checkpoints("~/base", "~/tuned")
    assert delta.save("~/tau.safetensors") == tmp_path / "tau.safetensors"
    assert fm.ReferenceDelta.load("~/tau.safetensors").identity == delta.identity
    fm.LayerRatios.by_parts("~/base", [0.1, 0.2]).save("~/ratios.json")
    assert fm.LayerRatios.load("~/ratios.json").ratios == (0.1, 0.2)
    # What a shell leaves as it is, as in --out=~/line.
    assert run("interpolate", "~/base", "~/tuned", "--ratios=0.1", "--out=~/line")[0] == 0
    assert run("verify", "~/line/r0.10", "~/merged")[0] == 0
    assert run("delta", "~/base", "~/tuned", "--out=~/tau.safetensors")[0] == 1
    assert sorted(os.listdir(tmp_path)) == ["base", "line", "merged", "ratios.json", "tau.safetensors", "tuned"]


CHANGED = r"model\.safetensors vanished or changed after it was looked at; put it back and run the same again"


@pytest.mark.parametrize("shorter", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_file_that_changed_is_not_read(mapped, shorter, unmapped, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100, 100), "v": torch.ones(3)}, path)
    if not mapped:
        unmapped()
    source = open_source(tmp_path)
    assert source["w"].sum() == 10_000
    if shorter:
        os.truncate(path, 4096)
    else:
        save_file({"w": torch.zeros(100, 100), "v": torch.ones(3)}, path)
        os.utime(path, ns=(0, 0))
    for read in (lambda: source["w"], lambda: source.box("w", (slice(1),)), lambda: source.head("w", 3)):
        with pytest.raises(OSError, match=CHANGED):
            read()
    path.unlink()
    with pytest.raises(OSError, match=CHANGED):
        source["v"]


def test_a_file_that_became_shorter_does_not_end_the_process(tmp_path):
    """A child tells, which a signal would end: SIGBUS, where the pages of a mapped file are gone."""
    for name in ("base", "tuned"):
        save_file({"w": torch.ones(300, 300)}, tmp_path / f"{name}.safetensors")
    delta = fm.ReferenceDelta.from_checkpoints(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    os.truncate(tmp_path / "tuned.safetensors", 4096)
    child = os.fork()
    if child == 0:
        try:
            delta.tensor("w").sum()
        except OSError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


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
