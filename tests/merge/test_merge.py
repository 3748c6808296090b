"""Finished models merged from disk to disk: the bits of the eager code on whole tensors, whatever the blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bits import same_bits
from folders import everything_in, load
from jobs import count_bytes_read
from merge_models import CASES, FILLED, NAMES, NORM, SHAPES, UP0, UP1, arguments_of, split, tensors_of, write

from fused_merge.checkpoints import engine
from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.eager.merge import Coefficients, mask_key, merge_block, trim_bounds
from fused_merge.eager.merge import merge as eager_merge
from fused_merge.io import sources
from fused_merge.merge.merge import merge_checkpoints, plan_merge
from fused_merge.methods import MERGE_METHODS

# --- the eager code, streamed

MIXES = {
    "fp32": ([torch.float32] * 4, None),
    "bf16": ([torch.bfloat16] * 4, None),
    "fp16": ([torch.float16] * 4, None),
    "fp64": ([torch.float64] * 4, None),
    "bf16 to fp32": ([torch.bfloat16] * 4, torch.float32),
    "all": ([torch.float32, torch.bfloat16, torch.float64, torch.float16], torch.bfloat16),
    "halves": ([torch.bfloat16, torch.float16, torch.bfloat16, torch.float32], torch.float16),
}


def test_there_is_a_case_of_every_method():
    assert {method for method, _, _ in CASES.values()} == set(MERGE_METHODS)


def merged(folders, case, out, **more):
    """What a case makes of models."""
    method, weights, asked, has_base = arguments_of(case)
    models = dict(zip(folders[-len(weights) :], weights, strict=True))
    return merge_checkpoints(folders[0] if has_base else None, models, method, out, **asked, **more)


def needed(case):
    """How many models a case takes, with its base."""
    _, weights, _, has_base = arguments_of(case)
    return len(weights) + has_base


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("case", CASES)
def test_streams_have_the_bits_of_whole_tensors(case, mix, models, tmp_path, small_blocks):
    (method, weights, options), (dtypes, dtype) = CASES[case], MIXES[mix]
    folders, tensors = models(*dtypes[: needed(case)])
    made = load(merged(folders, case, tmp_path / "out", dtype=dtype, threads=3))
    assert made.keys() == {*SHAPES, "count"}
    for name in SHAPES:
        base = tensors[0][name] if arguments_of(case)[3] else None
        thetas = [own[name] for own in tensors[-len(weights) :]]
        want = eager_merge(base, thetas, weights, method=method, name=name, dtype=dtype, **options)
        assert same_bits(made[name], want), name
    assert torch.equal(made["count"], tensors[0]["count"])


def trimmed_merge(base, thetas, weights, densities, bounds):
    """TIES by the eager code, with bounds of a whole model."""
    own = Coefficients(weights, densities, None, bounds)
    return merge_block(base, thetas, MERGE_METHODS["ties"], own, row=1, key=mask_key("w", 0), dtype=base.dtype)


# --- a trim over a whole model


def test_a_trim_over_the_whole_model_of_fp64(models, tmp_path, small_blocks):
    folders, tensors = models(torch.float64, torch.float64)
    out = merge_checkpoints(folders[0], {folders[1]: 1}, "ties", tmp_path / "out", density=0.1, trim="model", threads=3)
    delta = np.concatenate([(tensors[1][name] - tensors[0][name]).numpy().ravel() for name in SHAPES])
    level = np.sort(np.abs(delta))[-int(0.1 * delta.size)]
    for name, got in load(out).items():
        if name in SHAPES:
            base = tensors[0][name].numpy()
            own = tensors[1][name].numpy() - base
            np.testing.assert_array_equal(got.numpy(), base + np.where(np.abs(own) >= level, own, 0))


def test_one_model_of_fp64_makes_every_trim_one_of_fp64(models, tmp_path, small_blocks):
    folders, tensors = models(torch.float32, torch.bfloat16, torch.float64)
    models, options = {folders[1]: 0.5, folders[2]: 0.25}, {"density": 0.3, "trim": "model", "dtype": "float64"}
    made = load(merge_checkpoints(folders[0], models, "ties", tmp_path / "out", **options))
    base, *thetas = [{name: x.double() for name, x in own.items()} for own in tensors]
    bounds = [trim_bounds(torch.cat([(own[n] - base[n]).flatten() for n in SHAPES]), 0.3) for own in thetas]
    for name in SHAPES:
        want = trimmed_merge(base[name], [theta[name] for theta in thetas], [0.5, 0.25], [0.3, 0.3], bounds)
        assert same_bits(made[name], want)


def test_a_trim_over_a_model_in_several_files(models, tmp_path, small_blocks):
    folders, tensors = models(*[torch.float32] * 3)
    models, options = {folders[0]: 0.5, folders[2]: 0.25}, {"density": [0.3, 1.0], "trim": "model"}
    out = merge_checkpoints(folders[1], models, "ties", tmp_path / "out", **options)
    assert len([*out.glob("*.safetensors")]) == 2
    delta = torch.cat([(tensors[0][name] - tensors[1][name]).flatten() for name in SHAPES])
    for name in SHAPES:
        thetas = [tensors[0][name], tensors[2][name]]
        want = trimmed_merge(tensors[1][name], thetas, [0.5, 0.25], [0.3, 1.0], [trim_bounds(delta, 0.3), (0,)])
        assert same_bits(load(out)[name], want)


def test_breadcrumbs_of_a_whole_model(models, tmp_path, small_blocks):
    folders, tensors = models(torch.float32, torch.float32)
    options = {"density": 0.5, "gamma": 0.2, "trim": "model", "threads": 3}
    made = load(merge_checkpoints(folders[0], {folders[1]: 1}, "breadcrumbs", tmp_path / "out", **options))
    ends = [np.concatenate([own[name].numpy().ravel() for name in SHAPES]) for own in tensors]
    delta = ends[1] - ends[0]
    order, n = np.argsort(-np.abs(delta)), delta.size
    kept = order[int(0.2 * n) : int(0.2 * n) + int(0.5 * n)]
    want = ends[0].copy()
    want[kept] += delta[kept]
    np.testing.assert_array_equal(np.concatenate([made[name].numpy().ravel() for name in SHAPES]), want)


def test_the_first_mask_is_that_of_a_reference_delta(models, tmp_path):
    folders, tensors = models(torch.float32, torch.float32)
    made = load(merge_checkpoints(folders[0], {folders[1]: 1}, "dare_linear", tmp_path / "out", density=0.25, seed=3))
    path = ReferenceDelta.from_checkpoints(*folders).save(tmp_path / "tau.safetensors", 0.25, "random", 3)
    delta = ReferenceDelta.load(path)
    for name in (UP0, UP1):
        assert torch.equal(made[name] != tensors[0][name], delta.sparse(name, delta.sparsity).unpack() != 0)


# --- nothing shows how it was done


SPELLINGS = [{"threads": 1}, {"threads": 5}, {"threads": 2, "max_memory": 4_300_000}, {"verify": True}]
SPELLINGS += [{"max_shard_size": size} for size in (3000, "1GB")]


@pytest.mark.parametrize("case", ["ties", "slerp", "dare ties", "model stock", "breadcrumbs", "della"])
def test_threads_memory_and_sharding_do_not_show(case, models, tmp_path, request):
    folders, _ = models(*[torch.bfloat16] * needed(case), shapes=FILLED)
    plain = load(merged(folders, case, tmp_path / "plain"))
    request.getfixturevalue("small_blocks")
    for i, more in enumerate(SPELLINGS):
        other = load(merged(folders, case, tmp_path / str(i), **more))
        assert other.keys() == plain.keys()
        assert all(same_bits(other[name], plain[name]) for name in plain), more


def test_the_order_and_the_files_of_the_models_do_not_show(tmp_path):
    tensors = [tensors_of(i) for i in range(2)]
    made = []
    for i, files in enumerate([lambda x: (x,), lambda x: split(x, UP1, "count"), lambda x: split(x, NORM, UP0)]):
        base, model = (write(tmp_path / f"{name}{i}", *files(x)) for name, x in zip(NAMES, tensors, strict=False))
        made.append(load(merge_checkpoints(base, {model: 0.5}, "dare_ties", tmp_path / f"out{i}", density=0.5)))
    assert all(same_bits(made[0][name], other[name]) for other in made[1:] for name in made[0])


def test_a_merge_made_twice_is_the_same(models, tmp_path):
    folders, _ = models(*[torch.bfloat16] * 3)
    arguments = folders[0], {folders[1]: 0.5, folders[2]: 0.3}, "ties"
    first = everything_in(merge_checkpoints(*arguments, tmp_path / "out", density=0.5))
    # Of the same name: it stands in the card.
    again = merge_checkpoints(*arguments, tmp_path / "again" / "out", density=0.5)
    assert everything_in(again) == first
    assert merge_checkpoints(*arguments, tmp_path / "out", density=0.5) == tmp_path / "out"
    assert everything_in(tmp_path / "out") == first


def test_bytes_are_read_once_and_as_often_as_a_trim_says(models, tmp_path, monkeypatch):
    folders, tensors = models(*[torch.float32] * 3)
    reads = count_bytes_read(monkeypatch, engine, sources)
    size = sum(x.nbytes for x in tensors[0].values())
    floats = size - tensors[0]["count"].nbytes
    both = {folders[1]: 1, folders[2]: 1}
    # What the stream reads, and what is read before it.
    for method, chosen, options, before in (
        ("task_arithmetic", both, {}, 0),
        ("dare_ties", both, {"density": 0.5}, 0),
        ("ties", both, {}, 0),
        ("ties", both, {"density": [0.5, 1.0]}, 2 * 2 * floats),
        ("ties", both, {"density": 0.5, "trim": "model"}, 2 * 2 * 2 * floats),
        ("slerp", {folders[1]: 0.5}, {}, 2 * floats),
        ("model_stock", both, {}, 3 * floats),
        ("nearswap", {folders[1]: 0.5}, {}, 0),
        # Both cuts are found in the reads of one.
        ("breadcrumbs", both, {"density": [0.5, 1.0], "gamma": 0.1}, 2 * 2 * floats),
    ):
        reads.clear()
        job = plan_merge(folders[0], chosen, method, tmp_path / "out", overwrite=True, **options)
        assert job.bytes_read == (1 + len(chosen)) * size
        assert (job.whole_tensor_pass.bytes_read(job.files, job.files) if job.whole_tensor_pass else 0) == before
        job.run(progress=False)
        assert sum(nbytes for _, _, nbytes in reads) == before + job.bytes_read


def test_what_is_left_takes_its_own_tensors_or_the_whole_model(models, tmp_path):
    folders, _ = models(torch.float32, torch.float32)
    for trim in ("tensor", "model"):
        job = plan_merge(folders[1], {folders[0]: 1}, "ties", tmp_path / "out", density=0.5, trim=trim)
        parts = [job.whole_tensor_pass.bytes_read(job.files, [file]) for file in job.files]
        whole = job.whole_tensor_pass.bytes_read(job.files, job.files)
        assert parts == [whole, whole] if trim == "model" else (sum(parts) == whole and all(parts))


# --- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_makes_the_same_bytes(case, mix, models, tmp_path, small_blocks):
    dtypes, dtype = MIXES[mix]
    folders, _ = models(*dtypes[: needed(case)])
    made = [merged(folders, case, tmp_path / where / "out", dtype=dtype, device=where) for where in ("cpu", "cuda")]
    assert everything_in(made[0]) == everything_in(made[1])
