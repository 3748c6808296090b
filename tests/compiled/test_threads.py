"""Compiled code in the OpenMP threads of torch, in others where it has none, and in processes that were forked."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch
from bits import assert_same_bits
from tensors import Tensors

from fused_merge.compiled import threads as crews

SHAPES = [(9000,), (0,), (3, 5000), (1,), (4096,), *[(50,)] * 20]
OPTIONS = [
    {"method": "ondare", "rounding": "stochastic"},
    {"method": "onties"},
    {"method": "onproj", "project": "conflict"},
    {"method": "onproj", "project": "onto", "project_over": "rows"},
]


def stepped(impl, options, steps=3):
    tensors = Tensors(*SHAPES, tau=torch.bfloat16, sparse=options["method"] != "onproj")
    for _ in range(steps):
        tensors.step(impl, **options)
    return tensors.outputs()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("by", ["torch's threads", "others"])
def test_the_number_of_threads_does_not_show(by, workers, options, threads, monkeypatch):
    if by == "others":
        monkeypatch.setattr(crews, "_openmp", lambda: None)
    elif sys.platform == "linux":
        assert crews._openmp() is not None
    threads(workers)
    assert_same_bits(stepped("compiled", options), stepped("eager", options))


def test_every_block_is_done_once_by_one_of_the_threads(threads, monkeypatch):
    seen = []
    run = crews.in_threads

    def noted(workers, address, task):
        run(workers, address, task)
        fields = crews.Task(*task.tolist())
        seen.append((workers, fields.thread, fields.next >= fields.blocks))

    monkeypatch.setattr(crews, "in_threads", noted)
    threads(3)
    stepped("compiled", OPTIONS[0], steps=1)
    # Numbers are drawn by all threads that came: OpenMP may have had fewer to give.
    assert {workers for workers, _, done in seen} == {1, 3}
    assert all(drawn in (0, workers) and done for workers, drawn, done in seen)


def test_small_lists_of_tensors_stay_in_one_thread():
    assert crews.Blocks.of([0], [1 << 15]).threads == 1
    assert crews.Blocks.of([0], [1 << 20]).threads == torch.get_num_threads()
    assert crews.Blocks.of([], []).count == 0


def test_steps_may_be_taken_in_several_threads_of_python():
    expected = {i: stepped("eager", OPTIONS[i]) for i in range(4)}
    found = {}
    own = [threading.Thread(target=lambda i=i: found.update({i: stepped("compiled", OPTIONS[i])})) for i in range(4)]
    for thread in own:
        thread.start()
    for thread in own:
        thread.join()
    for i in range(4):
        assert_same_bits(found[i], expected[i])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("by", ["torch's threads", "others"])
def test_a_forked_process_steps_on(by, threads, monkeypatch):
    """Threads do not survive a fork, and GNU's OpenMP hangs in a child whose parent had some: one thread is left."""
    if by == "others":
        monkeypatch.setattr(crews, "_openmp", lambda: None)
    threads(2)
    before = stepped("compiled", OPTIONS[1])
    child = os.fork()
    if child == 0:
        torch.set_num_threads(2 if by == "others" else 1)
        try:
            assert_same_bits(stepped("compiled", OPTIONS[1]), before)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
