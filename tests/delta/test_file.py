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


@pytest.fixture(scope="module")
def models():
    return two_models()


def again(delta, folder, *options, **named):
    """A delta as its file gives it back."""
    return ReferenceDelta.load(delta.save(folder / "tau.safetensors", *options, **named))


@pytest.mark.parametrize("source", ["models", "checkpoints"])
def test_dense_there_and_back(source, models, tmp_path):
    if source == "models":
        delta = ReferenceDelta.from_models(*models)
    else:
        delta = ReferenceDelta.from_checkpoints(*(save(m, tmp_path / str(i)) for i, m in enumerate(models)))
    loaded = again(delta, tmp_path / "new", reserve_rate=1.0)
    assert_same(delta, loaded)
    path = tmp_path / "new" / "tau.safetensors"
    assert (loaded.names, loaded.ordered) == (delta.names, delta.ordered)
    assert (loaded.path, loaded.sparsity) == (str(path), None)
    # Readable without this library.
    assert all(same_bits(load_file(path)[name], delta.tensor(name)) for name in delta.names)
    assert [file.name for file in path.parent.iterdir()] == ["tau.safetensors"]


@pytest.mark.parametrize("sparsity", [RANDOM, MAGNITUDE], ids=lambda s: s.method)
def test_sparse_there_and_back(sparsity, models, tmp_path):
    delta = ReferenceDelta.from_models(*models)
    loaded = again(delta, tmp_path, sparsity.reserve_rate, sparsity.method, sparsity.seed)
    assert (loaded.sparsity, loaded.identity, loaded.names) == (sparsity, delta.identity, delta.names)
    assert Path(loaded.path).stat().st_size < 0.6 * delta.nbytes + 20_000
    for name in delta.names:
        tau = delta.tensor(name)
        keep = sparsify_tau(tau, name=name, **sparsity._asdict()) != 0
        assert same_bits(loaded.tensor(name), torch.where(keep, tau, torch.zeros((), dtype=tau.dtype)))
        stored, made = loaded.sparse(name, sparsity), delta.sparse(name, sparsity)
        for part in ("mask", "values", "offsets"):
            assert same_bits(getattr(stored, part), getattr(made, part))
    copied = again(loaded, tmp_path / "again")
    assert_same(loaded, copied)
    assert copied.sparsity == sparsity


def test_a_stored_sparse_delta_takes_no_other_sparsity(models, tmp_path):
    delta = ReferenceDelta.from_models(*models)
    loaded, name = again(delta, tmp_path, 0.1, "random", 7), delta.names[0]
    message = "was saved with method='random', reserve_rate=0.1, seed=7 and method=.* is asked for; ask for the same or"
    for other in (RANDOM._replace(seed=8), RANDOM._replace(reserve_rate=0.2), MAGNITUDE):
        with pytest.raises(ValueError, match=message):
            loaded.sparse(name, other)
        with pytest.raises(ValueError, match=message):
            loaded.save(tmp_path / "other.safetensors", other.reserve_rate, other.method, other.seed)
    with pytest.raises(ValueError, match="method must be"):
        loaded.save(tmp_path / "other.safetensors", 1.0)
    assert not (tmp_path / "other.safetensors").exists()
    # The seed of magnitudes means nothing.
    loaded = again(delta, tmp_path, 0.1, "magnitude", 3)
    assert loaded.sparse(name, MAGNITUDE._replace(seed=99)).values.numel() > 0


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


@pytest.mark.parametrize(
    ("models", "dtype"),
    [
        *(("float32 float32", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
        *((models, torch.bfloat16) for models in ("float64 float32", "bfloat16 float32")),
        *(("bfloat16 bfloat16", dtype) for dtype in (torch.float32, torch.float16)),
    ],
)
@pytest.mark.parametrize("rate", [None, 0.3])
def test_another_dtype_is_the_difference_rounded_once(models, dtype, rate, tmp_path):
    torch.manual_seed(0)
    # Near exponents, so that float64 holds the exact difference; more than 4 KiB, so that its head is not the whole.
    a, b = (torch.rand(45, 51).double().add(1).to(getattr(torch, stored)) for stored in models.split())
    delta = checkpoints(tmp_path, {"w": a}, {"w": b})
    loaded = again(delta, tmp_path, rate, rate and "random", dtype=dtype)
    tau = rounded = (b.double() - a.double()).to(dtype)
    if rate is not None:
        tau = sparsify_tau(tau, name="w", method="random", reserve_rate=rate, seed=0)
    assert same_bits(loaded.tensor("w"), tau)
    assert loaded.dtype("w") == dtype
    kept = int(tau.count_nonzero())
    assert loaded.nbytes == (tau.nbytes if rate is None else kept * dtype.itemsize + 3 * (128 + 4))
    # What has these numbers has this name, however it was made.
    assert loaded.identity == of_tensors({"w": rounded}).identity != delta.identity


def test_a_dtype_may_be_a_name_and_that_of_the_delta_changes_nothing(tmp_path):
    delta = checkpoints(tmp_path, {"w": torch.zeros(9), "v": torch.ones(2)}, {"w": torch.randn(9), "v": torch.ones(2)})
    for dtype in ("float32", torch.float32):
        assert_same(again(delta, tmp_path, dtype=dtype), delta)
    written = [delta.save(tmp_path / "d", dtype=dtype).read_bytes() for dtype in ("bfloat16", torch.bfloat16)]
    assert written[0] == written[1]


def test_the_forms_of_a_rounded_delta_are_one_delta(tmp_path):
    torch.manual_seed(0)
    base = {"w": torch.randn(3000), "v": torch.randn(7, 5)}
    tuned = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in base.items()}
    delta = checkpoints(tmp_path, base, tuned)
    dense = again(delta, tmp_path / "dense", dtype="bfloat16")
    sparse = again(delta, tmp_path / "sparse", *MAGNITUDE[1::-1], dtype="bfloat16")
    later = again(dense, tmp_path / "later", *MAGNITUDE[1::-1])
    assert dense.identity == sparse.identity != delta.identity
    for name in base:
        # The threshold is found among rounded magnitudes.
        assert same_bits(sparse.tensor(name), dense.sparse(name, MAGNITUDE).unpack())
    assert_same(later, sparse)
    # A file of fp32 holds the whole difference and can be rounded as well as the checkpoints can, and so can memory.
    for i, whole in enumerate([again(delta, tmp_path / "whole"), ReferenceDelta.from_models(base, tuned)]):
        assert_same(again(whole, tmp_path / str(i), dtype="bfloat16"), dense)


def test_a_run_is_not_resumed_with_a_rounded_delta(tmp_path):
    model, tuned = small.Model(0), small.trained()
    delta = ReferenceDelta.from_models(model, tuned)
    dense, sparse = (again(delta, tmp_path / str(len(o)), *o, dtype="bfloat16") for o in ((), (0.5, "random")))
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
    sentence = (
        r"'model\.\S+' was rounded to torch\.bfloat16 before and takes no other dtype; make the delta with "
        r"ReferenceDelta\.from_checkpoints\(base, tuned\) and save that"
    )
    sparse = r"tau\.safetensors holds a sparse delta, which takes no other dtype; save the"
    refused = [(delta, sentence), (again(delta, tmp_path), sentence), (again(delta, tmp_path, 0.1, "random"), sparse)]
    for made, sentence in refused:
        with pytest.raises(ValueError, match=sentence):
            made.save(tmp_path / "other.safetensors", dtype=torch.float32)
    made.save(tmp_path / "tau.safetensors", dtype=torch.bfloat16)
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


def sources(delta):
    with safe_open(delta.path, "pt") as file:
        return json.loads(file.metadata().get("sources", "null"))


def test_a_file_says_which_files_it_was_made_of(models, tmp_path):
    base, tuned = save(models[0], tmp_path / "base"), save(models[1], tmp_path / "tuned", shard="3KB")
    expected = {
        folder.name: {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors"))}
        for folder in (base, tuned)
    }
    assert len(expected["tuned"]) > 1 == len(expected["base"])
    delta = ReferenceDelta.from_checkpoints(base, tuned)
    for options in ({}, {"reserve_rate": 0.1, "method": "random"}, {"dtype": "float32"}):
        saved = again(delta, tmp_path, **options)
        assert sources(saved) == sources(again(saved, tmp_path / "again")) == expected
    assert sources(again(saved, tmp_path / "again", dtype="bfloat16")) == expected
    saved = again(ReferenceDelta.from_models(*models), tmp_path)
    assert sources(saved) is sources(again(saved, tmp_path / "again")) is None


def test_a_delta_does_not_replace_what_it_is_made_of(models, tmp_path):
    base, tuned = (save(model, tmp_path / name) for model, name in zip(models, ("base", "tuned"), strict=True))
    (tmp_path / "link.safetensors").symlink_to(tuned / "model.safetensors")
    before = (tuned / "model.safetensors").read_bytes()
    for path in (tuned / "model.safetensors", tmp_path / "link.safetensors"):
        with pytest.raises(ValueError, match=rf"{path} is a file that the delta is made of, which it would replace"):
            ReferenceDelta.from_checkpoints(base, tuned).save(path, dtype="float32")
    assert (tuned / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_the_reader_of_the_documentation(method, tmp_path):
    delta = of_tensors(mixed())
    loaded = again(delta, tmp_path, 0.4, method)
    for name in loaded.names:
        assert same_bits(loaded.tensor(name), delta.sparse(name, Sparsity(method, 0.4, 0)).unpack())
    path = Path(loaded.path)
    # Everything is aligned.
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in load_file(path).items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0

    page = (Path(__file__).parents[2] / "docs/reference/delta-file.md").read_text()
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
    """It depends on names, dtypes, shapes and heads, and on nothing else."""
    delta = of_tensors(mixed() | {"long": torch.randn(2000)})
    tensors = load_file(delta.save(tmp_path / "tau.safetensors"))
    codes = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(json.dumps([name, codes[tensors[name].dtype], list(tensors[name].shape)]).encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()[:4096])
    assert delta.identity == digest.hexdigest()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    assert checkpoints(tmp_path, zeros, tensors).identity == delta.identity


def test_files_that_are_no_delta(models, tmp_path):
    folder = save(models[0], tmp_path / "model")
    (tmp_path / "cut.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-3])
    for path, error, message in (
        ("model", ValueError, "is a folder and a saved delta is one file; for two model folders use"),
        ("model/model.safetensors", ValueError, "is a safetensors file but not a saved reference delta; make one with"),
        ("gone.safetensors", FileNotFoundError, r"gone\.safetensors does not exist"),
        ("cut.safetensors", ValueError, r"cut\.safetensors cannot be read as a safetensors file"),
    ):
        with pytest.raises(error, match=message):
            ReferenceDelta.load(tmp_path / path)


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
