"""Compile every build of the kernels for GPUs that need not be here, and tell what the machine code does.

`python bench/kernels.py` prints a table beside the record in `bench/results/kernels.json`, `--json` prints JSON,
`--write` makes it the record, which the tests hold later code against. Run it without TRITON_INTERPRET, under which
Triton does not compile.

A build is a kernel with the constants that shape its code. Storage types multiply them: the ones below stand for all,
as a run compiles only its own. Each is compiled for whole blocks and for those at the ends of tensors.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_merge.kernels import interpolate, kth_largest, merging_adamw, projection, scalars, sums
from fused_merge.kernels.layout import NUM_WARPS, Specialization

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
NVDISASM = CUOBJDUMP.with_name("nvdisasm")
RECORD = Path(__file__).parent / "results" / "kernels.json"

ELEMENTS_PER_THREAD = 8

# What the kernels are handed at run time; every other argument is a constant.
SIGNATURE = {
    "programs_ptr": "*i32",
    "tensors_ptr": "*i64",
    "scalars_ptr": "*fp32",
    "coefficients_ptr": "*fp32",
    "thresholds_ptr": "*i32",
    "counts_ptr": "*i64",
    "found_ptr": "*i64",
    "found_here_ptr": "*i64",
    "before_ptr": "*i64",
    "search_ptr": "*i64",
    "mark_bits_ptr": "*i32",
    "firsts_ptr": "*i64",
    "list_ptr": "*fp32",
    "products_ptr": "*fp32",
    "out_ptr": "*fp32",
    "ranges_ptr": "*i32",
    "sums_ptr": "*fp32",
    "hyper_ptr": "*fp64",
    "lr_ptr": "*fp64",
    "grad_factor_ptr": "*fp64",
    "found_inf_ptr": "*fp64",
    "pairs_ptr": "*i64",
    "ratios_ptr": "*fp32",
    "ratios": "i32",
    "triples_ptr": "*i64",
    "scale_ptr": "*fp32",
}

FP32 = Specialization(tl.float32, tl.float32, tl.float32, tl.float32)
BF16 = FP32._replace(PARAM=tl.bfloat16, GRAD=tl.bfloat16)
DENSE = {"TAU": tl.bfloat16}
RARE = {"TAU": tl.bfloat16, "SPARSE": True, "SPARSIFY": "random", "SKIPS": True}
RANKED = {"TAU": tl.bfloat16, "SPARSE": True, "SPARSIFY": "magnitude", "RANKED": True, "CONSENSUS": "sign_reference"}
# After the step of another optimizer.
ELSEWHERE = {"GRAD": None, "EXP_AVG": None, "EXP_AVG_SQ": None}
CONFLICT = DENSE | {"PROJECT": "conflict"}

STEPS = {
    "adamw": FP32,
    "ondare, all kept": FP32._replace(**DENSE),
    "ondare": FP32._replace(**RARE),
    "onties": FP32._replace(**RANKED, RESUMES=True, SKIPS=True),
    "onsoft": FP32._replace(**RANKED | {"SPARSIFY": "soft_threshold", "CONSENSUS": "linear"}, RESUMES=True, SKIPS=True),
    "onproj": FP32._replace(**CONFLICT),
    "onproj, rows": FP32._replace(**CONFLICT, PROJECT_ROWS=True, ROW_PROGRAMS=True),
    "onproj, rows of u": FP32._replace(**CONFLICT, PROJECT_ROWS=True, ROW_PROGRAMS=True, PROJECT_ON="update"),
    "ondare, K": FP32._replace(**RARE | {"SKIPS": False}, ANCHOR=tl.float32),
    "ondare, elsewhere": FP32._replace(**RARE | ELSEWHERE | {"SKIPS": False}, ANCHOR=tl.float32, KEEPS_ANCHOR=False),
    "ondare, statistics": FP32._replace(**RARE | {"SKIPS": False}, STATS=True),
    "bf16 adamw": BF16,
    "bf16 ondare": BF16._replace(**RARE),
    "bf16 ondare, stochastic": BF16._replace(**RARE, STOCHASTIC=True),
    "bf16 ondare, split": BF16._replace(**RARE | {"SKIPS": False}, MASTER="split"),
    "bf16 ondare, fp32 master": BF16._replace(**RARE | {"SKIPS": False}, MASTER="fp32"),
    "bf16 ondare, bf16 moments": BF16._replace(EXP_AVG=tl.bfloat16, EXP_AVG_SQ=tl.bfloat16, **RARE),
}


class Build(NamedTuple):
    """A kernel, its constants, and the bytes of dense tensors that its code reads and writes per element."""

    kernel: Any
    constants: dict[str, Any]
    reads: int = 0
    writes: int = 0


def step_bytes(spec: Specialization) -> tuple[int, int]:
    """Return what the code of a step reads and writes per element, each tensor as often as it stands there."""

    def size(*dtypes: tl.dtype | None) -> int:
        return sum(dtype.primitive_bitwidth // 8 for dtype in dtypes if dtype is not None)

    moments = size(spec.EXP_AVG, spec.EXP_AVG_SQ)
    weight = size(spec.PARAM, spec.ANCHOR) + {"none": 0, "split": 2, "fp32": 4}[spec.MASTER]
    left = 0 if spec.KEEPS_ANCHOR else size(spec.ANCHOR)
    if spec.RESUMES:
        return moments + weight, weight
    tau = 0 if spec.SPARSE else size(spec.TAU)
    # A program that owns a row reads it once more to project it.
    again = size(spec.GRAD) + tau + (moments if spec.PROJECT_ON == "update" else 0)
    return size(spec.GRAD) + moments + weight + tau + again * spec.ROW_PROGRAMS, moments + weight - left


def builds() -> dict[str, Build]:
    """Return every build by its name."""
    steps = {
        f"step: {name}": Build(merging_adamw.merging_adamw_kernel, {"SPEC": spec}, *step_bytes(spec))
        for name, spec in STEPS.items()
    }
    ranked = {"SPEC": STEPS["onties"]}
    # <grad, theta1 - theta0>
    products = sums.Specialization(tl.bfloat16, tl.bfloat16, tl.bfloat16, ALIGNED=True, BLOCK=0)
    points = interpolate.Specialization(tl.bfloat16, ALIGNED=True, BLOCK=0)
    return steps | {
        "project: onproj": Build(projection.project_kernel, {"SPEC": STEPS["onproj"]}, reads=4 + 2),
        "mark: onties": Build(kth_largest.mark_kernel, ranked, reads=4 + 4 + 4, writes=4 + 4),
        "count: onties": Build(kth_largest.count_kernel, ranked | {"FIRST": False}, reads=4 + 4),
        "threshold: onties": Build(kth_largest.threshold_kernel, ranked),
        "walk: onties": Build(merging_adamw.walk_kernel, ranked),
        "products": Build(sums.inner_products_kernel, {"SPEC": products}, reads=2 + 2 + 2),
        "sums": Build(sums.tree_kernel, {"COLUMNS": 2, "SIZE": sums.FAN_IN}),
        "scalars": Build(scalars.scalars_kernel, {}),
        # The loop over ratios stands once in the code.
        "interpolate": Build(interpolate.interpolate_kernel, {"SPEC": points}, reads=2 + 2, writes=2),
    }


def elements_per_program(target: GPUTarget) -> int:
    """Return the block size that the library launches on this target."""
    return ELEMENTS_PER_THREAD * NUM_WARPS * target.warp_size


class Job(NamedTuple):
    """A build to compile: for a target, for whole blocks or for those at ends."""

    build: str
    target: str
    form: str

    def source(self) -> ASTSource:
        """Return what Triton compiles."""
        build, target = builds()[self.build], TARGETS[self.target]
        names = build.kernel.arg_names
        constants = dict(build.constants)
        if "SPEC" in names:
            spec = constants["SPEC"]
            constants["SPEC"] = spec._replace(BLOCK=elements_per_program(target), MASKED=self.form == "ends")
        signature = {name: "constexpr" if name in constants else SIGNATURE[name] for name in names}
        return ASTSource(
            build.kernel,
            signature=signature,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={
                (names.index(name),): [["tt.divisibility", 16]] for name, type in signature.items() if type[0] == "*"
            },
        )

    def run(self) -> dict[str, Any]:
        """Compile it and return a row."""
        options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
        target, source = TARGETS[self.target], self.source()
        compiled = triton.compile(source, target=target, options=options)
        _, _, reads, writes = builds()[self.build]
        return (
            self._asdict()
            | {"source": source_hash(source), "reads": reads, "writes": writes}
            | report(compiled, target)
        )


def source_hash(source: ASTSource) -> str:
    """Return what tells sources apart: the code, its constants and its arguments."""
    return source.hash()[:16]


def jobs() -> list[Job]:
    """Return everything that is to be compiled."""
    return [
        Job(name, target, form)
        for name, build in builds().items()
        for target in TARGETS
        for form in ("whole", "ends")
        if form == "whole" or {"SPEC", "programs_ptr"} <= set(build.kernel.arg_names)
    ]


def report(compiled: Any, target: GPUTarget) -> dict[str, int | float]:
    """Return what one program does; reads and writes are bytes per element of accesses 128 bits wide."""
    threads = NUM_WARPS * target.warp_size
    if target.backend == "cuda":
        ptx = compiled.asm["ptx"]
        accesses = len(re.findall(r"\b(?:ld|st)\.global", ptx))
        loads = len(re.findall(r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64", ptx))
        stores = len(re.findall(r"st\.global[.\w:]*\.v4\.b32|st\.global[.\w:]*\.v2\.b64", ptx))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
            code = subprocess.run([NVDISASM, "-c", file.name], capture_output=True, text=True, check=True).stdout
        fields = dict(re.findall(r"(\w+):(\d+)", usage.stdout))
        registers, spills = int(fields["REG"]), int(fields["STACK"]) + int(fields["LOCAL"])
        instructions = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", code, re.MULTILINE))
        size = 16 * instructions
    else:
        asm = compiled.asm["amdgcn"]
        accesses = len(re.findall(r"\b(?:global|buffer)_(?:load|store)_", asm))
        loads = len(re.findall(r"(?:global|buffer)_load_dwordx4", asm))
        stores = len(re.findall(r"(?:global|buffer)_store_dwordx4", asm))
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", asm)[1])
        # Scalar registers spill into lanes of vector registers, and only those into memory.
        spills = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", asm)[1])
        instructions = len(re.findall(r"^\t[sv]_|^\t(?:global|buffer|flat|ds)_", asm, re.MULTILINE))
        size = int(re.search(r"codeLenInByte = (\d+)", asm)[1])
    return {
        "read": 16 * threads * loads / elements_per_program(target),
        "written": 16 * threads * stores / elements_per_program(target),
        "narrow": accesses - loads - stores,
        "spills": spills,
        "registers": registers,
        "shared": compiled.metadata.shared,
        "instructions": instructions,
        "per_element": instructions / ELEMENTS_PER_THREAD,
        "code": size,
    }


def recorded() -> dict[tuple[str, str, str], dict[str, Any]]:
    """Return the rows of the record by build, target and form; none if another Triton compiled them."""
    record = json.loads(RECORD.read_text())
    return {key(row): row for row in record["rows"]} if record["triton"] == triton.__version__ else {}


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    """Return what a row is about."""
    return row["build"], row["target"], row["form"]


def rows(only_changed: bool = False) -> list[dict[str, Any]]:
    """Return a row for every job.

    Args:
        only_changed: take from the record what was compiled from this very code, but for a sample.
    """
    known = recorded() if only_changed else {}
    sample = set(jobs()[::23])  # of every target, whole blocks and ends
    found = {job: row for job in jobs() if job not in sample and (row := known.get(job))}
    found = {job: row for job, row in found.items() if row["source"] == source_hash(job.source())}
    missing = [job for job in jobs() if job not in found]
    # Processes and not threads: LLVM has options that are global.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found |= zip(missing, pool.map(Job.run, missing), strict=True)
    return [found[job] for job in jobs()]


def print_table(found: list[dict[str, Any]]) -> None:
    """Print rows, and what the record says of the same."""
    before = recorded()
    print(f"{len(builds())} builds; read and written: bytes per element, counted / by the model; the record -> now")
    header = ("registers", "per element", "code, bytes", "narrow", "shared", "spills", "read", "written")
    print(f"{'build':28} {'target':6} {'form':5} " + " ".join(f"{column:>16}" for column in header))
    for row in found:
        old = before.get(key(row), {})
        cells = [f"{old.get(column, '')} -> {row[column]}" for column in ("registers", "per_element", "code", "narrow")]
        cells += [str(row["shared"]), str(row["spills"])]
        cells += [f"{row['read']:g} / {row['reads']}", f"{row['written']:g} / {row['writes']}"]
        print(f"{row['build']:28} {row['target']:6} {row['form']:5} " + " ".join(f"{cell:>16}" for cell in cells))


def main() -> None:
    """Print or write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--write", action="store_true", help=f"write {RECORD.name}, the record")
    parser.add_argument("--changed", action="store_true", help="compile what the record does not know, and a sample")
    options = parser.parse_args()
    found = rows(options.changed)
    if options.json:
        json.dump({"triton": triton.__version__, "rows": found}, sys.stdout, indent=1)
    else:
        print_table(found)
    if options.write:
        RECORD.write_text(json.dumps({"triton": triton.__version__, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
