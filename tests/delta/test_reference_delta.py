"""tau from every kind of pair, saved and loaded, dense and sparse; what it is called; what it refuses."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import re
import struct
from pathlib import Path

import models as small
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import count_reads, equal_bits, llama, save
from torch import nn

from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.delta.tensors import Sparsity
from fused_merge.eager.sparsify import sparsify_tau

RANDOM = Sparsity("random", 0.1, 7)
MAGNITUDE = Sparsity("magnitude", 0.1, 0)


@pytest.fixture
def models():
    return llama(0, dtype=torch.bfloat16), llama(1, dtype=torch.bfloat16)


def assert_same(one: ReferenceDelta, other: ReferenceDelta) -> None:
    assert set(one.names) == set(other.names)
    assert one.identity == other.identity
    for name in one.names:
        assert one.shape(name) == other.shape(name)
        assert one.dtype(name) == other.dtype(name)
        assert equal_bits(one.tensor(name), other.tensor(name))


# --- what tau is


@pytest.mark.parametrize(
    ("base", "tuned", "stored"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_tau_is_the_difference_rounded_once(base, tuned, stored):
    torch.manual_seed(0)
    a, b = torch.randn(5, 7).to(base), torch.randn(5, 7).to(tuned)
    delta = ReferenceDelta.from_models({"w": a}, {"w": b})
    assert delta.dtype("w") == stored
    # Two numbers of at most 24 bits and near exponents subtract exactly in float64.
    assert equal_bits(delta.tensor("w"), (b.double() - a.double()).to(stored))


def test_sources_of_every_kind_agree(models, tmp_path):
    base, tuned = models
    whole, shards = save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned", shard="3KB")
    delta = ReferenceDelta.from_models(base, tuned)
    assert delta.names == tuple(name for name, _ in base.named_parameters())
    assert_same(delta, ReferenceDelta.from_models(base.state_dict(), tuned.state_dict()))
    assert_same(delta, ReferenceDelta.from_checkpoints(whole, str(shards)))
    assert_same(delta, ReferenceDelta.from_models(str(whole), tuned))


def test_only_modules_know_their_order(models, tmp_path):
    base, tuned = models
    folders = save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned")
    assert ReferenceDelta.from_models(base, tuned).ordered
    assert not ReferenceDelta.from_checkpoints(*folders).ordered
    # A state dict may have been read from a file, in the order of the file.
    assert not ReferenceDelta.from_models(base.state_dict(), tuned.state_dict()).ordered


def test_nothing_of_the_models_is_kept(models):
    base, tuned = models
    delta = ReferenceDelta.from_models(base, tuned)
    before = {name: delta.tensor(name).clone() for name in delta.names}
    with torch.no_grad():
        for parameter in [*base.parameters(), *tuned.parameters()]:
            parameter.zero_()
    assert all(equal_bits(delta.tensor(name), tau) for name, tau in before.items())


def test_buffers_of_modules_and_integers_have_no_tau():
    def network():
        return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    base, tuned = network(), network()
    names = ("0.weight", "0.bias", "1.weight", "1.bias")
    assert ReferenceDelta.from_models(base, tuned).names == names
    assert ReferenceDelta.from_models(base, tuned.state_dict()).names == names
    state_dicts = ReferenceDelta.from_models(base.state_dict(), tuned.state_dict())
    assert set(state_dicts.names) == {*names, "1.running_mean", "1.running_var"}


def test_non_contiguous_and_tiny_tensors():
    a, b = torch.randn(4, 6).T, torch.randn(6, 4)
    zero, one = torch.zeros(0), torch.tensor(2.0)
    delta = ReferenceDelta.from_models({"t": a, "0": zero, "1": one}, {"t": b, "0": zero, "1": one + 1})
    assert torch.equal(delta.tensor("t"), b - a)
    assert delta.tensor("t").is_contiguous()
    assert delta.tensor("0").shape == (0,)
    assert delta.tensor("1").item() == 1.0


def test_lazy_means_headers_only(models, tmp_path, monkeypatch):
    folders = [save(model, tmp_path / str(i)) for i, model in enumerate(models)]
    reads = count_reads(monkeypatch)
    delta = ReferenceDelta.from_checkpoints(*folders)
    assert delta.nbytes > 0
    assert reads == []
    # Its identity needs no more than the heads of tensors beyond 4 KiB.
    small = {name for name in delta.names if delta.shape(name).numel() <= 2048}
    assert delta.identity
    assert {name for _, name in reads} <= small
    reads.clear()
    delta.tensor(delta.names[0])
    assert sorted(reads) == [(str(folder), delta.names[0]) for folder in folders]
    path = delta.save(tmp_path / "tau.safetensors")
    reads.clear()
    ReferenceDelta.load(path)
    assert reads == []


def test_identity_sees_names_dtypes_shapes_and_heads():
    def identity(**tensors):
        return ReferenceDelta.from_models(
            {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, tensors
        ).identity

    x = torch.arange(4096.0)
    late, early = x.clone(), x.clone()
    early[1023] += 1
    late[1024] += 1
    seen = {
        identity(a=x),
        identity(b=x),
        identity(a=x.reshape(2, 2048)),
        identity(a=x.double()),
        identity(a=early),
        identity(a=x, b=x),
    }
    assert len(seen) == 6
    assert identity(a=late) == identity(a=x)
    assert identity(b=x, a=early) == identity(a=early, b=x)


def test_nbytes_len_and_repr(models, tmp_path):
    delta = ReferenceDelta.from_models(*models)
    elements = sum(parameter.numel() for parameter in models[0].parameters())
    assert delta.nbytes == 2 * elements
    assert len(delta) == len(delta.names)
    assert repr(delta).startswith(f"<ReferenceDelta: {len(delta)} tensors, ")
    assert repr(delta).endswith("MB, dense>")
    sparse = ReferenceDelta.load(delta.save(tmp_path / "tau.safetensors", *RANDOM[1::-1], seed=7))
    assert sparse.nbytes == sum(sparse.sparse(name, RANDOM).nbytes for name in sparse.names)
    assert "random at 0.1, from" in repr(sparse)


# --- saved


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
    assert all(equal_bits(load_file(path)[name], delta.tensor(name)) for name in delta.names)
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
        assert equal_bits(loaded.tensor(name), expected)
        stored, made = loaded.sparse(name, sparsity), delta.sparse(name, sparsity)
        assert equal_bits(stored.mask, made.mask)
        assert equal_bits(stored.values, made.values)
        assert equal_bits(stored.offsets, made.offsets)
    again = ReferenceDelta.load(loaded.save(tmp_path / "again.safetensors"))
    assert_same(loaded, again)
    assert again.sparsity == sparsity


def test_mixed_dtypes_and_odd_sizes_stay_aligned(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "half": torch.randn(1025).half(),
        "double": torch.randn(33).double(),
        "single": torch.randn(3, 5, 7),
        "none": torch.randn(0),
        "one": torch.randn(()),
    }
    delta = ReferenceDelta.from_models({name: torch.zeros_like(t) for name, t in tensors.items()}, tensors)
    path = delta.save(tmp_path / "tau.safetensors", 0.5, "random")
    loaded = ReferenceDelta.load(path)
    for name in tensors:
        assert equal_bits(loaded.tensor(name), delta.sparse(name, Sparsity("random", 0.5, 0)).unpack())
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118, a handle is no mapping
            width = file.get_tensor(name).element_size()
            assert (8 + length + header[name]["data_offsets"][0]) % width == 0


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


def test_the_seed_of_magnitudes_means_nothing(models, tmp_path):
    loaded = ReferenceDelta.load(
        ReferenceDelta.from_models(*models).save(tmp_path / "tau.safetensors", 0.1, "magnitude", 3)
    )
    name = loaded.names[0]
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


def checkpoints(folder, base, tuned):
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return ReferenceDelta.from_checkpoints(folder / "base.safetensors", folder / "tuned.safetensors")


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
    assert equal_bits(loaded.tensor("w"), tau)
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
        assert equal_bits(sparse.tensor(name), dense.sparse(name, MAGNITUDE).unpack())
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


# --- the file, read without this library


@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_the_reader_of_the_documentation(method, tmp_path):
    torch.manual_seed(0)
    tensors = {
        "half": torch.randn(1025).half(),
        "brain": torch.randn(40, 60).bfloat16(),
        "double": torch.randn(33).double(),
        "single": torch.randn(3, 5, 7),
        "none": torch.randn(0, 4),
        "one": torch.randn(()),
    }
    delta = ReferenceDelta.from_models({name: torch.zeros_like(t) for name, t in tensors.items()}, tensors)
    loaded = ReferenceDelta.load(delta.save(tmp_path / "tau.safetensors", 0.4, method))
    page = (Path(__file__).parents[2] / "docs/reference_delta.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    reader = {}
    exec(code, reader)
    read = reader["read_sparse"](tmp_path / "tau.safetensors")
    assert list(read) == list(loaded.names)
    for name in loaded.names:
        tau = loaded.tensor(name)
        assert equal_bits(torch.from_numpy(read[name]), tau.float() if tau.dtype == torch.bfloat16 else tau)
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


# --- what is refused


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tau_that_is_not_finite(bad, dtype, tmp_path):
    base, tuned = {"fine": torch.ones(3, dtype=dtype), "odd": torch.ones(3, 2, dtype=dtype)}, {}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["odd"][1, 1] = bad
    message = "the reference delta of 'odd' has a NaN or infinite element; check both checkpoints"
    with pytest.raises(ValueError, match=message):
        ReferenceDelta.from_models(base, tuned)

    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    delta = ReferenceDelta.from_checkpoints(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    assert delta.tensor("fine").tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=message):
        delta.tensor("odd")
    with pytest.raises(ValueError, match=message):
        delta.sparse("odd", RANDOM)
    with pytest.raises(ValueError, match=message):
        delta.save(tmp_path / "tau.safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base.safetensors", "tuned.safetensors"]


def test_models_that_do_not_match():
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' is \[48, 16\] and \[50, 16\]"):
        ReferenceDelta.from_models(llama(0), llama(1, vocabulary=50))
    with pytest.raises(ValueError, match=r"base \(module\) lacks 'lm_head.weight' of tuned \(state dict\)"):
        ReferenceDelta.from_models(nn.ModuleDict({"model": llama(0).model}), {**llama(1, tied=False).state_dict()})


def test_complex_and_8_bit_weights():
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        state = {"w": torch.ones(2).to(dtype)}
        with pytest.raises(ValueError, match=f"'w' of base .* is {dtype}, which cannot be merged"):
            ReferenceDelta.from_models(state, state)


def test_only_paths_are_read_lazily(models):
    with pytest.raises(TypeError, match="base must be the path of a safetensors file or a model folder, not a Llama"):
        ReferenceDelta.from_checkpoints(*models)


def test_an_unknown_name(models):
    delta = ReferenceDelta.from_models(*models)
    for ask in (delta.tensor, delta.shape, delta.dtype, lambda name: delta.sparse(name, RANDOM)):
        with pytest.raises(KeyError, match="the reference delta has no tensor 'nobody'; see its `names`"):
            ask("nobody")


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
        ({"metadata": {"fused_merge.delta.reference_delta": "2"}}, "is a reference delta of version 2; load it with"),
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
    delta = ReferenceDelta.from_models({"w": torch.zeros(2000)}, {"w": torch.randn(2000)})
    path = delta.save(tmp_path / "tau.safetensors", 0.1, "random")
    altered(path, **change)
    with pytest.raises(ValueError, match=message):
        ReferenceDelta.load(path)


def test_a_mask_that_does_not_count_its_values(tmp_path):
    delta = ReferenceDelta.from_models({"w": torch.zeros(2000)}, {"w": torch.randn(2000)})
    path = delta.save(tmp_path / "tau.safetensors", 0.1, "random")
    loaded = ReferenceDelta.load(altered(path, tensors={"w.values": torch.ones(3)}))
    with pytest.raises(ValueError, match=r"'w' in .*tau\.safetensors is broken: the mask marks \d+ .*save the delta"):
        loaded.tensor("w")


# --- copied and pickled


def made(kind, models, folder):
    """A delta of each kind, and the files behind it."""
    if kind == "memory":
        return ReferenceDelta.from_models(*models), []
    paths = [save(model, folder / name) for model, name in zip(models, ("base", "tuned"), strict=True)]
    if kind == "checkpoints":
        return ReferenceDelta.from_checkpoints(*paths), paths
    rate = {"reserve_rate": 0.1, "method": "random", "seed": 7} if kind == "sparse" else {}
    path = ReferenceDelta.from_checkpoints(*paths).save(folder / "tau.safetensors", **rate)
    return ReferenceDelta.load(path), [path]


KINDS = ["memory", "checkpoints", "dense", "sparse"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_delta_is_the_same_delta(kind, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    delta, files = made(kind, models, Path())
    pickled = pickle.dumps(delta)
    # Files travel as their paths: those of another process need not start in the same folder.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    twin = pickle.loads(pickled)
    assert twin.ordered == delta.ordered
    assert twin.sparsity == delta.sparsity
    assert twin.nbytes == delta.nbytes
    monkeypatch.chdir(tmp_path)
    assert_same(delta, twin)
    # Only a delta in memory has tensors to carry.
    size = sum(tensor.nbytes for tensor in map(delta.tensor, delta.names))
    assert (len(pickled) > size) == (not files)
    assert pickle.loads(pickle.dumps(twin)).identity == delta.identity


@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_is_immutable_and_its_own_copy(kind, models, tmp_path):
    delta, _ = made(kind, models, tmp_path)
    assert copy.deepcopy(delta) is delta
    assert copy.copy(delta) is delta
    assert copy.deepcopy({"delta": delta})["delta"] is delta


@pytest.mark.parametrize("kind", ["checkpoints", "dense", "sparse"])
def test_files_that_changed_or_went_are_noticed(kind, models, tmp_path):
    delta, paths = made(kind, models, tmp_path)
    pickled = pickle.dumps(delta)
    file = paths[-1] / "model.safetensors" if paths[-1].is_dir() else paths[-1]
    (tmp_path / "other").mkdir()
    other, others = made(kind, (models[0], llama(2, dtype=torch.bfloat16)), tmp_path / "other")
    assert other.identity != delta.identity
    replacement = others[-1] / "model.safetensors" if others[-1].is_dir() else others[-1]
    replacement.replace(file)
    sentence = rf"{re.escape(str(paths[-1]))} changed after the reference delta was pickled; pickle it again"
    with pytest.raises(ValueError, match=sentence):
        pickle.loads(pickled)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(str(paths[-1]))):
        pickle.loads(pickled)
