"""Two models of which every command makes something, for the tests of what belongs together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from bits import assert_same_bits
from folders import load
from transformers import LlamaForCausalLM

import fused_merge as fm
from fused_merge.merge.mergekit import plan_mergekit


class Models(NamedTuple):
    """Two models in memory and on disk."""

    base: LlamaForCausalLM
    tuned: LlamaForCausalLM
    folders: tuple[Path, Path]

    @property
    def held(self):
        return [load(folder) for folder in self.folders]


def path_of(models, run, out, *options):
    """The path of two folders by the command line: the folders of r = 0, 0.4 and 1."""
    code, printed, errors = run(
        "interpolate", *map(str, models.folders), "--ratios", "0,0.4,1", "--out", str(out), "--quiet", *options
    )
    assert (code, printed) == (0, ""), errors
    return [out / name for name in ("r0.00", "r0.40", "r1.00")]


def linear(models, out, **options):
    """The mean of two models, as a merge and as mergekit's YAML."""
    merged = fm.merge_checkpoints(
        None, dict.fromkeys(models.folders, 0.5), "linear", out / "merged", progress=False, **options
    )
    config = out / "config.yaml"
    sources = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in models.folders]
    config.write_text(json.dumps({"merge_method": "linear", "models": sources}))
    plan_mergekit(config, out / "kit", **options).run(progress=False)
    assert_same_bits(load(merged), load(out / "kit"))
    return load(merged)
