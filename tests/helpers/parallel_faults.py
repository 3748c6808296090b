"""What each of several processes does in `tests/distributed/test_faults.py`: one has a delta that is no good."""

from __future__ import annotations

import parallel
import pytest
import torch
from bits import assert_same_bits
from parallel import Network, assert_held, fill_gradients, held, optimizer_of, steps, tuned, wrapped

import fused_merge as fm
from fused_merge.distributed import local_part
from fused_merge.io.sources import FileSource

BROKEN = "blocks.1.down.weight"


def step_with_a_fault(rank, kind, faulty, fault, folder):
    """Try two steps while one process has a fault, then repair it and go on; return what was said of the fault."""
    good, own = folder / "good.safetensors", folder / f"{rank}.safetensors"
    own.write_bytes(good.read_bytes())
    if rank == faulty and fault in ("another", "broken"):
        own.write_bytes((folder / f"{fault}.safetensors").read_bytes())
    model, whole = wrapped(tuned(2), kind), tuned(2).to(parallel.device())
    optimizer, alone = optimizer_of(model, str(own)), optimizer_of(whole, str(good))
    if rank == faulty and fault == "missing":
        own.rename(folder / "away")
    before, sentences = held(model, optimizer), set()
    for step in range(2):
        fill_gradients(model, step)
        with pytest.raises((ValueError, OSError, RuntimeError)) as raised:
            optimizer.step()
        sentences.add(str(raised.value))
        # A second call must not go further because the first one has begun.
        assert_same_bits(held(model, optimizer), before)
        assert not optimizer.state
    if rank == faulty and fault == "missing":
        (folder / "away").rename(own)
    if fault in ("another", "broken"):
        optimizer = optimizer_of(model, str(good))
    for of, by in ((model, optimizer), (whole, alone)):
        steps(of, by, 2)
    assert_held(model, optimizer, whole, alone)
    return sentences.pop() if len(sentences) == 1 else sentences


def step_without_a_tensor(rank, kind, name):
    """Try a step of which one tensor has no delta, or a gradient of a kind that cannot be used."""
    model, base, sft = wrapped(tuned(2), kind), Network(0).state_dict(), tuned().state_dict()
    if name == "gradient":
        sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (1,))
    optimizer = optimizer_of(
        model, fm.ReferenceDelta.from_models(*({n: t for n, t in m.items() if n != name} for m in (base, sft)))
    )
    fill_gradients(model, 0)
    if name == "gradient" and rank == 1:
        next(p for n, p in parallel.named(model).items() if n.endswith("1.gain")).grad = sparse.to(parallel.device())
    before = held(model, optimizer)
    with pytest.raises(ValueError, match=r"lacks|is sparse") as raised:
        optimizer.step()
    assert_same_bits(held(model, optimizer), before)
    assert not optimizer.state
    return str(raised.value)


def elements_read(rank, kind, file, options):
    """Bind a delta of a file; return how many elements of each tensor are read, kept of tau, and held of the weight."""
    model, read = wrapped(tuned(2), kind), {}
    optimizer = optimizer_of(model, str(file), **options)
    with pytest.MonkeyPatch.context() as patch:
        read_of_file = FileSource._read

        def counted(self, name, box):
            found = read_of_file(self, name, box)
            read[name] = read.get(name, 0) + found.numel()
            return found

        patch.setattr(FileSource, "_read", counted)
        optimizer.bind()
    kept = {name: optimizer._binding.of(name, torch.device("cpu")).tau.shape.numel() for name in parallel.named(model)}
    return read, kept, {name: local_part(p).numel() for name, p in parallel.named(model).items()}
