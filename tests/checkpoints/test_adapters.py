"""Adapters merged by the product of their factors: what is written, resumed and refused."""

from __future__ import annotations

import json
import os

import pytest
import torch
from adapter_files import change, products_of, write_adapter
from bits import assert_same_bits
from folders import everything_in, load
from safetensors.torch import load_file, save_file
from tiny import llama, save

import fused_merge as fm
from fused_merge.checkpoints import job as jobs
from fused_merge.checkpoints.interpolate import plan_interpolation

QUIET = {"progress": False}


@pytest.fixture
def pair(tmp_path):
    def pair(*configs):
        given = configs or ({}, {})
        return [write_adapter(tmp_path / f"adapter{i}", i, **config) for i, config in enumerate(given)]

    return pair


def test_factors_lie_side_by_side_and_are_rounded_once(pair, tmp_path):
    first, second = pair()
    (folder,) = fm.interpolate_checkpoints(first, second, [0.3], tmp_path / "line", **QUIET)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 16, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]
    ends = load(first), load(second)
    for name, tensor in load(folder).items():
        a, b = ends[0][name], ends[1][name]
        whole = torch.cat([a, b], 1) if "lora_B" in name else torch.cat([(1 - 0.3) * a, 0.3 * b])
        assert_same_bits(tensor, whole)


def test_weights_of_single_tensors(pair, tmp_path):
    folders = pair()
    ratios = {r".*layers\.0\..*": 0.25, ".*": 1.0}
    (folder,) = fm.interpolate_checkpoints(*folders, {"mix": ratios}, tmp_path / "line", **QUIET)
    ends = [products_of(each) for each in folders]
    for name, delta in products_of(folder).items():
        ratio = 0.25 if "layers.0" in name else 1.0
        expected = (1 - ratio) * ends[0][name] + ratio * ends[1][name]
        torch.testing.assert_close(delta, expected, rtol=0, atol=1e-7)
    # A module that only one adapter has any part in keeps the rank of that.
    assert {x.shape[0] for name, x in load(folder).items() if "lora_A" in name} == {8, 4}


def test_dtypes(tmp_path):
    folders = [write_adapter(tmp_path / str(i), i) for i in range(2)]
    half = {name: x.bfloat16() for name, x in load(folders[1]).items()}
    save_file(half, folders[1] / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lora_A.weight' is torch.float32 in .* and torch.bfloat16 .*; say which"):
        fm.interpolate_checkpoints(*folders, [0.5], tmp_path / "line")
    written = fm.interpolate_checkpoints(*folders, [0.0, 0.5], tmp_path / "line", dtype="bfloat16", **QUIET)
    for folder in written:
        assert {x.dtype for x in load(folder).values()} == {torch.bfloat16}
    assert_same_bits(load(written[0]), {name: x.bfloat16() for name, x in load(folders[0]).items()})


def test_the_bits_depend_on_neither_threads_nor_memory(pair, tmp_path):
    base, folders = save(llama(0, tied=False), tmp_path / "base"), pair()
    outs = [
        fm.merge_checkpoints(base, {folders[0]: 0.3}, "task_arithmetic", tmp_path / f"out{i}", **run, **QUIET)
        for i, run in enumerate([{}, {"threads": 1, "max_memory": 100_000}])
    ]
    assert_same_bits(load(outs[0]), load(outs[1]))


def test_a_killed_job_goes_on_and_writes_the_same_bytes(pair, tmp_path, monkeypatch):
    folders = pair({}, {"r": 3, "lora_alpha": 5, "use_rslora": True})
    whole = fm.interpolate_checkpoints(*folders, [0.0, 0.4, 1.0], tmp_path / "whole", **QUIET)
    job = plan_interpolation(*folders, [0.0, 0.4, 1.0], tmp_path / "line")
    described = job.describe()
    assert described["bytes_written"] >= sum(
        os.path.getsize(file["path"].replace("line", "whole")) for file in described["files"]
    )
    assert len(described["files"]) == 3
    calls, write = [], jobs.write_file

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(jobs, "write_file", dies)
    with pytest.raises(KeyboardInterrupt):
        job.run(progress=False)
    assert not (tmp_path / "line" / "r0.00").exists()
    written = plan_interpolation(*folders, [0.0, 0.4, 1.0], tmp_path / "line").run(progress=False)
    # The first file was not made again.
    assert len(calls) == 4
    for a, b in zip(whole, written, strict=True):
        ours, theirs = everything_in(a), everything_in(b)
        assert ours.keys() == theirs.keys()
        assert ours["adapter_model.safetensors"] == theirs["adapter_model.safetensors"]


def test_methods_that_look_at_whole_weights(pair, tmp_path):
    base = save(llama(0, tied=False), tmp_path / "base")
    first, second = pair()
    for start, models, method in (
        (first, {second: 1.0}, "ties"), (first, {second: 0.5}, "slerp"), (None, {first: 1.0, second: 1.0}, "nuslerp"),
        (base, {first: 1.0, second: 1.0}, "ties"), (base, {first: 1.0, second: 1.0}, "della"),
        (base, {first: 1.0, second: 1.0}, "model_stock"), (base, {first: 0.1}, "nearswap"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"method '{method}' is not defined on the factors .*, and merge these"):
            fm.merge_checkpoints(start, models, method, tmp_path / "out")


def test_what_does_not_fit(pair, tmp_path):
    base = save(llama(0, tied=False), tmp_path / "base")
    first, second = pair()
    lone = tmp_path / "lone.safetensors"
    save_file(load_file(second / "adapter_model.safetensors"), lone)
    wide = write_adapter(tmp_path / "wide", 1, modules={"lm_head": (16, 50)})
    other = write_adapter(tmp_path / "other", 1, modules={"lm_head": (16, 48)})
    tied = save(llama(0, tied=True), tmp_path / "tied")
    embeddings = write_adapter(tmp_path / "embeddings", 1, modules={"model.embed_tokens": (48, 16)})
    saved = write_adapter(tmp_path / "saved", 1, modules={"model.embed_tokens": (48, 16)})
    factors = load(saved) | {"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(48, 16)}
    save_file(factors, saved / "adapter_model.safetensors")
    path, merged = fm.interpolate_checkpoints, fm.merge_checkpoints
    out = tmp_path / "x"
    for call, message in (
        (lambda: path(lone, lone, [0.5], out), r"no adapter_config.json stands beside it .*; give the folder"),
        (
            lambda: path(first, base, [0.5], out),
            "is an adapter and .* a model; give the model as base, or two adapters",
        ),
        (lambda: merged(None, {first: 1.0, base: 1.0}, "linear", out), "is an adapter and .* a model; merge adapters"),
        (lambda: merged(base, {first: 1.0, base: 1.0}, "task_arithmetic", out), "is an adapter and .* a model; merge"),
        (
            lambda: path(wide, other, [0.5], out),
            r"factors of 'lm_head.weight' do not fit: .*; give adapters of one base",
        ),
        (lambda: path(base, wide, [0.5], out), r"is \[48, 16\], and .* adds \[50, 16\] to it; give the base"),
        (lambda: path(tied, other, [0.5], out), r"has no tensor 'lm_head.weight', which .* adapts; give the base"),
        (
            lambda: path(tied, embeddings, [0.5], out),
            "may tie 'model.embed_tokens.weight' to another .*, which .* does not adapt",
        ),
        (
            lambda: path(first, second, [0.5], out, unmatched="copy"),
            "unmatched pairs tensors of whole models, .* leave",
        ),
        (
            lambda: path(saved, embeddings, [0.5], out),
            "embed_tokens.base_layer.weight', a weight of its base, .* again with",
        ),
        (lambda: path(first, second, [0.5], out, max_shard_size="1KB"), "max_shard_size splits no adapter"),
        (
            lambda: path(base, first, [0.5], out, config_from="tuned"),
            "config_from must be the base: an adapter has no",
        ),
        (lambda: merged(None, {first: 0.0, second: 0.0}, "linear", out, normalize=False), "is 0; nothing is left"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not out.exists()


def test_a_file_beside_its_configuration_is_the_adapter(pair, tmp_path):
    folders = pair()
    files = [folder / "adapter_model.safetensors" for folder in folders]
    by_file = fm.interpolate_checkpoints(*files, [0.5], tmp_path / "files", **QUIET)
    by_folder = fm.interpolate_checkpoints(*folders, [0.5], tmp_path / "folders", **QUIET)
    assert_same_bits(load(by_file[0]), load(by_folder[0]))
    assert by_file[0].is_dir()


def test_bases_of_two_names_are_warned_of(pair, tmp_path, caplog):
    folders = pair()
    for folder, name in zip(folders, "ab", strict=True):
        change(folder, base_model_name_or_path=name)
    fm.interpolate_checkpoints(*folders, [0.5], tmp_path / "line", **QUIET)
    assert "trained on bases of different names: a (" in caplog.text
