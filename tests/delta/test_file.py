"""Reference deltas in files: dense, sparse, in another dtype; what the file says; what is no such file."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path

import models as small
import pytest
import torch
from bits import same_bits
from deltas import MAGNITUDE, RANDOM, assert_same, checkpoints, mixed, of_tensors, two_models
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save

from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.delta.tensors import Sparsity
from fused_merge.eager.sparsify import sparsify_tau


@pytest.fixture
def models():
    return two_models()


# --- there and back


@pytest.mark.parametrize("source", ["models", "checkpoints"])
def test_dense_there_and_back(source, models, tmp_path):
    if source == "models":
        delta = ReferenceDelta.from_models(*models)
    else:
        delta = ReferenceDelta.from_checkpoints(*(save(m, tmp_path / str(i)) for i, m in enumerate(models)))
    path = delta.save(str(tmp_path / "new" / "tau.safetensors"), reserve_rate=1.0)
    loaded = ReferenceDelta.load(path)
    assert_same(delta, loaded)
    assert loaded.names == delta.names
    assert (loaded.ordered, loaded.path, loaded.sparsity) == (delta.ordered, str(path), None)
    # Readable without this library.
    assert all(same_bits(load_file(path)[name], delta.tensor(name)) for name in delta.names)
    assert [file.name for file in path.parent.iterdir()] == ["tau.safetensors"]


@pytest.mark.parametrize("sparsity", [RANDOM, MAGNITUDE], ids=lambda s: s.method)
def test_sparse_there_and_back(sparsity, models, tmp_path):
    delta = ReferenceDelta.from_models(*models)
    path = delta.save(tmp_path / "tau.safetensors", sparsity.reserve_rate, sparsity.method, sparsity.seed)
    loaded = ReferenceDelta.load(path)
    assert loaded.sparsity == sparsity
    assert loaded.identity == delta.identity
    assert loaded.names == delta.names
    assert path.stat().st_size < 0.6 * delta.nbytes + 20_000
    for name in delta.names:
        tau = delta.tensor(name)
        keep = sparsify_tau(tau, name=name, **sparsity._asdict()) != 0
        expected = torch.where(keep, tau, torch.zeros((), dtype=tau.dtype))
        assert same_bits(loaded.tensor(name), expected)
        stored, made = loaded.sparse(name, sparsity), delta.sparse(name, sparsity)
        assert same_bits(stored.mask, made.mask)
        assert same_bits(stored.values, made.values)
        assert same_bits(stored.offsets, made.offsets)
    again = ReferenceDelta.load(loaded.save(tmp_path / "again.safetensors"))
    assert_same(loaded, again)
    assert again.sparsity == sparsity


def test_a_stored_sparse_delta_takes_no_other_sparsity(models, tmp_path):
    path = ReferenceDelta.from_models(*models).save(tmp_path / "tau.safetensors", 0.1, "random", 7)
    loaded = ReferenceDelta.load(path)
    name = loaded.names[0]
    for other in (RANDOM._replace(seed=8), RANDOM._replace(reserve_rate=0.2), MAGNITUDE):
        with pytest.raises(
            ValueError, match=r"was saved with method='random', reserve_rate=0.1, seed=7 and method=.* is asked for"
        ):
            loaded.sparse(name, other)
        with pytest.raises(ValueError, match="ask for the same or save the dense delta anew"):
            loaded.save(tmp_path / "other.safetensors", other.reserve_rate, other.method, other.seed)
    with pytest.raises(ValueError, match="method must be"):
        loaded.save(tmp_path / "other.safetensors", 1.0)
    assert not (tmp_path / "other.safetensors").exists()
    # The seed of magnitudes means nothing.
    loaded = ReferenceDelta.load(ReferenceDelta.from_models(*models).save(path, 0.1, "magnitude", 3))
    assert loaded.sparse(name, MAGNITUDE._replace(seed=99)).numel_kept > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reserve_rate": 0.0, "method": "random"}, r"reserve_rate must lie in \(0, 1\], got 0.0"),
        ({"reserve_rate": 1.5, "method": "random"}, "got 1.5"),
        ({"reserve_rate": float("nan"), "method": "random"}, "got nan"),
        ({"reserve_rate": 0.5}, "method must be 'random' or 'magnitude' or 'soft_threshold', got None"),
        ({"reserve_rate": 0.5, "method": "topk"}, "got 'topk'"),
        ({"method": "random"}, "method 'random' needs a reserve_rate below 1"),
    ],
)
def test_options_that_do_not_fit(options, message, models, tmp_path):
    with pytest.raises(ValueError, match=message):
        ReferenceDelta.from_models(*models).save(tmp_path / "tau.safetensors", **options)
    assert list(tmp_path.iterdir()) == []


# --- saved in another dtype


@pytest.mark.parametrize(
    ("models", "dtype"),
    [
        ((torch.float32, torch.float32), torch.bfloat16),
        ((torch.float32, torch.float32), torch.float16),
        ((torch.float32, torch.float32), torch.float64),
        ((torch.float64, torch.float32), torch.bfloat16),
        ((torch.bfloat16, torch.float32), torch.bfloat16),
        ((torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.bfloat16, torch.bfloat16), torch.float16),
    ],
)
@pytest.mark.parametrize("rate", [None, 0.3])
def test_another_dtype_is_the_difference_rounded_once(models, dtype, rate, tmp_path):
    torch.manual_seed(0)
    # Near exponents, so that float64 holds the exact difference; more than 4 KiB, so that its head is not the whole.
    a, b = (torch.rand(45, 51).double().add(1).to(stored) for stored in models)
    delta = checkpoints(tmp_path, {"w": a}, {"w": b})
    loaded = ReferenceDelta.load(
        delta.save(tmp_path / "tau.safetensors", rate, None if rate is None else "random", dtype=dtype)
    )
    tau = (b.double() - a.double()).to(dtype)
    if rate is not None:
        tau = sparsify_tau(tau, name="w", method="random", reserve_rate=rate, seed=0)
    assert same_bits(loaded.tensor("w"), tau)
    assert loaded.dtype("w") == dtype
    kept = int(tau.count_nonzero())
    assert loaded.nbytes == (tau.nbytes if rate is None else kept * dtype.itemsize + 3 * (128 + 4))
    # What has these numbers has this name, however it was made.
    exact = ReferenceDelta.from_models({"w": torch.zeros_like(tau)}, {"w": (b.double() - a.double()).to(dtype)})
    assert loaded.identity == exact.identity != delta.identity


def test_a_dtype_may_be_a_name_and_that_of_the_delta_changes_nothing(tmp_path):
    delta = checkpoints(tmp_path, {"w": torch.zeros(9), "v": torch.ones(2)}, {"w": torch.randn(9), "v": torch.ones(2)})
    for dtype in ("float32", torch.float32):
        same = ReferenceDelta.load(delta.save(tmp_path / "same.safetensors", dtype=dtype))
        assert_same(same, delta)
    by_name = delta.save(tmp_path / "name.safetensors", dtype="bfloat16").read_bytes()
    assert by_name == delta.save(tmp_path / "dtype.safetensors", dtype=torch.bfloat16).read_bytes()


def test_the_forms_of_a_rounded_delta_are_one_delta(tmp_path):
    torch.manual_seed(0)
    base = {"w": torch.randn(3000), "v": torch.randn(7, 5)}
    tuned = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in base.items()}
    delta = checkpoints(tmp_path, base, tuned)
    dense = ReferenceDelta.load(delta.save(tmp_path / "dense.safetensors", dtype="bfloat16"))
    sparse = ReferenceDelta.load(delta.save(tmp_path / "sparse.safetensors", *MAGNITUDE[1::-1], dtype="bfloat16"))
    later = ReferenceDelta.load(dense.save(tmp_path / "later.safetensors", *MAGNITUDE[1::-1]))
    assert dense.identity == sparse.identity == later.identity != delta.identity
    for name in base:
        # The threshold is found among rounded magnitudes.
        assert same_bits(sparse.tensor(name), dense.sparse(name, MAGNITUDE).unpack())
    assert_same(later, sparse)
    # A file of fp32 holds the whole difference and can be rounded as well as the checkpoints can.
    whole = ReferenceDelta.load(delta.save(tmp_path / "whole.safetensors"))
    assert_same(ReferenceDelta.load(whole.save(tmp_path / "rounded.safetensors", dtype="bfloat16")), dense)
    memory = ReferenceDelta.from_models(base, tuned)
    assert_same(ReferenceDelta.load(memory.save(tmp_path / "memory.safetensors", dtype="bfloat16")), dense)


def test_a_run_is_not_resumed_with_a_rounded_delta(tmp_path):
    model, tuned = small.Model(0), small.trained()
    delta = ReferenceDelta.from_models(model, tuned)
    dense, sparse = (
        ReferenceDelta.load(delta.save(tmp_path / f"{i}.safetensors", *options, dtype="bfloat16"))
        for i, options in enumerate([(), (0.5, "random")])
    )
    begun = small.optimizer_of(model, delta)
    small.run(begun, model, 1)
    with pytest.raises(ValueError, match=r"saved with the reference delta .* resume with the delta that the run began"):
        small.optimizer_of(model, dense).load_state_dict(begun.state_dict())
    rounded = small.optimizer_of(model, dense)
    small.run(rounded, model, 1)
    resumed = small.optimizer_of(model, sparse)
    resumed.load_state_dict(rounded.state_dict())
    small.assert_same(resumed, rounded)


def test_what_takes_no_other_dtype(models, tmp_path):
    delta = ReferenceDelta.from_models(*models)
    path = delta.save(tmp_path / "tau.safetensors")
    sentence = (
        r"'model\.\S+' was rounded to torch\.bfloat16 before and takes no other dtype; make the delta with "
        r"ReferenceDelta\.from_checkpoints\(base, tuned\) and save that"
    )
    for rounded in (delta, ReferenceDelta.load(path)):
        with pytest.raises(ValueError, match=sentence):
            rounded.save(tmp_path / "other.safetensors", dtype=torch.float32)
    sparse = ReferenceDelta.load(delta.save(path, 0.1, "random"))
    with pytest.raises(
        ValueError, match=r"tau\.safetensors holds a sparse delta, which takes no other dtype; save the"
    ):
        sparse.save(tmp_path / "other.safetensors", dtype=torch.float16)
    sparse.save(path, dtype=torch.bfloat16)
    for dtype in (torch.int8, "fp32", "auto"):
        with pytest.raises(ValueError, match="dtype must be 'bfloat16', 'float16', 'float32', 'float64' or None, got"):
            delta.save(tmp_path / "other.safetensors", dtype=dtype)
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize("tuned", [1e5, float("nan")])
def test_a_difference_that_another_dtype_cannot_hold(tuned, tmp_path):
    delta = checkpoints(tmp_path, {"w": torch.zeros(3)}, {"w": torch.tensor([1.0, tuned, 2.0])})
    with pytest.raises(
        ValueError, match=r"of 'w' has an element that is not finite in torch\.float16; check both .* or"
    ):
        delta.save(tmp_path / "tau.safetensors", dtype="float16")
    assert not (tmp_path / "tau.safetensors").exists()


# --- what it was made of


def sources(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata().get("sources", "null"))


def test_a_file_says_which_files_it_was_made_of(models, tmp_path):
    base, tuned = save(models[0], tmp_path / "base"), save(models[1], tmp_path / "tuned", shard="3KB")
    shards = sorted(tuned.glob("*.safetensors"))
    assert len(shards) > 1
    expected = {
        "base": {"model.safetensors": hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()},
        "tuned": {shard.name: hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards},
    }
    delta = ReferenceDelta.from_checkpoints(base, tuned)
    for options in ({}, {"reserve_rate": 0.1, "method": "random"}, {"dtype": "float32"}):
        path = delta.save(tmp_path / "tau.safetensors", **options)
        assert sources(path) == expected
        assert sources(ReferenceDelta.load(path).save(tmp_path / "again.safetensors")) == expected
    assert sources(ReferenceDelta.load(path).save(tmp_path / "again.safetensors", dtype="bfloat16")) == expected
    assert sources(ReferenceDelta.from_models(*models).save(path)) is None
    assert sources(ReferenceDelta.load(path).save(tmp_path / "again.safetensors")) is None


def test_a_delta_does_not_replace_what_it_is_made_of(models, tmp_path):
    base, tuned = (save(model, tmp_path / name) for model, name in zip(models, ("base", "tuned"), strict=True))
    (tmp_path / "link.safetensors").symlink_to(tuned / "model.safetensors")
    before = (tuned / "model.safetensors").read_bytes()
    for path in (tuned / "model.safetensors", tmp_path / "link.safetensors"):
        with pytest.raises(ValueError, match=rf"{path} is a file that the delta is made of, which it would replace"):
            ReferenceDelta.from_checkpoints(base, tuned).save(path, dtype="float32")
    assert (tuned / "model.safetensors").read_bytes() == before


# --- read without this library


@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_the_reader_of_the_documentation(method, tmp_path):
    delta = of_tensors(mixed())
    path = delta.save(tmp_path / "tau.safetensors", 0.4, method)
    loaded = ReferenceDelta.load(path)
    for name in loaded.names:
        assert same_bits(loaded.tensor(name), delta.sparse(name, Sparsity(method, 0.4, 0)).unpack())
    # Everything is aligned.
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in load_file(path).items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0

    page = (Path(__file__).parents[2] / "docs/reference_delta.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    reader = {}
    exec(code, reader)
    read = reader["read_sparse"](path)
    assert list(read) == list(loaded.names)
    for name in loaded.names:
        tau = loaded.tensor(name)
        assert same_bits(torch.from_numpy(read[name]), tau.float() if tau.dtype == torch.bfloat16 else tau)
    assert sum(int((tau != 0).sum()) for tau in read.values()) > 1000


def test_the_identity_of_the_documentation(tmp_path):
    torch.manual_seed(0)
    delta = checkpoints(
        tmp_path, {"v": torch.zeros(2, 3), "u": torch.zeros(2000)}, {"v": torch.ones(2, 3), "u": torch.randn(2000)}
    )
    tensors = load_file(delta.save(tmp_path / "tau.safetensors"))
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(json.dumps([name, "F32", list(tensors[name].shape)]).encode())
        digest.update(tensors[name].numpy().tobytes()[:4096])
    assert delta.identity == digest.hexdigest()


# --- what is no such file


def test_files_that_are_no_delta(models, tmp_path):
    folder = save(models[0], tmp_path / "model")
    with pytest.raises(ValueError, match="is a folder and a saved delta is one file; for two model folders use"):
        ReferenceDelta.load(folder)
    with pytest.raises(ValueError, match="is a safetensors file but not a saved reference delta; make one with"):
        ReferenceDelta.load(folder / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors does not exist"):
        ReferenceDelta.load(tmp_path / "gone.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"cut\.safetensors cannot be read as a safetensors file"):
        ReferenceDelta.load(tmp_path / "cut.safetensors")


def altered(path, *, tensors=(), drop=(), metadata=()):
    """Save the delta at `path` again with other tensors or metadata."""
    with safe_open(path, "pt") as file:
        meta = {**file.metadata(), **dict(metadata)}
    kept = {name: tensor for name, tensor in {**load_file(path), **dict(tensors)}.items() if name not in drop}
    save_file(kept, path, metadata={key: value for key, value in meta.items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {"fused_merge.reference_delta": "2"}}, "is a reference delta of version 2; load it with"),
        ({"metadata": {"tensors": None}}, r"contradicts its own metadata \('tensors'\); save the delta again"),
        ({"metadata": {"identity": None}}, "contradicts its own metadata"),
        ({"metadata": {"tensors": "{"}}, "contradicts its own metadata"),
        ({"metadata": {"tensors": '[["w", "F32", [4]]]'}}, "'w.mask' is torch.int32 of|'w.values' is torch"),
        ({"metadata": {"tensors": '[["w", "F32", [-4]]]'}}, "contradicts its own metadata"),
        ({"metadata": {"method": "topk"}}, "method must be 'random' or 'magnitude' or 'soft_threshold'"),
        ({"metadata": {"method": None}}, "'w' stands in one of the two only"),
        ({"metadata": {"reserve_rate": "2"}}, r"reserve_rate must lie in \(0, 1\]"),
        ({"drop": ["w.mask"]}, "'w.mask' stands in one of the two only"),
        ({"tensors": {"x": torch.ones(1)}}, "'x' stands in one of the two only"),
        ({"tensors": {"w.mask": torch.zeros(32, dtype=torch.int32)}}, r"'w.mask' is torch.int32 of \[32\]"),
        ({"tensors": {"w.values": torch.ones(2, 2)}}, r"'w.values' is torch.float32 of \[2, 2\]"),
    ],
)
def test_saved_files_that_contradict_themselves(change, message, tmp_path):
    path = of_tensors({"w": torch.randn(2000)}).save(tmp_path / "tau.safetensors", 0.1, "random")
    altered(path, **change)
    with pytest.raises(ValueError, match=message):
        ReferenceDelta.load(path)


def test_a_mask_that_does_not_count_its_values(tmp_path):
    path = of_tensors({"w": torch.randn(2000)}).save(tmp_path / "tau.safetensors", 0.1, "random")
    loaded = ReferenceDelta.load(altered(path, tensors={"w.values": torch.ones(3)}))
    with pytest.raises(ValueError, match=r"'w' in .*tau\.safetensors is broken: the mask marks \d+ .*save the delta"):
        loaded.tensor("w")
