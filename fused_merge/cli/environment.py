"""What a bug report needs to say of the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# What the driver of a GPU says about itself, NVIDIA's and AMD's.
_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))


def environment() -> dict[str, Any]:
    """Return versions, machine, GPUs, and what `impl="auto"` runs here and why."""
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
