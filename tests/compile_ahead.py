"""Compile kernels for GPUs that are not here and report what the machine code does; prints JSON.

Run in a process of its own, without TRITON_INTERPRET: `python tests/compile_ahead.py`. Each report has the bytes
that a program moves with accesses of 128 bits, the spilled registers, and registers and shared memory.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_merge.kernels.interpolate import interpolate_kernel
from fused_merge.kernels.merging_adamw import merging_adamw_kernel
from fused_merge.kernels.tables import NUM_WARPS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def elements_per_program(target: GPUTarget) -> int:
    """Return the block size that the library launches on this target."""
    return 8 * NUM_WARPS * target.warp_size


def compile_for(target: GPUTarget, kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> Any:
    names = kernel.arg_names
    constants = constants | {"BLOCK": elements_per_program(target)}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in signature if signature[name][0] == "*"}
    source = ASTSource(
        kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    return triton.compile(source, target=target, options={"num_warps": NUM_WARPS, "enable_fp_fusion": False})


def report(compiled: Any, target: GPUTarget) -> dict[str, int]:
    """Return what one program does: bytes read and written 128 bits at a time, spills, registers, shared memory."""
    threads = NUM_WARPS * target.warp_size
    if target.backend == "cuda":
        ptx = compiled.asm["ptx"]
        loads = len(re.findall(r"ld\.global\.v4\.b32|ld\.global\.v2\.b64", ptx))
        stores = len(re.findall(r"st\.global\.v4\.b32|st\.global\.v2\.b64", ptx))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
        fields = dict(re.findall(r"(\w+):(\d+)", usage.stdout))
        registers, spills = int(fields["REG"]), int(fields["STACK"]) + int(fields["LOCAL"])
    else:
        asm = compiled.asm["amdgcn"]
        loads = len(re.findall(r"(?:global|buffer)_load_dwordx4", asm))
        stores = len(re.findall(r"(?:global|buffer)_store_dwordx4", asm))
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", asm)[1])
        spills = sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", asm))
    return {
        "elements": elements_per_program(target),
        "wide_read": 16 * threads * loads,
        "wide_written": 16 * threads * stores,
        "spills": spills,
        "registers": registers,
        "shared": compiled.metadata.shared,
    }


def merging_builds() -> dict[str, dict[str, Any]]:
    """Return the constants of every build of the step whose access widths are a promise."""
    dtypes = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
    common = {"STRIDED": False, "QUADS": True, "ALIGNED": True}
    builds = {}
    for storage, (tau, sparse), random in itertools.product(
        dtypes, [(None, False), ("fp32", False), ("bf16", False), ("bf16", True)], [False, True]
    ):
        if tau is None and random:
            continue
        name = f"{storage}-tau:{tau or 'none'}{'-sparse' * sparse}{'-random' * random}"
        builds[name] = {
            "PARAM": dtypes[storage],
            "GRAD": dtypes[storage],
            "TAU": tau and dtypes[tau],
            "SPARSE": sparse,
            "RANDOM": random,
            **common,
        }
    # Shards that are not cut at multiples of four run the slow form of the mask.
    odd = builds["fp32-tau:bf16-random"] | {"STRIDED": True, "QUADS": False}
    return builds | {"fp32-tau:bf16-random-odd_shard": odd}


def main() -> None:
    tables = {"programs": "*i32", "tensors": "*i64"}
    jobs = [
        (
            f"merging_adamw/{name}/{target}",
            merging_adamw_kernel,
            tables | {"scalars": "*fp32"},
            constants,
            target,
        )
        for name, constants in merging_builds().items()
        for target in TARGETS
    ] + [
        (
            f"interpolate/{dtype}/{target}",
            interpolate_kernel,
            tables | {"table": "*fp32", "ratios": "i32"},
            {"DTYPE": getattr(tl, dtype), "ALIGNED": True},
            target,
        )
        for dtype in ("float32", "bfloat16", "float16")
        for target in TARGETS
    ]

    def work(job: tuple[str, Any, dict[str, str], dict[str, Any], str]) -> tuple[str, dict[str, int]]:
        name, kernel, signature, constants, target = job
        return name, report(compile_for(TARGETS[target], kernel, signature, constants), TARGETS[target])

    with ThreadPoolExecutor(2) as pool:
        json.dump(dict(pool.map(work, jobs)), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
