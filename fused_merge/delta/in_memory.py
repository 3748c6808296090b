"""tau of two models in memory, which may be sharded: each process then holds what it holds of the parameters."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fused_merge.delta.tensors import Pairs, Part, TauSource, check_finite
from fused_merge.distributed import Fragment, Processes, is_sharded, reshard, sum_over
from fused_merge.io.sources import SourceLike, open_source

# Elements of each sharded tensor that every process knows: 4 KiB in the narrowest dtype, for the identity.
_HEAD = 2048


class TauInMemory(TauSource):
    """tau of two models, computed now; nothing of them is kept.

    Of sharded models, DTensors, all processes make it together, and raise together.
    """

    def __init__(self, base: SourceLike, tuned: SourceLike, options: Mapping[str, Any]) -> None:
        self.processes = Processes.that_share([*_sharded(base), *_sharded(tuned)])
        self._tensors: dict[str, Tensor] = {}
        # Of those that are sharded, and what every process knows of them.
        self._fragments: dict[str, Fragment] = {}
        self._heads: dict[str, Tensor] = {}
        with self.processes.raising_together():
            pairs = Pairs(open_source(base, role="base"), open_source(tuned, role="tuned"), options)
            self.ordered, self.specs = pairs.ordered, pairs.specs
            for name, (dtype, shape) in self.specs.items():
                fragment = pairs.fragment(name)
                if fragment is not None and fragment.shard.groups:
                    self._fragments[name] = fragment
                part = None if fragment is None else Part.of(name, shape, fragment)
                self._tensors[name] = pairs.subtract(name, dtype, part)
                check_finite(name, self._tensors[name])
        if self.processes.groups:
            self._gather_heads()

    def read(self, name: str, dtype: torch.dtype, part: Part | None = None) -> Tensor:
        """Return a tensor in a dtype, or a copy of a part of it, which does not keep the rest in memory.

        Raises ValueError for a part of a sharded tensor that this process does not hold.
        """
        tau, shape, fragment = self._tensors[name], self.specs[name].shape, self._fragments.get(name)
        if fragment is not None:
            held, asked, head = Part.of(name, shape, fragment), part or Part.all(shape), self._heads[name]
            if asked == held:
                return tau.to(dtype)
            if asked.elements is not None and asked == Part.first(shape, min(asked.elements.stop, len(head))):
                return head[asked.elements].to(dtype)
            raise ValueError(
                f"this process holds {held} of the reference delta of {name!r}, as it was placed in the models that "
                f"the delta was made of, and {asked} is asked for; place the parameter alike, or save the delta on all "
                "processes and load the file"
            )
        if part is None:
            return tau.to(dtype)
        box = tau[part.box]
        return (box if part.elements is None else box.reshape(-1)[part.elements]).to(dtype, copy=True).contiguous()

    def whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a whole tensor in a dtype, on every process that shares it: all must come here."""
        fragment = self._fragments.get(name)
        if fragment is None:
            return self.read(name, dtype)
        spec = self.specs[name]
        tau = torch.zeros(spec.shape, dtype=spec.dtype)
        tau[Part.of(name, spec.shape, fragment).box] = self._tensors[name]
        # Where the others' parts lie it is zero: bytes add up to those of the whole tensor.
        sum_over(tau.view(-1).view(torch.uint8), fragment.shard.groups)
        return tau.to(dtype)

    def __getstate__(self) -> dict[str, Any]:
        if self._fragments:
            raise ValueError(
                "the reference delta of a sharded model is held in parts and cannot be pickled; save it with "
                "delta.save(path) on all processes, and load the file"
            )
        return self.__dict__

    def _gather_heads(self) -> None:
        """Find the first elements of each sharded tensor: one collective for each way of sharding."""
        # What differs here would hang there.
        digests = self.processes.gathered(hashlib.sha256(repr(self.specs).encode()).hexdigest())
        if len(set(digests)) > 1:
            raise ValueError("the processes found different tensors in their models; pass the same two on all of them")
        alike: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
        for name, fragment in self._fragments.items():
            dtype, shape = self.specs[name]
            offset, inner, distance = fragment.shard.elements
            tau = self._tensors[name].view(-1)
            head = torch.zeros(min(_HEAD, shape.numel()), dtype=dtype)
            local = torch.arange(min(len(tau), len(head)))
            place = offset + local // inner * distance + local % inner
            local, place = local[place < len(head)], place[place < len(head)]
            head[place] = tau[local]
            self._heads[name] = head
            alike[fragment.shard.groups].append(name)
        for groups, names in alike.items():
            parts = [self._heads[name].view(torch.uint8) for name in names]
            total = sum_over(torch.cat(parts), groups)
            for part, whole in zip(parts, torch.split(total, [len(part) for part in parts]), strict=True):
                part.copy_(whole)


def _sharded(model: SourceLike) -> Iterable[Tensor]:
    """Return the DTensors of a module or a state dict; weights that FSDP2 has gathered are sharded again."""
    if isinstance(model, nn.Module):
        reshard(model)
        return filter(is_sharded, model.parameters())
    return filter(is_sharded, model.values()) if isinstance(model, Mapping) else ()
