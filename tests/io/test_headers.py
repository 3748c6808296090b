"""Headers that lie are refused in one sentence; what is accepted, safetensors itself reads alike."""

from __future__ import annotations

import json
import os
import struct
import time

import pytest
import torch
from bad_json import bad_files, bytes_of, fuzz
from folders import bound_by_permissions
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tiny import write_raw

from fused_merge.io.headers import (
    CODES,
    DTYPES,
    METADATA,
    Entry,
    Header,
    encode_header,
    load_json,
    read_header,
    read_json,
)

# --- what is refused

FOUR = b"\0" * 4


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}


def sized(size: str) -> bytes:
    return b'{"a":{"dtype":"F32","shape":[0,%s],"data_offsets":[0,0]}}' % size.encode()


TEXT = json.dumps(entry())


@pytest.mark.parametrize(
    ("header", "data"),
    [
        *((text, b"") for text in [
            b"", b"[]", b"{}x", b"{}\0", b"\xef\xbb\xbf{}", b'{"\xff":1}', b'{"\xed\xa0\x80":1}', b"[" * 100_000]),
        (f'{{"a\\ud800":{TEXT}}}'.encode(), FOUR),
        (f'{{"{METADATA}":{{"k":"\\udc80"}},"a":{TEXT}}}'.encode(), FOUR),
        (f'{{"a":{TEXT[:-1]},"shape":[1]}}}}'.encode(), FOUR),
        (f'{{"{METADATA}":{{}},"{METADATA}":{{}}}}'.encode(), b""),
        *(({"a": other}, FOUR) for other in [
            [entry()], {"dtype": "F32", "shape": [1]}, entry(dtype=["F32"]), entry(dtype="F\n"), entry(dtype="F99"),
            entry(shape=1), entry(shape=[2]), entry(shape=[2**61]), entry(data_offsets=[0, 4, 4]),
            entry(data_offsets=[-4, 0]), entry(data_offsets=[4, 0])]),
        ({"a": entry(shape=[2**62, 2**62, 0], data_offsets=[0, 0])}, b""),
        *((sized(size), b"") for size in [
            "-0", "-1", "1.0", "1e0", "true", "null", '"1"', "[1]", "1" * 5000, "NaN", "Infinity", "1e400"]),
        ({"a": entry(), "b": entry()}, FOUR),
        ({"a": entry(), "b": entry(data_offsets=[2, 6])}, b"\0" * 6),
        ({"a": entry(), "b": entry(data_offsets=[8, 12])}, b"\0" * 12),
        ({"b": entry(data_offsets=[4, 8])}, b"\0" * 8),
        ({"a": entry(), "none": entry(shape=[0], data_offsets=[2, 2])}, FOUR),
        ({"a": entry(), "none": entry(shape=[0], data_offsets=[8, 8])}, FOUR),
        ({"a": entry()}, FOUR + b"\0"),
        ({"a": entry()}, FOUR[1:]),
        *(({METADATA: metadata}, b"") for metadata in [[], "", 0, False, "k", {"k": 1}, {"k": None}, {"k": {}}]),
        # Lengths that lie.
        *((None, blob) for blob in [
            b"", b"\0" * 7, b"\x03" + b"\0" * 7 + b"{}", b"\xff" * 8 + b"{}", struct.pack("<Q", 10**8 + 1) + b"{}"]),
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused_by_the_library_in_one_sentence_of_ours(header, data, tmp_path):
    path = write_raw(tmp_path / "x.safetensors", header, data)
    if header is None:
        path.write_bytes(data)
    with pytest.raises(SafetensorError):
        safe_open(path, "pt")
    with pytest.raises(ValueError, match=r"x\.safetensors cannot be read as a safetensors file \([^\n]+\); copy or d"):
        read_header(path)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"shape": [1] * 65}, r"of shape \[1, 1.*, which torch cannot hold; convert it first$"),
        ({"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}, r"of shape \[0, 4611686018427387904, 46.*"),
        ({"shape": [0, 2**63], "data_offsets": [0, 0]}, r"of shape \[0, 9223372036854775808\]"),
        ({"shape": [0, 2**64 - 1], "data_offsets": [0, 0]}, r"of shape \[0, 18446744073709551615\]"),
        ({"dtype": "F4", "shape": [8]}, "F4, packed codes that mean nothing without .*; dequantize the model first$"),
        ({"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}, "F6_E2M3, packed codes"),
    ],
)
def test_tensors_that_the_library_accepts_and_nothing_can_be_done_with(changes, kind, tmp_path):
    path = write_raw(tmp_path / "x.safetensors", {"a": entry(**changes)}, bytes(entry(**changes)["data_offsets"][1]))
    safe_open(path, "pt")
    with pytest.raises(ValueError, match=rf"x\.safetensors cannot be used: 'a' is {kind}"):
        read_header(path)


@pytest.mark.parametrize("read", [read_header, read_json])
def test_a_file_that_cannot_be_opened_or_read_is_named(read, tmp_path):
    with pytest.raises(OSError, match="gone cannot be read: No such file or directory; make it readable or copy it"):
        read(tmp_path / "gone")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    with pytest.raises(OSError, match="loop cannot be read: Too many levels of symbolic links"):
        read(tmp_path / "loop")
    secret = write_raw(tmp_path / "secret", {})
    secret.chmod(0)
    with pytest.raises(OSError, match="secret cannot be read: Permission denied; make it readable"):
        bound_by_permissions(lambda: read(secret))
    # A regular file of this process whose first page is not mapped.
    if read is read_header and os.path.exists("/proc/self/mem"):
        with pytest.raises(OSError, match="/proc/self/mem cannot be read: Input/output error"):
            read("/proc/self/mem")


def test_a_name_of_megabytes_does_not_fill_the_screen(tmp_path):
    name = "n" * 5_000_000
    path = write_raw(tmp_path / "x.safetensors", {name: entry()}, FOUR)
    assert list(read_header(path).entries) == [name]
    for header in (
        {name: entry(shape=[2])},
        {name: entry(dtype="F4", shape=[8])},
        {"a": entry(dtype=name)},
        {"a": {**entry(), "shape": name}},
    ):
        with pytest.raises(ValueError, match=r"x\.safetensors cannot be") as error:
            read_header(write_raw(path, header, FOUR))
        assert len(str(error.value)) < len(str(path)) + 500


# --- what is accepted


def test_tensors_may_stand_in_any_order_and_be_empty(tmp_path):
    header = {
        "b": entry(data_offsets=[4, 8]),
        "none": entry(shape=[3, 0], data_offsets=[4, 4]),
        "a": entry(),
        "": entry(shape=[0], data_offsets=[0, 0]),
        "last": entry(dtype="U8", shape=[], data_offsets=[8, 9]),
        METADATA: {"k": "v"},
    }
    text = json.dumps(header).encode() + b" \n\t\r"
    read = read_header(write_raw(tmp_path / "x.safetensors", text, b"\0" * 9))
    assert [name for name, entry in read.entries.items() if entry.end > entry.start] == ["a", "b", "last"]
    assert {*read.entries} == {*header} - {METADATA}
    assert read.entries["none"] == Entry(torch.float32, (3, 0), 4, 4)
    assert read.entries["last"] == Entry(torch.uint8, (), 8, 9)
    assert read.metadata == {"k": "v"}
    assert read.data == 8 + len(text)


def test_what_stands_twice_or_is_not_known_is_what_the_library_makes_of_it(tmp_path):
    twice = f'{{"a":{json.dumps(entry(shape=[2]))},"\\u0061":{TEXT},"{METADATA}":{{"k":"1","k":"2"}}}}'.encode()
    read = read_header(write_raw(tmp_path / "x.safetensors", twice, FOUR))
    assert (read.entries["a"].shape, read.metadata) == ((1,), {"k": "2"})
    for header in ({"a": entry(more=1)}, {"a": entry(), METADATA: {}}, {"a": entry(), METADATA: None}):
        path = write_raw(tmp_path / "x.safetensors", b" " + json.dumps(header).encode(), FOUR)
        assert read_header(path)[:2] == ({"a": Entry(torch.float32, (1,), 0, 4)}, {})


# --- held against safetensors itself

TENSORS = st.dictionaries(
    st.text(max_size=12).filter(lambda name: name != METADATA),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
    max_size=5,
)
FREE_TEXT = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3)


def held_alike(path, header: Header) -> None:
    """Assert that safetensors reads from a file what our header says, and what lies where it says."""
    blob = path.read_bytes()
    with safe_open(path, "pt") as file:
        assert (file.metadata() or {}) == header.metadata
        assert sorted(file.keys()) == sorted(header.entries)
        for name, (dtype, shape, start, end) in header.entries.items():
            tensor = file.get_tensor(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
            assert bytes_of(tensor) == blob[header.data + start : header.data + end]


@settings(fuzz, max_examples=100)
@given(tensors=TENSORS, metadata=FREE_TEXT, seed=st.integers(0, 2**32))
def test_whatever_safetensors_writes_is_read_alike(tensors, metadata, seed, tmp_path):
    generator = torch.Generator().manual_seed(seed)
    stored = {}
    for name, (code, shape) in tensors.items():
        size = torch.Size(shape).numel() * DTYPES[code].itemsize
        data = torch.randint(0, 2 if code == "BOOL" else 256, (size,), generator=generator, dtype=torch.uint8)
        stored[name] = data.view(DTYPES[code]).reshape(shape)
    path = tmp_path / "x.safetensors"
    # With metadata {} and no tensors it writes what it cannot read itself.
    path.write_bytes(save(stored, metadata or None))
    header = read_header(path)
    assert header.metadata == metadata
    assert {name: (CODES[entry.dtype], list(entry.shape)) for name, entry in header.entries.items()} == tensors
    held_alike(path, header)


@settings(fuzz, max_examples=100)
@given(tensors=TENSORS, metadata=FREE_TEXT, multiple=st.sampled_from([8, 64, 4096]))
def test_what_we_write_safetensors_and_we_read_alike(tensors, metadata, multiple, tmp_path):
    entries, place = {}, 0
    for name, (code, shape) in tensors.items():
        end = place + torch.Size(shape).numel() * DTYPES[code].itemsize
        entries[name] = Entry(DTYPES[code], tuple(shape), place, end)
        place = end
    text = encode_header(entries, metadata, multiple=multiple)
    assert len(text) % multiple == 0
    path = tmp_path / "x.safetensors"
    path.write_bytes(text + bytes(place))
    assert read_header(path) == Header(entries, metadata, len(text))
    held_alike(path, read_header(path))


SMALL = {
    METADATA: {"format": "pt"},
    "w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "none": {"dtype": "F16", "shape": [0, 4], "data_offsets": [12, 12]},
    "flag": {"dtype": "BOOL", "shape": [], "data_offsets": [12, 13]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [13, 21]},
}


def test_whatever_is_accepted_safetensors_reads_alike(tmp_path):
    path = tmp_path / "x.safetensors"
    refusals, accepted = [], []

    @settings(fuzz, max_examples=300)
    @given(blob=bad_files(SMALL, bytes(range(21))))
    def compare(blob):
        path.write_bytes(blob)
        start = time.process_time()
        try:
            accepted.append(read_header(path))
        except ValueError as error:
            refusals.append(str(error))
        else:
            held_alike(path, accepted[-1])
        assert time.process_time() - start < 5

    compare()
    assert min(len(refusals), len(accepted)) > 25
    for refusal in refusals:
        assert refusal.startswith(str(path))
        assert "\n" not in refusal
        assert len(refusal) < len(str(path)) + 1000


# --- JSON from outside


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "Expecting value"),
        (b"\xff", "can't decode byte 0xff"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "'c' stands in it twice"),
        (b'{"a": NaN}', "is no number that JSON can hold"),
        (b'{"a": Infinity}', "is no number that JSON can hold"),
        (b'{"a": -1e999}', "is no number that JSON can hold"),
        (b'{"a": "\\udfff"}', "surrogates not allowed"),
        (b"[" * 101 + b"]" * 101, "it is nested too deeply"),
        (b"[" * 10**6, "(recursion depth|Stack overflow)"),
    ],
)
def test_json_that_is_none(text, reason, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=rf"x\.json is not JSON \(.*{reason}.*\); download it again"):
        read_json(path)


def test_json_is_read_as_it_stands(tmp_path):
    value = {"é": [None, True, 1, -2, 0.5, "😀"], "deep": json.loads("[" * 98 + "]" * 98)}
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "x.json") == load_json(json.dumps(value).encode()) == value
