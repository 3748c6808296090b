"""The thresholds of a ranked F, tensor by tensor, from one step to the next.

A window around the last threshold is where the next one is expected. One pass lists the elements in it, and the exact
one is found among them. Where the window does not hold it, as at the first step, it is found by counting all elements,
in four rounds of 256 bins; so it is, among what is listed, where several processes hold a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from fused_merge.compiled import passes, step
from fused_merge.compiled.layout import ENTRY, LARGEST, SCALAR
from fused_merge.compiled.threads import Blocks, Crew
from fused_merge.eager.kth_largest import BINS, narrow, shifts
from fused_merge.eager.shard import Shard
from fused_merge.lockstep import LocalSum, Steps

# Smaller tensors list all of u: their thresholds jump.
LISTS_ALL_UP_TO = 1024


class List(NamedTuple):
    """Elements of u that may be kept."""

    values: np.ndarray  # fp32
    places: np.ndarray  # uint16: their places in their blocks
    parts: np.ndarray  # int64 [blocks, 2]: where that of each block begins, and how long it is; -1 if it did not fit
    own_firsts: np.ndarray  # int64 [T]: where the blocks of each tensor begin


class Thresholds:
    """Searches for the k-th largest magnitudes of u of the tensors of some numbers, rows of a table."""

    def __init__(
        self, table: np.ndarray, numbers: Sequence[int], ranks: Sequence[int], shards: Sequence[Shard]
    ) -> None:
        self._table, self._shards = table, shards
        self._numels = table[:, ENTRY.numel].tolist()
        self._ranks = np.array(ranks, np.int64)
        self.blocks = Blocks.of(numbers, self._numels)
        # Of the last two steps, over the learning rates, by which u scales; NaN where nothing is known.
        self.last = np.full((len(table), 2), np.nan)
        self._advances = table[:, ENTRY.skips] != 0
        # Of whole tensors: processes that share one must look at the same window.
        sizes = np.array([max(1, shard.numel) for shard in shards])
        self._small = sizes <= LISTS_ALL_UP_TO
        # Between two steps thresholds drift, and those of small tensors jump.
        self._margin = (0.03 + 6 / np.sqrt(sizes)).astype(np.float32)
        self._rates = self._ranks / sizes
        self.list = self._room_for_lists()
        self._sharded = [i for i in numbers if shards[i].groups]

    def take_over(self, last: Thresholds, numbers: Mapping[str, int], names: Sequence[str]) -> None:
        """Begin with the last thresholds of an earlier search, in which each tensor had another number."""
        for i, name in enumerate(names):
            if name in numbers:
                self.last[i] = last.last[numbers[name]]

    def _room_for_lists(self) -> List:
        """Make room; a block that does not fit is looked at again instead. Pages that are not written are not there."""
        numbers, blocks, sizes = self.blocks.numbers, self.blocks, self._table[:, ENTRY.numel]
        expected = np.where(self._small, sizes, sizes * np.minimum(1.0, self._rates * (1.5 + 2 * self._margin)))
        # Less than a block is left of a piece, and more of those that each thread takes last, of two searches.
        room = int(expected[numbers].sum() * 16 / 15) + 2 * (blocks.threads + 1) * passes.PIECE
        firsts = np.zeros(len(sizes), np.int64)
        firsts[numbers] = blocks.firsts[:-1]
        return List(
            np.empty(room, np.float32), np.empty(room, np.uint16), np.zeros((blocks.count, 2), np.int64), firsts
        )

    def find(self, scalars: np.ndarray, crew: Crew) -> Steps[np.ndarray]:
        """Find the thresholds, int32 patterns `[T]`; the moments of tensors whose weights are skipped have advanced."""
        merges = scalars[:, SCALAR.advances] * scalars[:, SCALAR.moves] != 0
        merges &= (self._table[:, ENTRY.anchor] == 0) | (scalars[:, SCALAR.merges] != 0)
        lows, lasts, known = self._window(scalars)
        hows = np.where(self._advances, step.ADVANCE, step.PEEK)
        # Where nothing merges, the moments alone advance.
        searched = self._subset(known | ~merges)
        told = {"table": self._table, "scalars": scalars, "tensors": len(scalars)}
        told = {**told, "room": len(self.list.values), "listed": np.zeros(1, np.int64)}
        totals = self._search(told, crew, hows, lows, lasts, searched)
        totals[~known, 2] += 1
        if self._sharded:
            sums = torch.from_numpy(totals)
            yield [LocalSum(sums[i], self._shards[i].groups) for i in self._sharded]
        above, listed, lost = totals.T
        hit = merges & (lost == 0) & (above < self._ranks) & (above + listed >= self._ranks)
        kths = np.zeros(len(scalars), np.int32)
        alone = np.ones(len(scalars), bool)
        alone[self._sharded] = False
        self._select(told, crew, np.where(hit & alone, self._ranks - above, 0), kths)
        missed = merges & ~hit
        hows = np.where(self._advances & known, step.AGAIN, step.PEEK)
        ranks = np.where(hit, self._ranks - above, self._ranks)
        yield from self._count(told, crew, hows, missed, hit & ~alone, ranks, kths)
        if (missed & self._advances).any():
            hows = np.where(known, step.AGAIN, step.ADVANCE)
            again = self._subset(missed & self._advances)
            self._search(told, crew, hows, kths, np.full_like(kths, LARGEST), again)
        with np.errstate(all="ignore"):
            found = np.where(merges, kths.view(np.float32) / _learning_rates(scalars), self.last[:, 0])
        self.last = np.where(merges[:, None], np.stack((found, self.last[:, 0]), axis=1), self.last)
        return kths

    def _subset(self, wanted: np.ndarray) -> Blocks:
        numbers = self.blocks.numbers
        chosen = wanted[numbers]
        return self.blocks if chosen.all() else Blocks.of(numbers[chosen].tolist(), self._numels)

    def _window(self, scalars: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the patterns between which the thresholds are expected, and where they are."""
        rates, (last, before) = _learning_rates(scalars), self.last.T
        with np.errstate(all="ignore"):
            # In the first steps of a run thresholds fall step by step.
            falls = np.where(np.isnan(before), 1.0, np.fmin(np.fmax(last / before, 0.8), 1.0))
            expected = last * falls * rates
            lows = np.where(self._small, 0, _patterns(expected * (1 - self._margin)))
            lasts = np.where(self._small | self._advances, LARGEST, _patterns(last * rates * (1 + self._margin)))
        known = self._small | np.isfinite(expected)
        fits = (lows >= 0) & (lows <= lasts)
        return lows.astype(np.int32), lasts.astype(np.int32), known & fits

    def _search(
        self,
        told: Mapping[str, Any],
        crew: Crew,
        hows: np.ndarray,
        lows: np.ndarray,
        lasts: np.ndarray,
        blocks: Blocks,
    ) -> np.ndarray:
        """List what lies in windows; return int64 `[T, 3]`: what is above, what is listed, blocks that did not fit."""
        totals = np.zeros((blocks.threads, len(hows), 3), np.int64)
        windows = {"hows": hows, "lows": lows, "lasts": lasts, "counts": totals}
        crew.over(blocks, passes.search_pass, **told, **windows, **self.list._asdict())
        return totals.sum(0)

    def _select(self, told: Mapping[str, Any], crew: Crew, ranks: np.ndarray, kths: np.ndarray) -> None:
        """Write the pattern of what has a rank among the elements that are listed of its tensor; none where it is 0."""
        numbers = self.blocks.numbers
        tensors = Blocks(numbers, np.arange(len(numbers) + 1), self.blocks.elements)
        crew.over(tensors, passes.select_pass, **told, ranks=ranks, kths=kths, **self.list._asdict())

    def _count(
        self,
        told: Mapping[str, Any],
        crew: Crew,
        hows: np.ndarray,
        missed: np.ndarray,
        shared: np.ndarray,
        ranks: np.ndarray,
        kths: np.ndarray,
    ) -> Steps[None]:
        """Find thresholds by counting: of what was missed among all elements, of what is shared in the lists."""
        if not (missed | shared).any():
            return
        parts = self._subset(missed), self._subset(shared)
        numbers = np.concatenate([part.numbers for part in parts])
        everywhere, threads = len(parts[0].numbers), max(part.threads for part in parts)
        low, rank = torch.zeros(len(numbers), dtype=torch.int64), torch.from_numpy(ranks[numbers])
        summed = sorted((int(number), k) for k, number in enumerate(numbers) if self._shards[number].groups)
        for shift in shifts(torch.float32):
            counts, bins = np.zeros((threads, len(numbers), BINS), np.int64), low.numpy()
            own = {**told, "tensors": len(numbers), "shift": shift, "counts": counts}
            crew.over(parts[0], passes.count_pass, **own, hows=hows, bins=bins)
            crew.over(
                parts[1],
                passes.count_listed_pass,
                **own,
                bins=bins[everywhere:],
                first=everywhere,
                **self.list._asdict(),
            )
            total = torch.from_numpy(counts.sum(0))
            yield [LocalSum(total[k], self._shards[number].groups) for number, k in summed]
            low, rank = narrow(total, low, rank, shift)
        kths[numbers] = low.numpy()


def _learning_rates(scalars: np.ndarray) -> np.ndarray:
    """Return lr of each tensor, out of lr / (1 - b1^t)."""
    return scalars[:, SCALAR.step_size] * (1 - scalars[:, SCALAR.beta1].astype(np.float64) ** scalars[:, SCALAR.step])


def _patterns(x: np.ndarray) -> np.ndarray:
    """Return the patterns of numbers that are not negative."""
    return x.astype(np.float32).view(np.int32)
