"""Sharded steps have the bits of those of one process, whatever holds the model."""

from __future__ import annotations

import parallel_steps
import pytest
import torch
from parallel import KINDS

KIND_OF_WORLD = [(kind, world) for world, kinds in KINDS.items() for kind in kinds]
everywhere = pytest.mark.parametrize(("kind", "world"), KIND_OF_WORLD)

FP32, BF16 = torch.float32, torch.bfloat16
CASES = {
    "ondare": (FP32, {"method": "ondare"}),
    "ondare between merges": (FP32, {"method": "ondare", "merge_every": 3}),
    "ondare, stochastic": (FP32, {"method": "ondare", "rounding": "stochastic"}),
    "ondare, bf16 states": (FP32, {"method": "ondare", "state_dtype": BF16}),
    "onties": (FP32, {"method": "onties"}),
    "onties, paper": (FP32, {"method": "onties", "vote": "paper", "merge_every": 3}),
    "onsoft": (FP32, {"method": "onsoft"}),
    "bf16": (BF16, {"method": "ondare", "merge_every": 3}),
    "bf16, stochastic": (BF16, {"method": "onties", "rounding": "stochastic", "merge_every": 3}),
    "bf16, fp32 master": (BF16, {"method": "onties", "master": "fp32", "merge_every": 3}),
    "bf16, split master": (BF16, {"method": "ondare", "master": "split", "merge_every": 3}),
}
# What is tried where no shard is of another kind than elsewhere.
FEW = ["ondare between merges", "onties", "bf16, stochastic", "bf16, split master"]
# Rows and columns, uneven and empty shards, and strided ones.
UNLIKE = [("fsdp", 4), ("columns", 2), ("tp and fsdp", 4)]
CASES_OF_KIND = [
    (case, kind, world) for kind, world in KIND_OF_WORLD for case in (CASES if (kind, world) in UNLIKE else FEW)
]
IN_THE_INTERPRETER = ["ondare between merges", "onties", "onsoft", "bf16, stochastic", "bf16, split master"]
# What the kernels are told about shards differs between these, and they are slow in the interpreter.
SOME_KINDS = [("fsdp", 2), ("columns", 2), ("tp and fsdp", 4)]
by_every_backend = pytest.mark.parametrize(
    ("kind", "world", "impl"),
    [(*each, impl) for impl in ("eager", "compiled") for each in [*UNLIKE, ("fsdp", 2), ("tp", 2), ("hsdp", 4)]]
    + [(*each, "triton") for each in SOME_KINDS[1:]],
)
PROJECTIONS = [
    {"project": "conflict", "project_over": "tensor"},
    {"project": "conflict", "project_over": "rows"},
    {"project": "onto", "project_over": "tensor", "project_strength": 0.5},
    {"project": "onto", "project_over": "rows", "project_on": "update"},
    {"project": "conflict", "project_over": "tensor", "project_on": "update"},
]


@everywhere
def test_the_shards_that_are_tried_are_uneven_and_empty(kind, world, where, ranks_of):
    held = ranks_of(world, where).all(parallel_steps.sizes, kind)
    counts = [{own[name] for own in held} for name in held[0]]
    assert any(len(of_one) > 1 for of_one in counts) is (kind not in ("alone", "ddp") and (kind, world) != ("tp", 2))
    assert any(0 in of_one for of_one in counts) is (kind not in ("alone", "ddp", "tp"))


@pytest.mark.parametrize(("case", "kind", "world"), CASES_OF_KIND)
@pytest.mark.parametrize("impl", ["eager", "compiled"])
def test_steps_have_the_bits_of_one_process(case, kind, world, impl, where, ranks_of):
    dtype, options = CASES[case]
    options = options | {"impl": impl}
    ranks_of(world, where).all(parallel_steps.same_bits_as_one_process, kind, 4, dtype, options)


@pytest.mark.parametrize("case", IN_THE_INTERPRETER)
@pytest.mark.parametrize(("kind", "world"), SOME_KINDS)
def test_kernels_have_the_bits_of_one_process(case, kind, world, where, ranks_of):
    dtype, options = CASES[case]
    options = options | {"impl": "triton", "blocks": 1} | ({"merge_every": 2} if "merge_every" in options else {})
    ranks_of(world, where).all(parallel_steps.same_bits_as_one_process, kind, 2, dtype, options)


@pytest.mark.parametrize("method", ["ondare", "onties"])
@everywhere
def test_a_delta_of_sharded_models_is_that_of_whole_ones(method, kind, world, where, ranks_of):
    ranks_of(world, where).all(parallel_steps.steps_of_a_sharded_delta, kind, {"method": method})


@pytest.mark.parametrize("options", PROJECTIONS, ids=lambda options: " ".join(map(str, options.values())))
@by_every_backend
def test_projections_are_those_of_one_process_up_to_rounding(options, kind, world, impl, where, ranks_of):
    options = options | {"method": "onproj", "impl": impl, "blocks": 1, "lr": 1e-4}
    for far, _ in ranks_of(world, where).all(parallel_steps.nearly_as_one_process, kind, options):
        assert far <= 2


@pytest.mark.parametrize("over", ["tensor", "rows"])
@by_every_backend
def test_coefficients_of_projections_are_those_of_one_process(over, kind, world, impl, where, ranks_of):
    options = {"method": "onproj", "project_over": over, "impl": impl, "blocks": 1}
    assert max(ranks_of(world, where).all(parallel_steps.coefficients, kind, options)) <= 1e-6


@by_every_backend
def test_clipping_sees_the_norm_of_one_process(kind, world, impl, where, ranks_of):
    options = {"max_grad_norm": 0.5, "impl": impl, "blocks": 1}
    answers = ranks_of(world, where).all(parallel_steps.nearly_as_one_process, kind, options)
    norms = {ours for _, (ours, _) in answers}
    assert len(norms) == 1
    assert norms.pop() == pytest.approx(answers[0][1][1], rel=1e-6)


@pytest.mark.parametrize("options", [{"method": "ondare"}, {"method": "onties"}, {"method": "onproj"}], ids=str)
@by_every_backend
def test_statistics_count_what_one_process_counts(options, kind, world, impl, where, ranks_of):
    options = options | {"impl": impl, "blocks": 1}
    for ours, theirs in ranks_of(world, where).all(parallel_steps.statistics, kind, options):
        assert ours.keys() == theirs.keys()
        for name, found in ours.items():
            expected = theirs[name]
            for field in ("kept_u", "kept_tau", "conflicts", "lost"):
                assert found[field] == expected[field], (name, field)
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"method": "ondare"}, 0),
        ({"method": "ondare", "max_grad_norm": 1.0, "stats_every": 1}, 3),
        ({"method": "onties"}, 5),
        ({"method": "onproj", "project": "conflict"}, 1),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize(
    ("kind", "world", "impl"),
    [(*each, impl) for impl in ("eager", "compiled") for each in (("fsdp", 2), ("tp and fsdp", 4))]
    + [("fsdp", 2, "triton")],
)
def test_a_step_takes_a_few_collectives_however_many_tensors(options, most, kind, world, impl, where, ranks_of):
    options = options | {"impl": impl}
    counts = {
        blocks: ranks_of(world, where).all(parallel_steps.collectives, kind, blocks, options) for blocks in (1, 2)
    }
    assert counts[1] == counts[2]
    # Sums over two dimensions of a mesh are taken one after the other.
    assert max(counts[1]) <= most * (1 if world == 2 else 2)
