"""Take steps through Triton's own launch path with a driver that runs nothing; print what was compiled and launched.

Called with the stub `libcuda.so.1`, in a process without TRITON_INTERPRET and with TRITON_LIBCUDA_PATH where it lies.
"""

from __future__ import annotations

import ctypes
import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.runtime.jit import JITFunction

import fused_merge as fm
from fused_merge import functional, kernels

# Loaded first, so that Triton's own modules find it.
DRIVER = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)


class NoGPU(CudaDriver):
    """Triton's driver of an H100 that is not there."""

    def __init__(self):
        self.utils = CudaUtils()
        self.launcher_cls = CudaLauncher
        self.get_current_device = lambda: 0
        self.set_current_device = lambda device: None
        self.get_device_capability = lambda device=0: (9, 0)
        self.get_current_stream = lambda device=0: 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


# Alike in all that a kernel is special to.
SHAPES = {"a": (64, 96), "b": (33, 72)}
RULES = [
    {"method": "ondare", "reserve_rate": 0.01},
    {"method": "ondare", "reserve_rate": 1.0, "merge_every": 2},
    {"method": "onties", "reserve_rate": 0.3, "project": "conflict", "project_over": "rows", "project_on": "update"},
    {"method": "onties", "reserve_rate": 0.05},
    {"method": "onproj"},
    {"method": "onproj", "project": "onto", "project_over": "rows", "max_grad_norm": 1.0},
    {"method": "ondare", "rounding": "stochastic", "dtype": torch.bfloat16},
    {"method": "ondare", "master": "split", "dtype": torch.bfloat16},
]


def steps(compiled, dtype=torch.float32, **options):
    """Return how many kernels were compiled in the first step and later, and how many were launched in all."""
    params = {name: torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for name, shape in SHAPES.items()}
    tuned = {name: torch.linspace(-1, 1, p.numel()).view(p.shape) for name, p in params.items()}
    delta = fm.ReferenceDelta.from_models({name: torch.zeros(p.shape) for name, p in params.items()}, tuned)
    optimizer = fm.MergingAdamW(params.items(), reference_delta=delta, impl="triton", **options)
    counts, launched = [], DRIVER.launch_count()
    for step in range(3):
        for param in params.values():
            param.grad = torch.ones_like(param)
        # Numbers that a launch could be special to: whole ones, and one.
        optimizer.param_groups[0]["lr"] = (0.5, 1, 1e-6)[step]
        before = len(compiled)
        optimizer.step()
        counts.append(len(compiled) - before)
    return {"first": counts[0], "later": sum(counts[1:]), "launched": DRIVER.launch_count() - launched}


def main():
    kernels.why_unusable = lambda device: None
    triton.runtime.driver.set_active(NoGPU())
    compiled, compile_one = [], JITFunction._do_compile
    JITFunction._do_compile = lambda self, *args, **kwargs: (
        compiled.append(self.fn.__name__) or compile_one(self, *args, **kwargs)
    )
    results = [steps(compiled, **rule) for rule in RULES]
    ends = [torch.ones(3000, dtype=torch.bfloat16) for _ in range(2)]
    functional.interpolate(ends[:1], ends[1:], [0.1, 0.5, 1.0], impl="triton")
    results.append({"first": 1, "later": 0, "launched": int("interpolate_kernel" in compiled)})
    json.dump(results, sys.stdout)


main()
