"""Two processes of one group, for tests of what they do together. What they call must be importable from here."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

WORLD = 2
# A call that takes longer hangs; starting is a matter of the disk.
SECONDS, SECONDS_TO_START = 60, 240


def serve(rank, connection, store):
    """Call whatever is asked for, and answer with its result or exception."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    connection.send("ready")
    while (asked := connection.recv()) is not None:
        function, *arguments = asked
        try:
            answer = function(rank, *arguments)
        except BaseException as error:
            answer = error
        connection.send(answer)
    torch.distributed.destroy_process_group()


class Pair:
    """Two processes, started at the first call and again after one that hangs."""

    def __init__(self, folder):
        self._folder = folder
        self._started = 0
        self._processes = []

    def __call__(self, function, *arguments):
        """Return what `function(rank, *arguments)` returned or raised on each of them."""
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, *arguments))
        return self._answers(SECONDS)

    def both(self, function, *arguments):
        """Return the answers of calls that must end well."""
        answers = self(function, *arguments)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._started += 1
        store = self._folder / f"store{self._started}"
        pipes = [context.Pipe() for _ in range(WORLD)]
        self._connections = [mine for mine, _ in pipes]
        self._processes = [
            context.Process(target=serve, args=(rank, theirs, store), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            # So that a process that ends closes the pipe.
            theirs.close()
        self._answers(SECONDS_TO_START)

    def _answers(self, seconds):
        if not all(connection.poll(seconds) for connection in self._connections):
            self.stop()
            pytest.fail("a process hangs")
        return [connection.recv() for connection in self._connections]

    def stop(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []
