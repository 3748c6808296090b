"""What two processes do with the delta of a model that they share."""

from __future__ import annotations

import copy
import math
import pickle

import parallel
import pytest
import torch
from bits import same_bits
from deltas import assert_same
from processes import WORLD
from tiny import llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fused_merge import OnTIESAdamW
from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.delta.tensors import Sparsity
from fused_merge.distributed import fragment_of
from fused_merge.io.writer import SafetensorsWriter

SPARSITY = Sparsity("magnitude", 0.3, 0)


def assert_packed_alike(one, other):
    assert one.shape == other.shape
    assert all(same_bits(getattr(one, part), getattr(other, part)) for part in ("mask", "values", "offsets"))


def sparsify(rank, folders, sparsities):
    """F(tau) of rows under FSDP2, and of columns, is the part of F(tau) of the whole."""
    delta, mesh = ReferenceDelta.from_checkpoints(*folders), init_device_mesh("cpu", (WORLD,))
    parameters = dict(placed("fsdp", llama(0)).named_parameters())
    assert [*parameters] == [*delta.names]
    for name, parameter in parameters.items():
        columns = distribute_tensor(torch.zeros(parameter.shape), mesh, [Shard(parameter.ndim - 1)])
        for own in (fragment_of(parameter), fragment_of(columns)):
            for sparsity in sparsities:
                part = delta.sparse(name, sparsity, own)
                assert_packed_alike(part, delta.sparse(name, sparsity).part(own.box))


def placed(how, model):
    """A model under FSDP2, tensor-parallel, or both; or whole, a state dict, or the path of its folder."""
    if how == "fsdp":
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    if how == "parallel":
        # The norms stay plain parameters.
        mesh = init_device_mesh("cpu", (WORLD,))
        plan = {"self_attn.q_proj": ColwiseParallel(), "self_attn.o_proj": RowwiseParallel()}
        plan |= {"mlp.up_proj": ColwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        for layer in model.model.layers:
            parallelize_module(layer, mesh, plan)
        return model
    if how == "fsdp state dict":
        return placed("fsdp", model).state_dict()
    return model


def of_placed(rank, hows, dtypes, folder):
    """A delta of sharded models is held in parts, has the identity of the whole one, and saves it."""
    base, tuned = (llama(seed, dtype=dtype) for seed, dtype in enumerate(dtypes))
    whole = ReferenceDelta.from_models(base, tuned)
    ends = [
        folder / str(i) if how == "path" else placed(how, model)
        for i, (how, model) in enumerate(zip(hows, (base, tuned), strict=True))
    ]
    sharded = next(end for how, end in zip(hows, ends, strict=True) if how not in ("path", "whole"))
    parameters = sharded if isinstance(sharded, dict) else dict(sharded.named_parameters())
    delta = ReferenceDelta.from_models(*ends)
    assert (delta.identity, delta.nbytes, {*delta.names}) == (whole.identity, whole.nbytes, {*whole.names})
    assert delta.ordered
    parts = 0
    for name in delta.names:
        own, tau = fragment_of(parameters[name]), whole.tensor(name)
        assert (delta.shape(name), delta.dtype(name)) == (whole.shape(name), whole.dtype(name))
        assert same_bits(delta.tensor(name, own), tau if own is None else tau[own.box].contiguous())
        for sparsity in (Sparsity("random", 0.3, 5), Sparsity("magnitude", 0.3, 0)):
            part = whole.sparse(name, sparsity)
            assert_packed_alike(delta.sparse(name, sparsity, own), part if own is None else part.part(own.box))
        if own is not None:
            parts += 1
            with pytest.raises(ValueError, match=rf"this process holds \[.*\] of the reference delta of '{name}', as"):
                delta.tensor(name)
    assert parts
    for options in ({}, {"reserve_rate": 0.3, "method": "magnitude"}, {"dtype": "bfloat16"}):
        if whole.dtype(whole.names[0]).itemsize == 2 and "dtype" in options:
            continue
        loaded = ReferenceDelta.load(delta.save(folder / "tau.safetensors", **options))
        expected = ReferenceDelta.load(whole.save(folder / f"whole{rank}.safetensors", **options))
        assert_same(loaded, expected)
        assert (loaded.ordered, loaded.sparsity) == (delta.ordered, expected.sparsity)
        torch.distributed.barrier()
    with pytest.raises(ValueError, match=r"held in parts and cannot be pickled; save it with delta.save\(path\) on"):
        pickle.dumps(delta)
    assert copy.deepcopy(delta) is delta


def of_rows(rank, folder):
    """Of two vocabularies tau has the rows of the smaller."""
    small, large = llama(0), llama(1, vocabulary=51)
    whole = ReferenceDelta.from_models(small, large, align_vocabulary=True)
    sharded = placed("fsdp", large)
    delta = ReferenceDelta.from_models(small, sharded, align_vocabulary=True)
    assert delta.identity == whole.identity
    for name, parameter in sharded.named_parameters():
        own = fragment_of(parameter)
        box = own.box[0]
        assert same_bits(delta.tensor(name, own), whole.tensor(name)[box.start : box.stop].contiguous())
    assert_same(ReferenceDelta.load(delta.save(folder / "tau.safetensors")), whole)
    small = placed("fsdp", small)
    return ReferenceDelta.from_models(small, sharded, align_vocabulary=True)


def badly(rank, fault, folder):
    """Something that one process alone cannot do."""
    base, tuned = placed("fsdp", llama(0)), placed("fsdp", llama(1))
    if fault == "nan" and rank == 1:
        with torch.no_grad():
            tuned.model.norm.weight.to_local().fill_(math.nan)
    if fault == "placed":
        base = placed("parallel", llama(0))
    if fault == "path":
        base = folder / ("gone" if rank == 1 else "base")
    if fault == "other tensors" and rank == 1:
        base = {name: tensor for name, tensor in llama(0).state_dict().items() if "norm" not in name}
    delta = ReferenceDelta.from_models(base, tuned, unmatched="ignore")
    (folder / "file").touch()
    with pytest.MonkeyPatch.context() as patch:
        if fault == "later" and rank == 0:
            write, written = SafetensorsWriter.write, []

            def failing(self, name, tensor):
                written.append(name)
                if len(written) == 5:
                    raise OSError("the disk is full")
                write(self, name, tensor)

            patch.setattr(SafetensorsWriter, "write", failing)
        delta.save(folder / "file" / "tau.safetensors" if fault == "folder" else folder / "tau.safetensors")


def collectives(rank):
    """How many all-reductions it takes to make a delta."""
    base, tuned, calls, reduce = placed("fsdp", llama(0)), placed("fsdp", llama(1)), [], torch.distributed.all_reduce
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", lambda *args, **named: (calls.append(1), reduce(*args, **named)))
        delta = ReferenceDelta.from_models(base, tuned)
        made = len(calls)
        assert delta.identity
        assert len(calls) == made
    return made


def of_large_tensors(rank, dtype):
    """Heads of 4 KiB that several processes hold, in runs of several lengths, or one of them, or all."""
    torch.manual_seed(0)
    mesh, shapes = init_device_mesh("cpu", (WORLD,)), {"matrix": (9, 1500), "tall": (4000, 3), "vector": (5001,)}
    states = [{name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()} for _ in range(2)]
    for dims in ((0, 0, 0), (1, 1, 0)):
        placed = [
            {
                "plain": state["vector"].neg(),
                **{n: distribute_tensor(state[n], mesh, [Shard(d)]) for n, d in zip(shapes, dims, strict=True)},
            }
            for state in states
        ]
        whole = ReferenceDelta.from_models(*({**state, "plain": state["vector"].neg()} for state in states))
        assert ReferenceDelta.from_models(*placed).identity == whole.identity


def step(rank, folders):
    """An optimizer makes the same of a delta that is held in parts and of one that is read so."""
    taus = ReferenceDelta.from_models(*(placed("fsdp", llama(seed)) for seed in (0, 1)))
    models = []
    for delta in (taus, ReferenceDelta.from_checkpoints(*folders)):
        model = placed("fsdp", llama(1))
        optimizer = OnTIESAdamW(model.named_parameters(), reference_delta=delta, alpha=0.3, reserve_rate=0.4, lr=1e-2)
        torch.manual_seed(7)
        for _ in range(2):
            model(torch.randint(48, (2, 8)), labels=torch.randint(48, (2, 8))).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append({name: p.to_local().clone() for name, p in model.named_parameters()})
    assert all(same_bits(models[0][name], models[1][name]) for name in models[0])


def of_a_kind(rank, kind, dtype):
    """A delta of models as a kind of parallelism holds them is that of the whole ones."""
    whole = ReferenceDelta.from_models(parallel.Network(0, dtype=dtype), parallel.tuned(dtype=dtype))
    models = [parallel.wrapped(m, kind) for m in (parallel.Network(0, dtype=dtype), parallel.tuned(dtype=dtype))]
    delta = ReferenceDelta.from_models(*models)
    assert (delta.identity, delta.ordered) == (whole.identity, True)
    assert delta.names == whole.names == (*parallel.named(models[1]),)
    for name, parameter in parallel.named(models[1]).items():
        own, tau = fragment_of(parameter), whole.tensor(name)
        assert same_bits(delta.tensor(name, own), tau if own is None else tau[own.box].contiguous())
        kept = whole.sparse(name, SPARSITY)
        assert_packed_alike(delta.sparse(name, SPARSITY, own), kept if own is None else kept.part(own.box))
    return delta


def save_a_kind(rank, kind, dtype, folder):
    """All save it, and one writes."""
    delta = of_a_kind(rank, kind, dtype)
    # Where every process has the whole delta it knows of no other.
    path = delta.save(folder / (f"{rank}" if kind in ("ddp", "alone") else "tau"))
    whole = ReferenceDelta.from_models(parallel.Network(0, dtype=dtype), parallel.tuned(dtype=dtype))
    assert_same(ReferenceDelta.load(path), whole)
