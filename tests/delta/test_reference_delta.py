"""tau from every kind of pair; what it is called; what it refuses; how it is pickled."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from bits import same_bits
from deltas import RANDOM, assert_same, checkpoints, two_models
from tiny import count_reads, llama, save
from torch import nn

from fused_merge.delta.reference_delta import ReferenceDelta


@pytest.fixture
def models():
    return two_models()


DTYPES = ["bfloat16 bfloat16 bfloat16", "float16 float16 float16", "bfloat16 float32 float32"]
DTYPES += ["bfloat16 float16 float32", "float32 float32 float32", "float64 float32 float64"]


@pytest.mark.parametrize("dtypes", DTYPES)
def test_tau_is_the_difference_rounded_once(dtypes):
    """In the wider dtype of base and tuned."""
    base, tuned, stored = (getattr(torch, dtype) for dtype in dtypes.split())
    torch.manual_seed(0)
    a, b = torch.randn(5, 7).to(base), torch.randn(5, 7).to(tuned)
    delta = ReferenceDelta.from_models({"w": a}, {"w": b})
    assert delta.dtype("w") == stored
    # Two numbers of at most 24 bits and near exponents subtract exactly in float64.
    assert same_bits(delta.tensor("w"), (b.double() - a.double()).to(stored))


def test_sources_of_every_kind_agree(models, tmp_path):
    base, tuned = models
    whole, shards = save(base, tmp_path / "base"), save(tuned, tmp_path / "tuned", shard="3KB")
    delta = ReferenceDelta.from_models(base, tuned)
    assert delta.names == tuple(name for name, _ in base.named_parameters())
    assert delta.ordered
    for other, ordered in (
        # A state dict may have been read from a file, in the order of the file.
        (ReferenceDelta.from_models(base.state_dict(), tuned.state_dict()), False),
        (ReferenceDelta.from_checkpoints(whole / "model.safetensors", str(shards)), True),
        (ReferenceDelta.from_checkpoints(whole, str(shards)), True),
        (ReferenceDelta.from_models(str(whole), tuned), True),
    ):
        assert_same(delta, other)
        assert other.ordered == ordered


def test_nothing_of_the_models_is_kept(models):
    base, tuned = models
    delta = ReferenceDelta.from_models(base, tuned)
    before = {name: delta.tensor(name).clone() for name in delta.names}
    with torch.no_grad():
        for parameter in [*base.parameters(), *tuned.parameters()]:
            parameter.zero_()
    assert all(same_bits(delta.tensor(name), tau) for name, tau in before.items())


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


def test_nbytes_len_and_repr(models, tmp_path):
    delta = ReferenceDelta.from_models(*models)
    elements = sum(parameter.numel() for parameter in models[0].parameters())
    assert delta.nbytes == 2 * elements
    assert re.fullmatch(f"<ReferenceDelta: {len(delta.names)} tensors, .* MB, dense>", repr(delta))
    assert len(delta) == len(delta.names)
    sparse = ReferenceDelta.load(delta.save(tmp_path / "tau.safetensors", *RANDOM[1::-1], seed=7))
    packed = [sparse.sparse(name, RANDOM) for name in sparse.names]
    assert sparse.nbytes == sum(part.nbytes for each in packed for part in (each.mask, each.values, each.offsets))
    assert "random at 0.1, from" in repr(sparse)


@pytest.mark.parametrize(
    ("bad", "dtype"), [("nan", torch.float32), ("inf", torch.bfloat16), ("nan", torch.float16), ("-inf", torch.float64)]
)
def test_tau_that_is_not_finite(bad, dtype, tmp_path):
    base = {"fine": torch.ones(3, dtype=dtype), "odd": torch.ones(3, 2, dtype=dtype)}
    tuned = {name: tensor.clone() for name, tensor in base.items()}
    tuned["odd"][1, 1] = float(bad)
    message = "the reference delta of 'odd' has a NaN or infinite element; check both checkpoints"
    with pytest.raises(ValueError, match=message):
        ReferenceDelta.from_models(base, tuned)

    delta = checkpoints(tmp_path, base, tuned)
    assert delta.tensor("fine").tolist() == [0, 0, 0]
    for call, *arguments in ((delta.tensor, "odd"), (delta.sparse, "odd", RANDOM), (delta.save, tmp_path / "tau")):
        with pytest.raises(ValueError, match=message):
            call(*arguments)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["base.safetensors", "tuned.safetensors"]


def test_models_that_do_not_match():
    whole = nn.ModuleDict({"model": llama(0).model})
    odd = [{"w": torch.ones(2).to(dtype)} for dtype in (torch.complex64, torch.float8_e4m3fn)]
    for base, tuned, message in (
        (llama(0), llama(1, vocabulary=50), r"'model.embed_tokens.weight' is \[48, 16\] and \[50, 16\]"),
        (whole, llama(1, tied=False).state_dict(), r"base \(module\) lacks 'lm_head.weight' of tuned \(state dict\)"),
        *((state, state, f"'w' of base .* is {state['w'].dtype}, which cannot be merged") for state in odd),
    ):
        with pytest.raises(ValueError, match=message):
            ReferenceDelta.from_models(base, tuned)


def test_only_paths_are_read_lazily(models):
    with pytest.raises(TypeError, match="base must be the path of a safetensors file or a model folder, not a Llama"):
        ReferenceDelta.from_checkpoints(*models)


def test_an_unknown_name(models):
    delta = ReferenceDelta.from_models(*models)
    for ask in (delta.tensor, delta.shape, delta.dtype, lambda name: delta.sparse(name, RANDOM)):
        with pytest.raises(KeyError, match="the reference delta has no tensor 'nobody'; see its `names`"):
            ask("nobody")


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


@pytest.mark.parametrize("kind", ["memory", "checkpoints", "dense", "sparse"])
def test_a_pickled_delta_is_the_same_delta(kind, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    delta, files = made(kind, models, Path())
    # It is immutable, and its own copy.
    assert copy.copy(delta) is copy.deepcopy({"delta": delta})["delta"] is delta
    pickled = pickle.dumps(delta)
    # Files travel as their paths: those of another process need not start in the same folder.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = pickle.loads(pickled)
    for attribute in ("ordered", "sparsity", "nbytes"):
        assert getattr(again, attribute) == getattr(delta, attribute)
    monkeypatch.chdir(tmp_path)
    assert_same(delta, again)
    # Only a delta in memory has tensors to carry.
    size = sum(tensor.nbytes for tensor in map(delta.tensor, delta.names))
    assert (len(pickled) > size) == (not files)
    assert pickle.loads(pickle.dumps(again)).identity == delta.identity


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


def test_buffers_of_a_module_have_no_delta_whatever_their_dtype():
    base, tuned = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    for model in (base, tuned):
        model.register_buffer("rotations", torch.ones(2, dtype=torch.complex64))
    assert ReferenceDelta.from_models(base, tuned).names == ("weight", "bias")
