"""JSON and safetensors files that are nearly right, for the tests of whoever reads files from outside."""

from __future__ import annotations

import json
import struct
from copy import deepcopy

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from fused_merge.io.headers import DTYPES, METADATA

fuzz = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


class Raw(str):
    """Text that stands in the JSON as it is, be it JSON or not."""


class Pairs(list):
    """An object as a list of `Pair`: a key may stand twice."""


class Pair(list):
    """A key and its value."""


def as_pairs(value: object) -> object:
    """Return JSON whose objects are `Pairs`, and whose parts can be replaced."""
    if isinstance(value, dict):
        return Pairs(Pair([key, as_pairs(inner)]) for key, inner in value.items())
    return [as_pairs(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def dump(value: object) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(":".join(map(dump, pair)) for pair in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def places(value: object) -> list[tuple[list, int]]:
    """Return every place in some JSON as the list that holds it and its index there."""
    here = [(value, place) for place in range(len(value))] if isinstance(value, list) else []
    return here + [place for container, index in here for place in places(container[index])]


NUMBERS = [
    *map(Raw, ["NaN", "-Infinity", "1e400", "-0", "1.0", "1e0", "01", "1" * 5000]),
    *[-1, 0, 1, 2, 8, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, 2**64 - 4, 0.5],
]
TEXTS = [
    *map(Raw, ['"\\ud800"', '"\\u0000"', '"\n"', '"']),
    *["", METADATA, f"module.{METADATA}", "dtype", "a", "n" * 10_000, "é", "\u2028", "F4", "f32", *DTYPES],
]
OTHERS = [
    *map(Raw, ["", "[" * 100_000, "[" * 200 + "]" * 200, '{"a":' * 200 + "1" + "}" * 200]),
    *[None, True, False, [], [0], [0, 0], [1] * 70, [2**62, 2**62, 0], [0, 2**62, 2**62]],
    *map(as_pairs, [{}, {"a": "b"}, {"a": 1}]),
]


@st.composite
def nearly(draw, value, texts=()):
    """JSON text that differs from that of `value` in one place or a few; `texts` are strings to try."""
    value = [as_pairs(value)]
    odd = {int: [NUMBERS], str: [TEXTS, texts or TEXTS]}
    for _ in range(draw(st.integers(1, 3))):
        everywhere = places(value)
        container, index = draw(st.sampled_from(everywhere))
        changes = ["replace", "rename", "move", "nudge", *["swap", "double", "drop"] * (type(container) is not Pair)]
        change = draw(st.sampled_from(changes))
        if type(container) is Pairs and change not in ("swap", "double", "drop"):
            container, index = container[index], 1
        old = container[index]
        if change in ("replace", "rename"):
            new = draw(st.one_of(*map(st.sampled_from, [OTHERS, *odd.get(type(old), [])])))
            for other, place in everywhere if change == "rename" and isinstance(old, str) else [(container, index)]:
                if other[place] == old:
                    other[place] = deepcopy(new)
        elif change == "move":
            other, place = draw(st.sampled_from(everywhere))
            container[index] = deepcopy(other[place])
        elif change == "nudge" and type(old) is int:
            container[index] += draw(st.sampled_from([-8, -4, -2, -1, 1, 2, 4, 8]))
        elif change == "swap":
            place = draw(st.integers(0, len(container) - 1))
            container[index], container[place] = container[place], old
        elif change == "double":
            container.insert(draw(st.integers(0, len(container))), deepcopy(old))
        elif change == "drop" and container is not value:
            del container[index]
    return "".join(map(dump, value)).encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw, blob):
    """Bytes of which some were flipped, cut off or appended."""
    damage = draw(st.sampled_from(["flip", "cut", "append"]))
    if damage == "flip":
        changed = bytearray(blob)
        for _ in range(draw(st.integers(1, 4))):
            changed[draw(st.integers(0, len(blob) - 1))] = draw(st.integers(0, 255))
        return bytes(changed)
    if damage == "cut":
        return blob[: draw(st.integers(0, len(blob) - 1))]
    return blob + draw(st.sampled_from([b"\0", b" ", b"\0" * 8, b"{}", b"x" * 100]))


@st.composite
def bad_files(draw, header, data, texts=()):
    """A safetensors file with a header that is nearly right, or bytes that are."""
    text = json.dumps(header).encode()
    kind = draw(st.sampled_from(["header", "header", "header", "length", "bytes"]))
    if kind == "header":
        text = draw(nearly(header, texts))
        text += draw(st.sampled_from([b"", b"", b"", b" " * 7, b"\n\t\r ", b"\0"]))
    lie = draw(st.sampled_from([0, 1, 7, len(text) - 1, len(text) + 1, 10**8, 10**8 + 1, 2**63, 2**64 - 1]))
    blob = struct.pack("<Q", lie if kind == "length" else len(text)) + text + data
    return draw(damaged(blob)) if kind == "bytes" else blob
