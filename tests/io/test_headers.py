"""Headers that lie are refused in one sentence; what is accepted, safetensors itself reads alike."""

from __future__ import annotations

import json
import os
import struct
import time

import pytest
import torch
from bad_json import bad_files, bytes_of, fuzz
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
    ("header", "data", "reason"),
    [
        (b"", b"", "Expecting value"),
        (b"[]", b"", "its header is no JSON object"),
        (b" {}", b"", "its header is no JSON object"),
        (b"{}x", b"", "Extra data"),
        (b"{}\0", b"", "Extra data"),
        (b"\xef\xbb\xbf{}", b"", "BOM"),
        (b'{"\xff":1}', b"", "can't decode byte 0xff"),
        (b'{"\xed\xa0\x80":1}', b"", "can't decode byte 0xed"),
        (b"[" * 100_000, b"", "(recursion depth|Stack overflow)"),
        (f'{{"a\\ud800":{TEXT}}}'.encode(), FOUR, "surrogates not allowed"),
        (f'{{"{METADATA}":{{"k":"\\udc80"}},"a":{TEXT}}}'.encode(), FOUR, "surrogates not allowed"),
        (f'{{"a":{TEXT},"\\u0061":{TEXT}}}'.encode(), FOUR, "'a' stands in it twice"),
        (f'{{"a":{TEXT[:-1]},"shape":[1]}}}}'.encode(), FOUR, "'shape' stands in it twice"),
        (f'{{"{METADATA}":{{"k":"1","k":"2"}}}}'.encode(), b"", "'k' stands in it twice"),
        (f'{{"{METADATA}":{{}},"{METADATA}":{{}}}}'.encode(), b"", "'__metadata__' stands in it twice"),
        ({"a": [entry()]}, FOUR, "'a' has not just dtype, shape and data_offsets"),
        ({"a": entry(more=1)}, FOUR, "'a' has not just dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [1]}}, FOUR, "'a' has not just dtype, shape and data_offsets"),
        ({"a": entry(dtype=["F32"])}, FOUR, "'a' has no dtype"),
        ({"a": entry(dtype="F\n")}, FOUR, "'a' has no dtype"),
        ({"a": entry(shape=1)}, FOUR, "'a' has a shape or offsets that no tensor has"),
        ({"a": entry(shape=[1] * 65)}, FOUR, "'a' has a shape or offsets that no tensor has"),
        ({"a": entry(data_offsets=[0, 4, 4])}, FOUR, "'a' has a shape or offsets that no tensor has"),
        ({"a": entry(data_offsets=[-4, 0])}, FOUR, "'a' has a shape or offsets that no tensor has"),
        ({"a": entry(shape=[2**62, 2**62, 0])}, b"", "'a' has a shape or offsets that no tensor has"),
        ({"a": entry(shape=[0, 2**62, 2**62])}, b"", "'a' has a shape or offsets that no tensor has"),
        *((sized(size), b"", "'a' has a shape or offsets that no tensor has")
          for size in ["-0", "-1", "1.0", "1e0", "1e1", "true", "null", '"1"', "[1]", str(2**63), "1" * 4000]),
        *((sized(size), b"", "Out of range float") for size in ["NaN", "Infinity", "1e400"]),
        (sized("1" * 5000), b"", r"limit \(4300"),
        ({"a": entry(shape=[2])}, FOUR, r"'a' is F32 of \[2\], and its offsets \[0, 4\] span another number of bytes"),
        ({"a": entry(shape=[2**61])}, FOUR, "span another number of bytes"),
        ({"a": entry(data_offsets=[4, 0])}, FOUR, "span another number of bytes"),
        ({"a": entry(), "b": entry()}, FOUR, "'b' begins at byte 0 of the data, where 4 was expected"),
        ({"a": entry(), "b": entry(data_offsets=[2, 6])}, b"\0" * 6, "'b' begins at byte 2 .* where 4 was"),
        ({"a": entry(), "b": entry(data_offsets=[8, 12])}, b"\0" * 12, "'b' begins at byte 8 .* where 4 was"),
        ({"b": entry(data_offsets=[4, 8])}, b"\0" * 8, "'b' begins at byte 4 of the data, where 0 was expected"),
        ({"a": entry(), "none": entry(shape=[0], data_offsets=[2, 2])}, FOUR, "'none' begins at byte 2 .* where 4 was"),
        ({"a": entry(), "none": entry(shape=[0], data_offsets=[8, 8])}, FOUR, "'none' begins at byte 8 .* where 4 was"),
        ({"a": entry()}, FOUR + b"\0", "its tensors take 4 bytes, and the file holds 5"),
        ({"a": entry()}, FOUR[1:], "its tensors take 4 bytes, and the file holds 3"),
        *(({METADATA: metadata}, b"", "'__metadata__' maps not only strings to strings")
          for metadata in [[], "", 0, False, "k", {"k": 1}, {"k": None}, {"k": {}}]),
    ],
)  # fmt: skip
def test_a_header_that_lies(header, data, reason, tmp_path):
    path = write_raw(tmp_path / "x.safetensors", header, data)
    with pytest.raises(
        ValueError, match=rf"x\.safetensors cannot be read as a safetensors file \(.*{reason}.*\); copy"
    ):
        read_header(path)


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (b"", "its header cannot have 0 of its 0 bytes"),
        (b"\0" * 7, "its header cannot have 0 of its 7 bytes"),
        (b"\x03" + b"\0" * 7 + b"{}", "its header cannot have 3 of its 10 bytes"),
        (b"\xff" * 8 + b"{}", "its header cannot have 18446744073709551615 of its 10 bytes"),
    ],
)
def test_a_length_that_lies(blob, reason, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(blob)
    with pytest.raises(ValueError, match=rf"x\.safetensors cannot be read as a safetensors file \({reason}\); copy"):
        read_header(path)


def test_a_header_as_long_as_the_library_reads_and_one_byte_longer(tmp_path):
    path = tmp_path / "x.safetensors"
    for length in (10**8, 10**8 + 1):
        path.write_bytes(struct.pack("<Q", length) + b"{}".ljust(length))
        if length == 10**8:
            assert read_header(path) == Header({}, {}, 8 + length)
    with pytest.raises(ValueError, match="its header cannot have 100000001 of its 100000009 bytes"):
        read_header(path)
    with pytest.raises(SafetensorError, match="header too large"):
        safe_open(path, "pt")


@pytest.mark.parametrize("read", [read_header, read_json])
def test_what_is_no_regular_file_is_not_waited_for(read, tmp_path):
    path = tmp_path / "x.safetensors"
    os.mkfifo(path)
    others = [path, tmp_path, "/dev/zero"]
    os.symlink(path, tmp_path / "link")
    for other in [*others, tmp_path / "link"]:
        with pytest.raises(ValueError, match=rf"{other} .*\(it is not a regular file\)"):
            read(other)


@pytest.mark.parametrize("read", [read_header, read_json])
def test_a_file_that_cannot_be_opened_or_read_is_named(read, tmp_path, monkeypatch):
    with pytest.raises(OSError, match="gone cannot be read: No such file or directory; make it readable or copy it"):
        read(tmp_path / "gone")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    with pytest.raises(OSError, match="loop cannot be read: Too many levels of symbolic links"):
        read(tmp_path / "loop")
    secret = write_raw(tmp_path / "secret", {})
    secret.chmod(0)
    if os.geteuid() != 0:
        with pytest.raises(OSError, match="secret cannot be read: Permission denied; make it readable"):
            read(secret)
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
        {name: entry(dtype="F99")},
        {"a": entry(dtype=name)},
        f'{{"{name}":1,"{name}":1}}'.encode(),
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
    assert list(read.entries) == ["b", "none", "a", "", "last"]
    assert read.entries["none"] == Entry(torch.float32, (3, 0), 4, 4)
    assert read.entries["last"] == Entry(torch.uint8, (), 8, 9)
    assert read.metadata == {"k": "v"}
    assert read.data == 8 + len(text)


@pytest.mark.parametrize("metadata", [{}, None])
def test_no_metadata(metadata, tmp_path):
    assert read_header(write_raw(tmp_path / "x.safetensors", {METADATA: metadata})).metadata == {}


def test_a_file_that_takes_no_room(tmp_path):
    size = 2**36
    path = write_raw(tmp_path / "x.safetensors", {"a": entry(shape=[size // 4], data_offsets=[0, size])})
    os.truncate(path, path.stat().st_size + size)
    assert read_header(path).entries["a"].end == size


def test_a_symbolic_link_to_a_file(tmp_path):
    path = write_raw(tmp_path / "blob", {"a": entry()}, FOUR)
    os.symlink(path, tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors") == read_header(path)


def test_fifty_thousand_tensors_take_seconds(tmp_path):
    n = 50_000
    header = {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(n)}
    path = write_raw(tmp_path / "x.safetensors", header, bytes(n))
    start = time.process_time()
    assert len(read_header(path).entries) == n
    assert time.process_time() - start < 10


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

    @settings(fuzz, max_examples=600)
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
    assert min(len(refusals), len(accepted)) > 50
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
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "'c' stands in it twice"),
        (b'{"a": NaN}', "Out of range float"),
        (b'{"a": -1e999}', "Out of range float"),
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


def test_json_of_a_gigabyte_is_not_read(tmp_path):
    path = tmp_path / "x.json"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(ValueError, match=r"x\.json is not JSON \(it has 1099511627776 bytes\)"):
        read_json(path)


def test_json_is_read_as_it_stands(tmp_path):
    value = {"é": [None, True, 1, -2, 0.5, "😀"], "deep": json.loads("[" * 98 + "]" * 98)}
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "x.json") == load_json(json.dumps(value).encode()) == value
