"""What the tests of all commands share: two files, and a job that writes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def files(tmp_path):
    save_file({"w": torch.zeros(3)}, tmp_path / "base.safetensors")
    save_file({"w": torch.ones(3)}, tmp_path / "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


class StandIn:
    """A job that writes nothing and remembers what it was asked for."""

    def __init__(self):
        self.outputs = [Path("line/r0.10"), Path("line/half")]
        sizes = {"r0.10/a.safetensors": 1_500_000_000, "r0.10/config.json": 700, "half/a.safetensors": 2_000}
        files = [{"path": f"line/{name}", "bytes": size} for name, size in sizes.items()]
        self.plan = {"outputs": list(map(str, self.outputs)), "files": files}
        self.plan |= {"bytes_read": 3_000_000_000, "bytes_written": 1_500_002_700}
        self.fails = self.planned = self.ran = None

    def plan_by(self, name):
        def plan(*arguments, **options):
            self.planned = name, arguments, options
            return self

        return plan

    def describe(self):
        return self.plan

    def run(self, **options):
        self.ran = options
        if self.fails:
            raise self.fails
        return list(self.outputs)


@pytest.fixture
def job(monkeypatch):
    job = StandIn()
    places = {"checkpoints.interpolate": "plan_interpolation", "merge.merge": "plan_merge"}
    for module, name in (places | {"merge.mergekit": "plan_mergekit"}).items():
        monkeypatch.setattr(f"fused_merge.{module}.{name}", job.plan_by(name))
    return job
