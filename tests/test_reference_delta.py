"""tau from every kind of pair, saved and loaded, dense and sparse; what it is called; what it refuses."""

from __future__ import annotations

import copy
import json
import pickle
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import count_reads, equal_bits, llama, save
from torch import nn

from fused_merge.eager.sparsify import sparsify_tau
from fused_merge.reference_delta import ReferenceDelta, Sparsity

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
