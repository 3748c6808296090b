"""One device for the whole run: a GPU where there is one, else the CPU with Triton's interpreter."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from device import DEVICE
from processes import Ranks

# What is started in the background of a shell ignores Ctrl-C, and so would the tests of it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Otherwise DeepSpeed, which Transformers imports where it is installed, prints that it finds no GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# Triton reads this once, when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import interpreter

    interpreter.patch_once()


# What `make quick` leaves out: kernels in the interpreter, compilers, other processes, and the benchmarks.
SLOW = (
    "adapt/",
    "bench/",
    "checkpoints/test_disk",
    "checkpoints/test_interrupted",
    "cli/test_program",
    "compiled/",
    "distributed/",
    "eager/test_properties",
    "eager/test_sparsify",
    "eager/test_step_k",
    "functional/",
    "integrations/",
    "interpolation/test_layer_ratios",
    "interpolation/test_sharded",
    "io/test_hostile_files",
    "kernels/",
    "merge/test_merge",
    "optim/",
    "sweep/test_evaluate",
    "sweep/test_harness",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if str(item.path.relative_to(Path(__file__).parent)).startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(scope="session")
def ranks_of(tmp_path_factory):
    """Groups of processes by number and device, which all tests share."""
    groups: dict[tuple[int, str], Ranks] = {}

    def ranks_of(world: int, device: str = "cpu") -> Ranks:
        if device == "cuda" and torch.cuda.device_count() < world:
            pytest.skip(f"needs {world} GPUs, found {torch.cuda.device_count()}")
        if (world, device) not in groups:
            groups[world, device] = Ranks(tmp_path_factory.mktemp(f"ranks-{world}-{device}"), world, device)
        return groups[world, device]

    yield ranks_of
    for group in groups.values():
        group.stop()


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` and `torch.empty_like` return with NaN: an output that nobody wrote fails."""

    def poison(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point() and not tensor.is_meta:
                tensor.fill_(float("nan"))
            return tensor

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture
def _small_files():
    """Let no file of this process grow beyond 64 KiB: what a full disk does, for one file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process; returns exit code, standard output and standard error."""
    from fused_merge.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fused-merge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return run
