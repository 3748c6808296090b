"""What every command does with adapters of LoRA."""

from __future__ import annotations

import re

import pytest
import torch
from adapter_files import products_of, write_adapter
from bits import assert_same_bits
from folders import load
from pairs import Models, linear, path_of
from safetensors.torch import load_file, save_file
from tiny import llama, save

import fused_merge as fm


def test_every_command_on_adapters(run, tmp_path):
    """Outputs are made of products and deltas of factors; whatever moves a model refuses adapters, or lone factors."""
    base = save(llama(0, tied=False), tmp_path / "base")
    first, second = (write_adapter(tmp_path / name, seed) for seed, name in enumerate(("first", "second")))
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for file, folder in zip(files, (first, second), strict=True):
        save_file(load(folder), file)

    # interpolate and merge: products.
    made = Models(None, None, (first, second))
    half = path_of(made, run, tmp_path / "line")
    merged = linear(made, tmp_path)
    for folder, share in ((half[1], 0.4), (tmp_path / "merged", 0.5), (tmp_path / "kit", 0.5)):
        a, b = products_of(first), products_of(second)
        for name, delta in products_of(folder).items():
            torch.testing.assert_close(delta, (1 - share) * a[name] + share * b[name], rtol=0, atol=1e-7)
    assert merged.keys() == load(first).keys()
    code, printed, errors = run(
        *("merge", "--base", str(base), "--model", f"{first}=0.5", "--model", f"{second}=0.5"),
        *("--method", "task_arithmetic", "--out", str(tmp_path / "model"), "--quiet"),
    )
    assert code == 0, errors
    for name, x in load(tmp_path / "model").items():
        expected = load(base)[name].double() + (0.5 * (a[name] + b[name]) if name in a else 0.0)
        torch.testing.assert_close(x.double(), expected, rtol=0, atol=1e-6)
    assert run("verify", str(half[1]), str(tmp_path / "model"), "--quiet")[0] == 0

    # delta and inspect: the difference of factors.
    for ends in ((first, second), files):
        code, _, errors = run("delta", *map(str, ends), "--out", str(tmp_path / "tau"), "--overwrite")
        assert code == 0, errors
        delta = fm.ReferenceDelta.load(tmp_path / "tau")
        assert_same_bits(
            {name: delta.tensor(name) for name in delta.names}, {n: y - x for n, (x, y) in _both(first, second).items()}
        )
        code, printed, errors = run("inspect", *map(str, ends))
        assert code == 0, errors
        assert "lora_A.weight" in printed
    code, printed, errors = run("inspect", str(first), str(second), "--pairing")
    assert code == 0
    assert "refused: " in printed
    assert "holds factors of an adapter" in " ".join(printed.split())

    # Models that move, and tensors in memory: refused. So are factors without their configuration where they merge.
    refusal = r"holds factors of an adapter, .* of which only the product can be merged; merge it into its base first"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w3\n")
    for ends in ((first, second), files, (base, second)):
        calls = [
            lambda ends=ends: fm.RatioSweep(llama(0, tied=False), *ends),
            lambda ends=ends: fm.interpolate(*map(load_any, ends), [0.5]),
            lambda ends=ends: fm.LayerRatios.by_parts(ends[1], [0.2, 0.4]),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=refusal):
                call()
        for command in (
            (
                "sweep",
                *map(str, ends),
                "--ratios",
                "0.5",
                "--scorer",
                "builtins:len",
                "--out",
                str(tmp_path / "scores"),
            ),
            ("adapt", *map(str, ends), "--prompts", str(prompts), "--out", str(tmp_path / "found")),
        ):
            code, _, errors = run(*command)
            assert code == 1
            assert re.search(refusal, " ".join(errors.split())), errors
    for call in (
        lambda: fm.interpolate_checkpoints(*files, [0.5], tmp_path / "x"),
        lambda: fm.merge_checkpoints(None, dict.fromkeys(files, 0.5), "linear", tmp_path / "x"),
        lambda: fm.merge_checkpoints(base, dict.fromkeys(files, 0.5), "task_arithmetic", tmp_path / "x"),
    ):
        with pytest.raises(
            ValueError, match=r"no adapter_config.json stands beside it that says their scale; give the"
        ):
            call()
    assert not any((tmp_path / name).exists() for name in ("x", "scores", "found"))


def _both(first, second):
    ends = load(first), load(second)
    return {name: (ends[0][name], ends[1][name]) for name in ends[0]}


def load_any(path):
    return load(path) if path.is_dir() else load_file(path)
