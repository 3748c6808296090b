"""A few processes of one group, for tests of what they do together. What they call must be importable from here."""

from __future__ import annotations

import multiprocessing
import os
from concurrent import futures

import pytest
import torch

WORLD = 2
# A call that takes longer hangs; starting is a matter of the disk.
SECONDS, SECONDS_TO_START = 60, 240


def join_group(rank, world, store, device):
    """Become one process of a group: gloo on the CPU, with Triton's interpreter, or NCCL with a GPU each."""
    torch.set_num_threads(1)
    if device == "cpu":
        # Triton reads this once, when it is first imported.
        os.environ["TRITON_INTERPRET"] = "1"
        import interpreter

        interpreter.patch_once()
    else:
        torch.cuda.set_device(rank)
    backend = "gloo" if device == "cpu" else "nccl"
    torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)


class Ranks:
    """Processes of one group, started at the first call and again after one that hangs.

    They call `ready` first, whose imports belong to starting, and no other call takes longer than `seconds`.
    """

    def __init__(self, folder, world, device="cpu", ready=abs, seconds=SECONDS):
        self.world = world
        self._ready, self._seconds = ready, seconds
        self._folder, self._device = folder, device
        self._started = 0
        self._executors = []

    def __call__(self, function, *arguments):
        """Return what `function(rank, *arguments)` returned or raised on each of them."""
        if not self._executors:
            self._started += 1
            store, spawn = self._folder / f"store{self._started}", multiprocessing.get_context("spawn")
            starting = [(rank, self.world, store, self._device) for rank in range(self.world)]
            self._executors = [futures.ProcessPoolExecutor(1, spawn, join_group, start) for start in starting]
            self._answers(SECONDS_TO_START, self._ready)
        return self._answers(self._seconds, function, *arguments)

    def all(self, function, *arguments):
        """Return the answers of calls that must end well."""
        answers = self(function, *arguments)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def _answers(self, seconds, function, *arguments):
        calls = [executor.submit(function, rank, *arguments) for rank, executor in enumerate(self._executors)]
        if futures.wait(calls, seconds).not_done:
            self.stop()
            pytest.fail("a process hangs")
        return [call.exception() or call.result() for call in calls]

    def stop(self):
        for executor in self._executors:
            for process in executor._processes.values():
                process.kill()
            executor.shutdown()
        self._executors = []


class Pair(Ranks):
    """Two processes."""

    def __init__(self, folder, **options):
        super().__init__(folder, WORLD, **options)

    both = Ranks.all
