"""What `inspect_delta` and `fused-merge inspect` measure, against hand-worked numbers and numpy in float64."""

from __future__ import annotations

import json
import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import count_reads, llama, save

from fused_merge.delta import inspection
from fused_merge.delta.inspection import inspect_delta, layer_name
from fused_merge.delta.reference_delta import ReferenceDelta

KEYS = ("numel", "norm", "density", "relative_norm", "kept", "cosine", "sign_agreement")
NAMES = ("model.layers.0.a", "model.layers.0.b", "model.layers.10.a", "model.layers.2.a", "head.weight")


def named(*values):
    return dict(zip(NAMES, map(torch.tensor, values), strict=True))


BASE = named([[6.0, 0], [8, 0]], [0.0] * 4, [1.0, 2], [0.0], [2.0])
TAU = named([[3.0, 0], [0, 4]], [0.0, 12, 0, 0], [-1.0, 1], [0.0], [1.0])
OTHER = named([[3.0, 5], [5, -4]], [1.0, 12, 0, 0], [-2.0, 2], [7.0], [-3.0])


def delta_of(tau, base=None):
    """The reference delta that is `tau`."""
    base = base or {name: torch.zeros_like(value) for name, value in tau.items()}
    return ReferenceDelta.from_models(base, {name: base[name] + value for name, value in tau.items()})


def by_name(rows, scope):
    return {row["name"]: row for row in rows if row["scope"] == scope}


def exactly(number):
    return pytest.approx(number, rel=1e-15)


def test_a_hand_worked_example():
    rows = inspect_delta(delta_of(TAU, BASE), base=BASE, other=delta_of(OTHER), reserve_rate=0.5)
    layers = ["model.layers.0", "model.layers.10", "model.layers.2", "head"]
    order = [*(("tensor", name) for name in TAU), *(("layer", name) for name in layers), ("all", "all")]
    assert [(row["scope"], row["name"]) for row in rows] == order
    tensors, layers = (
        {name: [row[key] for key in KEYS] for name, row in by_name(rows, scope).items()}
        for scope in ("tensor", "layer")
    )
    # The two largest of four are all that there is; 3*3 - 4*4 over 5 * sqrt(75); 3 agrees and 4 does not.
    assert tensors["model.layers.0.a"] == [4, 5, 0.5, 0.5, 0.5, exactly(-7 / (5 * math.sqrt(75))), 0.5]
    # Half of four elements are two, of which only one is not zero.
    assert tensors["model.layers.0.b"] == [4, 12, 0.25, None, 0.25, exactly(12 / math.sqrt(145)), 1]
    # Both tie: one is asked for and two stay.
    assert tensors["model.layers.10.a"] == [2, exactly(math.sqrt(2)), 1, exactly(math.sqrt(2 / 5)), 1, exactly(1), 1]
    assert tensors["model.layers.2.a"] == [1, 0, 0, None, 0, None, None]
    assert layers["head"] == [1, 1, 1, 0.5, 1, -1, 0]
    cosine = exactly((9 - 16 + 144) / (13 * math.sqrt(75 + 145)))
    assert layers["model.layers.0"] == [8, 13, 3 / 8, 1.3, 3 / 8, cosine, exactly(2 / 3)]
    assert list(rows[-1]) == ["scope", "name", *KEYS]
    # Counts stay whole numbers.
    assert {type(row["numel"]) for row in rows} == {int}
    assert [rows[-1][key] for key in KEYS[:3]] == [12, exactly(math.sqrt(169 + 2 + 1)), 0.5]
    assert rows[-1]["relative_norm"] == exactly(math.sqrt(172 / (100 + 5 + 4)))
    assert rows[-1]["kept"] == 0.5


@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_a_model_in_numpy(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "_CHUNK", chunk)
    models = [llama(seed, dtype=torch.bfloat16) for seed in range(3)]
    base, tuned, third = (save(model, tmp_path / str(i)) for i, model in enumerate(models))
    delta, other = (ReferenceDelta.from_checkpoints(base, end) for end in (tuned, third))
    rows = inspect_delta(delta, base=base, other=other, reserve_rate=0.1)
    states = [{name: p.detach().double().numpy() for name, p in model.named_parameters()} for model in models]
    tensors, layers = by_name(rows, "tensor"), by_name(rows, "layer")
    assert set(tensors) == set(states[0])
    assert set(layers) == {"model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"}

    def rounded(x):
        return torch.from_numpy(x).to(torch.bfloat16).double().numpy()

    for scope, named in (("tensor", tensors), ("layer", layers)):
        for name, row in named.items():
            members = [n for n in states[0] if n == name or (scope == "layer" and n.startswith(f"{name}."))]
            b = np.concatenate([states[0][n].ravel() for n in members])
            x, y = (np.concatenate([rounded(s[n] - states[0][n]).ravel() for n in members]) for s in states[1:])
            norm, kept = np.sqrt((x**2).sum()), 0
            for n in members:
                part = np.abs(rounded(states[1][n] - states[0][n])).ravel()
                threshold = np.sort(part)[-max(1, int(0.1 * part.size))]
                kept += int(((part >= threshold) & (part > 0)).sum())
            both = (x != 0) & (y != 0)
            products = np.sqrt((y**2).sum()) * norm
            expected = {
                "numel": x.size,
                "norm": norm,
                "density": (x != 0).mean(),
                "relative_norm": norm / np.sqrt((b**2).sum()),
                "kept": kept / x.size,
                "cosine": (x * y).sum() / products if products else None,
                "sign_agreement": (np.sign(x) == np.sign(y))[both].mean() if both.any() else None,
            }
            for key, value in expected.items():
                assert row[key] == (None if value is None else pytest.approx(value, rel=1e-12, abs=1e-15))


@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_a_sparse_file_is_as_dense_as_it_is(method, tmp_path):
    torch.manual_seed(0)
    dense = delta_of({"layers.0.w": torch.randn(100, 50), "layers.1.w": torch.randn(1000)})
    path = dense.save(tmp_path / "tau.safetensors", reserve_rate=0.01, method=method)
    rows = inspect_delta(ReferenceDelta.load(path), other=dense)
    for name, row in by_name(rows, "tensor").items():
        stored = ReferenceDelta.load(path).tensor(name).double()
        assert row["density"] == int((stored != 0).sum()) / stored.numel()
        assert 0 < row["density"] < 0.03
        assert row["sign_agreement"] == 1
        assert row["cosine"] == pytest.approx(float(stored.norm() / dense.tensor(name).double().norm()), rel=1e-12)


def test_every_tensor_is_read_once_and_rows_hold_what_was_asked_for(tmp_path, monkeypatch):
    base, tuned = (save(llama(seed), tmp_path / str(seed)) for seed in range(2))
    delta = ReferenceDelta.from_checkpoints(base, tuned)
    reads = count_reads(monkeypatch)
    rows = inspect_delta(delta)
    assert sorted(reads) == sorted((str(path), name) for path in (base, tuned) for name in delta.names)
    assert {tuple(row) for row in rows} == {("scope", "name", "numel", "norm", "density")}


def test_the_layer_of_a_name():
    layers = {"model.layers.3.mlp.experts.12.up.weight": "model.layers.3", "0.weight": "0", "scale": "scale"}
    layers |= {"model.embed_tokens.weight": "model.embed_tokens"}
    assert {name: layer_name(name) for name in layers} == layers


ONES = {"w": torch.ones(2), "x": torch.ones(3)}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"reserve_rate": 0.0}, r"reserve_rate must lie in \(0, 1\], got 0.0"),
        ({"reserve_rate": math.nan}, r"reserve_rate must lie in \(0, 1\], got nan"),
        ({"base": {"w": torch.zeros(2)}}, "the base lacks 'x'; both must be of one model"),
        ({"base": {"w": torch.zeros(2), "x": torch.zeros(2)}}, r"'x' is \[3\] and in the base \[2\]"),
        ({"other": delta_of({"x": torch.ones(3)})}, "the other reference delta lacks 'w'"),
        ({"other": delta_of({"w": torch.ones(1), "x": torch.ones(3)})}, r"'w' is \[2\] and in the other .* \[1\]"),
        ({"other": delta_of(ONES | {"y": torch.ones(1)})}, "only the other reference delta holds 'y'; both must be of"),
    ],
    ids=lambda value: None,
)
def test_what_cannot_be_measured(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        inspect_delta(delta_of(ONES), **options)


@pytest.fixture
def command(monkeypatch, run):
    monkeypatch.setenv("COLUMNS", "200")
    return partial(run, "inspect")


@pytest.fixture
def files(tmp_path):
    base, tuned, other = (tmp_path / f"{name}.safetensors" for name in ("base", "tuned", "other"))
    save_file(BASE, base)
    save_file({name: BASE[name] + TAU[name] for name in BASE}, tuned)
    return base, tuned, other


def test_the_command_prints_what_the_function_returns(command, files):
    base, tuned, other = files
    delta_of(OTHER).save(other)
    code, printed, errors = command(base, tuned, "--other", other, "--reserve-rate", "0.5", "--json")
    assert (code, errors) == (0, "")
    delta, loaded = ReferenceDelta.from_checkpoints(base, tuned), ReferenceDelta.load(other)
    assert json.loads(printed) == inspect_delta(delta, base=base, other=loaded, reserve_rate=0.5)
    assert command(other, "--json") == (0, json.dumps(inspect_delta(delta_of(OTHER))) + "\n", "")


def test_the_table(command, files):
    base, tuned, _ = files
    code, printed, errors = command(base, tuned)
    assert (code, errors) == (0, "")
    lines = [line.split() for line in printed.splitlines()]
    assert lines[0] == ["scope", "name", "numel", "norm", "density", "relative_norm"]
    assert ["layer", "model.layers.0", "8", "13", "0.375", "1.3"] in lines
    assert ["tensor", "model.layers.0.b", "4", "12", "0.25", "-"] in lines
    assert len(lines) == 1 + len(inspect_delta(delta_of(TAU)))


def test_the_command_fails_in_one_sentence(command, files):
    base, tuned, _ = files
    for arguments, sentence in (
        (["gone.safetensors"], "error: gone.safetensors does not exist"),
        ([base], f"error: {base} is a safetensors file but not a saved reference delta; make one with"),
        ([base, tuned, "--reserve-rate", "2"], "error: reserve_rate must lie in (0, 1], got 2.0"),
        ([base, tuned, "--other", tuned], f"error: {tuned} is a safetensors file but not a saved reference delta"),
    ):
        code, printed, errors = command(*arguments)
        assert (code, printed) == (1, "")
        assert errors.startswith(sentence)
        assert errors.count("\n") == 1


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_by_the_function_and_by_the_command(suffix, command, files, tmp_path):
    base, tuned, _ = files
    drawn, by_command = tmp_path / f"a.{suffix}", tmp_path / "pictures" / f"b.{suffix}"
    delta = ReferenceDelta.from_checkpoints(base, tuned)
    assert inspect_delta(delta, base=base, plot=drawn) == inspect_delta(delta, base=base)
    code, printed, errors = command(base, tuned, "--plot", by_command)
    assert (code, errors) == (0, "")
    assert printed.splitlines()[-1] == str(by_command)
    assert command(base, tuned)[1] == printed.removesuffix(f"{by_command}\n")
    assert by_command.read_bytes() == drawn.read_bytes()
    assert drawn.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"<?xml")


def test_a_picture_that_cannot_be_drawn_costs_no_reading(monkeypatch, tmp_path):
    delta = delta_of(ONES)
    monkeypatch.setattr(ReferenceDelta, "tensor", None)
    with pytest.raises(ValueError, match=r"no tensor is in a layer, .* leave the picture out"):
        inspect_delta(delta, plot=tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.gif must end in \.png or \.svg"):
        inspect_delta(delta, plot=tmp_path / "a.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"a\.png needs matplotlib: pip install 'fused_merge\[plots\]'"):
        inspect_delta(delta, plot=tmp_path / "a.png")


def test_no_picture_of_a_pairing(command, files):
    code, printed, errors = command(*files[:2], "--pairing", "--plot", "a.png")
    assert (code, printed) == (2, "")
    assert "--plot and --pairing exclude each other; give one" in errors
