"""What a process reads of a delta: the part of the whole delta, bit for bit, and of F(tau) too."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from bits import same_bits
from deltas import MAGNITUDE, RANDOM, checkpoints
from families import family_model
from fragments import fragment, grids, ranges, together
from tiny import count_reads

from fused_merge import lockstep
from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.delta.tensors import Sparsity
from fused_merge.distributed import Fragment
from fused_merge.eager.shard import Shard
from fused_merge.io.sources import FileSource

SOFT = Sparsity("soft_threshold", 0.2, 0)
KINDS = ["memory", "checkpoints", "dense", "sparse"]


def tensors(seed):
    """Of several dtypes and dimensions; of the coarse ones many magnitudes tie."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(torch.Size(shape), generator=generator)

    return {
        "brain": normal(40, 61).bfloat16(),
        "coarse": (normal(9, 300) * 3).round(),
        "deep": normal(4, 30, 50),
        "double": normal(2100).double(),
        "empty": normal(0, 3),
        "half": normal(33, 9).half(),
        "one": normal(),
    }


def made(kind, folder, sparsity=MAGNITUDE):
    base, tuned = tensors(0), tensors(1)
    if kind == "memory":
        return ReferenceDelta.from_models(base, tuned)
    delta = checkpoints(folder, base, tuned)
    if kind == "checkpoints":
        return delta
    options = sparsity[1::-1] if kind == "sparse" else ()
    return ReferenceDelta.load(delta.save(folder / "tau.safetensors", *options, seed=sparsity.seed))


def cuts(shape):
    """Ways to hold a tensor in parts, as lists of fragments."""
    for boxes in grids(shape, numbered=True):
        yield [fragment(shape, box) for box in boxes]
    whole = [slice(0, n) for n in shape]
    yield [fragment(shape, whole, elements) for elements in ranges(torch.Size(shape).numel())]


def packed_alike(one, other):
    return one.shape == other.shape and all(
        same_bits(getattr(one, part), getattr(other, part)) for part in ("mask", "values", "offsets")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_tau_is_what_the_whole_has_there(kind, tmp_path):
    delta = made(kind, tmp_path)
    for name in delta.names:
        whole = delta.tensor(name)
        for fragments in cuts(whole.shape):
            for own in fragments:
                part = delta.tensor(name, own)
                assert same_bits(part, own.of(whole[own.box]).contiguous())
                assert part.is_contiguous()


@pytest.mark.parametrize("sparsity", [RANDOM, MAGNITUDE, SOFT, MAGNITUDE._replace(reserve_rate=1.0)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_f_of_a_part_is_a_part_of_f(kind, sparsity, tmp_path, monkeypatch):
    delta = made(kind, tmp_path, sparsity)
    for name in delta.names:
        whole = delta.sparse(name, sparsity)
        for fragments in cuts(whole.shape):
            calls = [partial(delta.sparse, name, sparsity, own) for own in fragments]
            with monkeypatch.context() as patch:
                parts = together(patch, lockstep, calls)
            for own, part in zip(fragments, parts, strict=True):
                assert packed_alike(part, whole.part(own.box, own.elements))


def test_all_of_a_tensor_is_the_tensor(tmp_path):
    delta = made("memory", tmp_path)
    own = fragment((40, 61), (slice(0, 40), slice(0, 61)), groups=())
    assert delta.tensor("brain", own) is delta.tensor("brain")
    assert packed_alike(delta.sparse("brain", SOFT, own), delta.sparse("brain", SOFT))


def test_a_part_does_not_keep_the_whole_in_memory(tmp_path):
    own = fragment((40, 61), (slice(0, 3), slice(0, 61)))
    for kind in ("memory", "sparse"):
        part = made(kind, tmp_path).tensor("brain", own)
        assert part.untyped_storage().nbytes() == 2 * 3 * 61


@pytest.mark.parametrize("kind", ["checkpoints", "dense"])
def test_only_the_part_is_read(kind, tmp_path, monkeypatch):
    delta = made(kind, tmp_path)
    whole, boxes, read = count_reads(monkeypatch), [], FileSource._read

    def counted(self, name, box):
        boxes.append(tuple((side.start, side.stop) for side in box))
        return read(self, name, box)

    monkeypatch.setattr(FileSource, "_read", counted)
    shape = delta.shape("deep")
    delta.tensor("deep", fragment(shape, (slice(0, 4), slice(10, 20), slice(0, 50))))
    assert {*boxes} == {((0, 4), (10, 20), (0, 50))}
    boxes.clear()
    # Elements in one of the four: its rows 3 to 5 hold them.
    delta.tensor("deep", fragment(shape, [slice(0, n) for n in shape], slice(1690, 1760)))
    assert {*boxes} == {((1, 2), (3, 6), (0, 50))}
    boxes.clear()
    delta.tensor("deep", fragment(shape, (slice(4, 4), slice(0, 30), slice(0, 50))))
    assert not boxes
    assert not whole


def test_a_part_of_what_files_pack_otherwise(tmp_path):
    """A tensor of experts in memory is one tensor for each of them in files."""
    models = [family_model("qwen3-moe", seed) for seed in (0, 1)]
    folders = [tmp_path / str(i) for i in range(2)]
    for model, folder in zip(models, folders, strict=True):
        model.save_pretrained(folder)
    whole, delta = ReferenceDelta.from_models(*models), ReferenceDelta.from_checkpoints(*folders)
    for name in delta.names:
        for fragments in cuts(delta.shape(name)):
            for own in fragments:
                assert same_bits(delta.tensor(name, own), own.of(whole.tensor(name)[own.box]).contiguous())


@pytest.mark.parametrize("kind", KINDS)
def test_of_more_rows_than_tau_has_those_that_it_has(kind, tmp_path, monkeypatch):
    delta, shape = made(kind, tmp_path), (50, 61)
    for fragments in cuts(shape):
        with monkeypatch.context() as patch:
            parts = together(patch, lockstep, [partial(delta.sparse, "brain", MAGNITUDE, own) for own in fragments])
        for own, part in zip(fragments, parts, strict=True):
            wide = torch.zeros(shape, dtype=torch.bfloat16)
            wide[:40] = delta.tensor("brain")
            held = own.of(wide[own.box])
            tau = delta.tensor("brain", own)
            assert same_bits(tau, held[: len(tau)].contiguous())
            assert not held[len(tau) :].any()
            wide[:40] = delta.sparse("brain", MAGNITUDE).unpack()
            assert same_bits(part.unpack(), own.of(wide[own.box])[: len(tau)].contiguous())


def test_a_part_of_another_tensor(tmp_path):
    delta = made("memory", tmp_path)
    for shape in ((40, 60), (39, 61), (61,)):
        own = Fragment(Shard.whole(shape), tuple(slice(0, n) for n in shape))
        message = r"'brain' has a reference delta of \[40, 61\] and a part of \[.*\] is asked for; train the model"
        for ask in (delta.tensor, partial(delta.sparse, sparsity=RANDOM)):
            with pytest.raises(ValueError, match=message):
                ask("brain", fragment=own)


def test_a_method_that_needs_the_whole_tensor(tmp_path, monkeypatch):
    from fused_merge.eager.sparsify import SPARSIFY

    monkeypatch.setitem(SPARSIFY, "halves", lambda x, rate, key: torch.where(x > x.median(), x, 0.0))
    delta, halves = made("memory", tmp_path), Sparsity("halves", 0.5, 0)
    assert delta.sparse("brain", halves).values.numel() > 0
    own = fragment((40, 61), (slice(0, 3), slice(0, 61)))
    with pytest.raises(ValueError, match="method 'halves' is not known to work on parts of a tensor, and 'brain' is"):
        delta.sparse("brain", halves, own)
