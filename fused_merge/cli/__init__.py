"""The command `fused-merge`.

What scripts may rely on:

- Exit codes: 0, done; 1, bad input or a failure, with one sentence on standard error; 2, wrong usage, with the usage on
  standard error; 130, interrupted (Ctrl-C). A reader of standard output that goes away (`| head`) is no failure.
- Standard output holds results, standard error everything else: sentences, warnings and, on a terminal, the progress
  bar. `--quiet` leaves out the bar and the results, and never an error.
- With `--json`, standard output is exactly one JSON document, whenever the exit code is 0, 1 or 130: the result, or
  `{"error": "the sentence"}` beside the same sentence on standard error. Wrong usage prints none.
- No error shows a traceback unless `--debug` asks for it.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# What the driver of a GPU says about itself, NVIDIA's and AMD's.
_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))


def main() -> None:
    """Run the command line."""
    try:
        from fused_merge.cli.commands import app
    except ModuleNotFoundError as error:
        print(f"fused-merge needs {error.name}: pip install 'fused_merge[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    app()


def environment() -> dict[str, Any]:
    """Return what a bug report needs: versions, machine, GPUs, and what `impl="auto"` runs here and why."""
    import torch

    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    driver = next((path for path in _DRIVERS if path.is_file()), None)
    return {
        **{name: _version(name) for name in ("fused_merge", "torch", "triton", "numpy", "safetensors")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(device) for device in devices[1:]],
        "driver": driver.read_text().splitlines()[0] if driver else None,
        "FUSED_MERGE_IMPL": os.environ.get("FUSED_MERGE_IMPL"),
        "impl": {str(device): _impl(device) for device in devices},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _impl(device: Any) -> str:
    from fused_merge.functional import backend

    try:
        chosen = backend.resolve("auto", device)
    except (ValueError, RuntimeError) as error:
        return f"none: {error}"
    reason = backend.why_not_triton(device) if device.type != "cpu" else None
    return f"{chosen} ({reason})" if reason else chosen
