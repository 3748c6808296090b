"""Checksums put together from pieces against Fletcher's definition in Python's integers."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import fletcher

from fused_merge.checkpoints.checksum import add_to, checksums, text


def in_pieces(tensors: dict[str, list[bytes]], cuts: dict[str, list[int]], *, shift: int = 0) -> dict[str, list[str]]:
    parts = []
    for name, contents in tensors.items():
        for start, end in pairwise([0, *sorted(cuts[name]), len(contents[0])]):
            # As in the engine: rows of a wider buffer, at any place of it.
            buffer = torch.zeros(len(contents), shift + end - start + 13, dtype=torch.uint8)
            for row, content in zip(buffer, contents, strict=True):
                row[shift : shift + end - start] = torch.frombuffer(bytearray(content + b"."), dtype=torch.uint8)[
                    start:end
                ]
            parts.append((name, checksums(buffer[:, shift : shift + end - start], start)))
    random.Random(0).shuffle(parts)
    totals = {}
    add_to(totals, parts)
    return {name: text(total) for name, total in totals.items()}


@given(st.integers(0, 20000), st.integers(1, 3), st.lists(st.integers(0, 20000), max_size=5), st.integers(0, 9))
def test_pieces_in_any_order_give_the_checksum_of_the_whole(size, outputs, cuts, shift):
    contents = [random.Random(i).randbytes(size) for i in range(outputs)]
    found = in_pieces({"w": contents}, {"w": [min(cut, size) for cut in cuts]}, shift=shift)
    assert found == {"w": list(map(fletcher, contents))}


def test_whole_rows_are_taken_as_they_lie():
    contents = [random.Random(i).randbytes(9 * 4096 + 24) for i in range(2)]
    for cut in (4096, 4096 + 2048, 8 * 4096):
        assert in_pieces({"w": contents}, {"w": [cut]})["w"] == list(map(fletcher, contents))


def test_several_tensors_are_told_apart():
    tensors = {"a": [b"12345678"], "b": [b"8765"], "none": [b""]}
    found = in_pieces(tensors, {name: [] for name in tensors})
    assert found == {name: [fletcher(content)] for name, (content,) in tensors.items()}


def test_what_is_flipped_moved_or_swapped_is_noticed():
    content = random.Random(0).randbytes(5 * 4096)
    others = [
        content[:777] + bytes([content[777] ^ 1]) + content[778:],
        content[4096:] + content[:4096],
        content[: 4 * 4096],
        content[:4096] + content[8192:12288] + content[4096:8192] + content[12288:],
    ]
    assert len({fletcher(other) for other in (content, *others)}) == 5


def test_a_few_lines_of_numpy_say_the_same():
    content = random.Random(1).randbytes(3 * 4096 + 100)
    words = np.frombuffer(content.ljust(4 * 4096, b"\0"), "<u8").reshape(-1, 512)
    with np.errstate(over="ignore"):
        sums = words.sum(1)
        second = (sums * np.arange(1, len(sums) + 1, dtype=np.uint64)).sum()
    assert f"{sums.sum():016x}{second:016x}" == fletcher(content)
