"""Hostile model folders: all of the work is done or none, in one sentence, and nothing elsewhere is touched."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import re
import shutil
import struct
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from bad_json import bad_files, bytes_of, damaged, fuzz, nearly
from bits import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

import fused_merge as fm
from fused_merge.names import canonical_name

RATIOS = [0.0, 0.3]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


# --- two small models


def layout(seed: int, codes: dict[str, tuple[str, list[int]]]) -> tuple[dict[str, object], bytes]:
    """Return a header and its data; nothing is aligned."""
    generator = torch.Generator().manual_seed(seed)
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (code, shape) in codes.items():
        dtype = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}.get(code)
        values = torch.randn(shape, generator=generator) * 3
        stored = bytes_of(values > 0 if dtype is None else values.to(getattr(torch, dtype)))
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [len(data), len(data) + len(stored)]}
        data += stored
    return header, data


ONE = {"model.w": ("BF16", [3, 5]), "flag": ("BOOL", []), "model.odd": ("F32", [3]), "none": ("F16", [0, 4])}
TWO = {"count": ("I64", [2]), "model.half": ("F16", [2, 2]), "model.wide": ("F64", [2])}
INDEXED = {
    "metadata": {"total_size": 91},
    "weight_map": {name: file for file, names in ((FIRST, ONE), (SECOND, TWO)) for name in names},
}
CONFIG = {"config.json": b'{"tie_word_embeddings": true}'}


def encode(header: dict[str, object], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def single(seed: int) -> dict[str, bytes]:
    return {**CONFIG, SINGLE: encode(*layout(seed, {**ONE, **TWO}))}


def sharded(seed: int) -> dict[str, bytes]:
    shards = {FIRST: encode(*layout(seed, ONE)), SECOND: encode(*layout(seed + 10, TWO))}
    return {**CONFIG, **shards, INDEX: json.dumps(INDEXED).encode()}


def put(folder: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


# --- who opens what


class Witness:
    """Notices what this process opens and changes outside of some folders, and that it loads a pickle.

    Python's own audit events tell of everything that Python does, wherever. What safetensors opens they do not: on
    Linux the kernel itself tells of that, for the folder `canary`. Around it nothing may change: `root` is compared.
    """

    recorded: list[tuple[str, tuple[object, ...]]] | None = None

    def __init__(self, root: Path, canary: Path, allowed: list[Path]) -> None:
        self.root, self.allowed = root, [os.path.realpath(folder) + os.sep for folder in allowed]
        self.inotify = None
        if sys.platform == "linux":
            libc = ctypes.CDLL(None, use_errno=True)
            self.inotify = libc.inotify_init1(os.O_NONBLOCK)
            everything = 0xFFF
            assert libc.inotify_add_watch(self.inotify, os.fsencode(canary), everything) >= 0, ctypes.get_errno()

    def close(self) -> None:
        if self.inotify is not None:
            os.close(self.inotify)

    def state(self) -> dict[str, tuple[int, ...]]:
        kept = [path for path in self.root.rglob("*") if not f"{path}{os.sep}".startswith(self.allowed[-1])]
        stats = {str(path): path.lstat() for path in kept}
        return {path: (s.st_ino, s.st_mode, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats.items()}

    def canary_is_quiet(self) -> bool:
        try:
            return self.inotify is None or not os.read(self.inotify, 2**16)
        except BlockingIOError:
            return True

    @contextmanager
    def watching(self):
        before = self.state()
        self.canary_is_quiet()
        Witness.recorded = recorded = []
        try:
            yield
        finally:
            Witness.recorded = None
            quiet = self.canary_is_quiet()
        assert quiet, "something outside was touched"
        assert self.state() == before
        for event, args in recorded:
            assert not event.startswith(("pickle.", "subprocess.", "socket.", "os.system", "os.exec", "os.posix_spawn"))
            # Names alone are relative to open folders.
            for path in (os.fsdecode(arg) for arg in args if isinstance(arg, (str, bytes, os.PathLike))):
                real = os.path.realpath(path) + os.sep
                # There a job counts the files that this process has open.
                assert os.sep not in path or path == "/dev/fd" or real.startswith(tuple(self.allowed)), (
                    f"{event} of {path}"
                )


def _record(event: str, args: tuple[object, ...]) -> None:
    watched = ("open", "os.", "shutil.", "mmap.", "pickle.", "subprocess.", "socket.")
    if Witness.recorded is not None and event.startswith(watched):
        Witness.recorded.append((event, args))


@pytest.fixture(scope="module", autouse=True)
def _hook():
    sys.addaudithook(_record)


class Place:
    """Two models, a folder for what becomes of them, and one beside them that nobody may touch."""

    def __init__(self, root: Path) -> None:
        self.base, self.tuned, self.outside, self.out = (root / name for name in ("base", "tuned", "outside", "out"))
        # Whoever follows a path into it finds what he looks for.
        put(self.outside, {**sharded(0), SINGLE: single(0)[SINGLE]})
        self.witness = Witness(root, self.outside, [self.base, self.tuned, self.out])
        self.refusal = ""

    def attempt(self, action, name: str | None = None):
        """Return what the action returns, or None where it refuses as it may, naming a folder or the tensor read."""
        start, result = time.process_time(), None
        with self.witness.watching():
            try:
                result = action()
            except (ValueError, TypeError, OSError) as error:
                self.refusal = str(error)
                assert "\n" not in self.refusal
                named = [str(self.base), str(self.tuned), str(self.out), *([] if name is None else [repr(name)])]
                assert any(what in self.refusal for what in named), self.refusal
        assert time.process_time() - start < 5
        return result

    def put(self, files_of) -> None:
        """Write the files of both models, of which each has its seed."""
        for seed, folder in enumerate((self.base, self.tuned)):
            put(folder, files_of(seed))

    def refuse(self, message: str) -> None:
        assert not self.use()
        assert re.search(message, self.refusal), self.refusal

    def use(self) -> bool:
        """Put the two models to use; return whether folders were written."""
        shutil.rmtree(self.out, ignore_errors=True)
        delta = self.attempt(lambda: fm.ReferenceDelta.from_checkpoints(self.base, self.tuned))
        if delta is not None:
            for name in delta.names:
                tau = self.attempt(lambda name=name: delta.tensor(name), name)
                assert tau is None or tau.shape == delta.shape(name)
        made = self.attempt(lambda: fm.interpolate_checkpoints(self.base, self.tuned, RATIOS, self.out))
        if made is None:
            assert not self.out.exists() or set(os.listdir(self.out)) <= {".fused_merge.part"}
            return False
        assert sorted(os.listdir(self.out)) == ["r0.00", "r0.30"]
        base, tuned = stored(self.base), stored(self.tuned)
        expected = fm.interpolate(base, {name: tuned[name] for name in base}, RATIOS)
        for folder, point in zip(made, expected, strict=True):
            written = stored(folder)
            assert written.keys() == base.keys()
            for name, tensor in written.items():
                assert tensor.dtype == base[name].dtype
                assert equal_values(tensor, point[name]), name
            if (folder / INDEX).exists():
                json.loads((folder / INDEX).read_bytes(), parse_constant=pytest.fail)
        assert all(same_bits(tensor, base[name]) for name, tensor in stored(made[0]).items())
        return True


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a folder as safetensors itself reads them, under canonical names."""
    files = [SINGLE]
    if not (folder / SINGLE).exists():
        weight_map = json.loads((folder / INDEX).read_bytes())["weight_map"]
        assert set(weight_map.values()) <= set(os.listdir(folder))
        files = sorted(set(weight_map.values()))
    return {canonical_name(name): tensor for file in files for name, tensor in load_file(folder / file).items()}


def equal_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors have the same bits, one NaN counting as any other."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    nan = a.isnan() & b.isnan()
    return same_bits(a.masked_fill(nan, 0), b.masked_fill(nan, 0))


@pytest.fixture(scope="module")
def shared_place(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("place"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.outside)
        # Thousands of small files need not survive a power cut.
        patch.setattr(os, "fsync", lambda descriptor: None)
        place.put(single)
        # Once unwatched: the first calls import modules.
        fm.interpolate_checkpoints(place.base, place.tuned, RATIOS, place.out)
        fm.ReferenceDelta.from_checkpoints(place.base, place.tuned)
        assert place.use()
        yield place
    place.witness.close()


@pytest.fixture
def place(shared_place):
    shared_place.put(single)
    shared_place.out.mkdir(exist_ok=True)
    shared_place.refusal = ""
    return shared_place


# --- files and indices that are nearly right


@pytest.mark.parametrize("model", [single, sharded])
def test_whatever_a_header_says(model, place):
    written = []
    file, codes = (SINGLE, {**ONE, **TWO}) if model is single else (FIRST, ONE)
    header, data = layout(0, codes)
    texts = [*header, "module.w", "model.module.w"]

    @settings(fuzz, max_examples=200)
    @given(blob=bad_files(header, data, texts), sides=st.sampled_from([(0,), (1,), (0, 1)]))
    def use(blob, sides):
        blobs = blob, blob.removesuffix(data) + layout(1, codes)[1]
        place.put(lambda seed: {**model(seed), **({file: blobs[seed]} if seed in sides else {})})
        written.append(place.use())

    use()
    assert 10 < sum(written) < len(written) - 10


def test_whatever_an_index_says(place):
    written = []
    texts = [
        *[f"../outside/{FIRST}", f"sub/../../outside/{FIRST}", str(place.outside / FIRST), f"..\\outside\\{FIRST}"],
        *[f"../tuned/{FIRST}", "/dev/zero", FIRST, SECOND, f"./{FIRST}", f"{FIRST}/", f"{FIRST}\0", f"{FIRST}\n"],
        *[".", "..", ".safetensors", "é.safetensors", "x" * 300 + SINGLE, "weight_map", "metadata", "flag", "count"],
    ]

    @settings(fuzz, max_examples=200)
    @given(
        text=nearly(INDEXED, texts) | damaged(json.dumps(INDEXED).encode()), sides=st.sampled_from([(0,), (1,), (0, 1)])
    )
    def use(text, sides):
        place.put(lambda seed: {**sharded(seed), **({INDEX: text} if seed in sides else {})})
        written.append(place.use())

    use()
    assert 10 < sum(written) < len(written) - 10


# --- one thing after the other


def header_text(name: str = "none", **changes: object) -> bytes:
    """Return the header of the first shard with another last entry."""
    header, _ = layout(0, ONE)
    last = {**header.pop("none"), **changes}
    return json.dumps({**header, name: last}).encode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            header_text("module.__metadata__"),
            "base holds 'module.__metadata__', a name that safetensors files keep for",
        ),
        (header_text("module.flag"), "base holds two tensors called 'flag' when prefixes of wrappers are dropped"),
        (header_text(dtype="C64"), "'none' of .*base is torch.complex64, which cannot be merged"),
        (header_text(dtype="F4"), r"base/model\.safetensors cannot be used: 'none' is F4"),
    ],
)
def test_headers_that_are_wrong_in_both_models(text, message, place):
    place.put(lambda seed: {SINGLE: struct.pack("<Q", len(text)) + text + layout(seed, ONE)[1]})
    place.refuse(message)


def index(weight_map: dict[str, object] | None = None, **more: object) -> bytes:
    return json.dumps({"weight_map": {**INDEXED["weight_map"], **(weight_map or {})}, **more}).encode()


FOREIGN = "which does not name a .safetensors file in its folder; correct the index"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((index({"flag": file}), rf"index\.json puts 'flag' into .*, {FOREIGN}")
          for file in [f"../outside/{FIRST}", f"./{FIRST}", f"{FIRST}/", f"sub/../{FIRST}", f"..\\outside\\{FIRST}",
                       f"a\0{FIRST}", f"a\n{FIRST}", "", ".", "..", "/dev/zero", f"/etc/{FIRST}", "config.json",
                       None, 1, True, [FIRST], {FIRST: 1}]),
        (index({"flag": FIRST.upper()}), "does not name a .safetensors file in its folder"),
        (index({"flag": "x" * 300 + SINGLE}), "names x+, which is not there; download the missing shard"),
        (index({"flag": SECOND}), f"does not list 'flag', which {FIRST} holds"),
        (index({"n" * 10**6: FIRST}), f"lists 'n+ in {FIRST}, which lacks it"),
        (b'{"weight_map":{"flag":"%s","flag":"%s"}}' % (FIRST.encode(), SECOND.encode()), "'flag' stands in it twice"),
        (b"", r"is not JSON \(Expecting value"),
        (b"[]", "has no 'weight_map' from tensor names to files"),
        (index({f"t{i}": f"{i}.safetensors" for i in range(10_000)}), r"names 0\.safetensors, which is not"),
        *((index(metadata=metadata), "has 'metadata' that are no JSON object") for metadata in [None, [], "", 7]),
        *((json.dumps({"weight_map": value}).encode(), "has no 'weight_map' from tensor names to files")
          for value in [None, [], {}, "x", 7]),
    ],
)  # fmt: skip
def test_an_index_that_is_wrong_in_both_models(text, message, place):
    place.put(lambda seed: {**sharded(seed), INDEX: text})
    place.refuse(message)
    assert len(place.refusal) < 1000


@pytest.mark.parametrize("file", [SINGLE, FIRST, INDEX])
@pytest.mark.parametrize(
    ("become", "message"),
    [
        (lambda path: None, "holds neither|which is not there"),
        (lambda path: path.symlink_to(path), "holds neither|which is not there"),
        (os.mkfifo, "it is not a regular file"),
        (Path.mkdir, "it is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is not a regular file"),
        (lambda path: (path.touch(), os.truncate(path, 2**40)), "it has 1099511627776 bytes|cannot be read as a safe"),
    ],
)
def test_what_stands_where_a_file_should(file, become, message, place):
    put(place.base, single(0) if file == SINGLE else sharded(0))
    (place.base / file).unlink()
    become(place.base / file)
    place.refuse(message)
    # The names of shards stand in their index.
    assert str(place.base / file) in place.refusal or file in place.refusal


def test_a_delta_that_is_not_finite_is_refused_when_it_is_read(place):
    header, data = layout(0, ONE)
    put(place.base, {SINGLE: encode(header, b"\xff" * 30 + data[30:])})
    put(place.tuned, {SINGLE: encode(*layout(1, ONE))})
    assert place.use()
    assert place.refusal == "the reference delta of 'model.w' has a NaN or infinite element; check both checkpoints"


def test_symbolic_links_to_files_are_files(place):
    put(place.base, sharded(0))
    (place.base / "blobs").mkdir()
    for name in (FIRST, SECOND, INDEX, "config.json"):
        (place.base / name).rename(place.base / "blobs" / name)
        (place.base / name).symlink_to(place.base / "blobs" / name)
    assert place.use()
    # One file under two names.
    (place.base / INDEX).write_bytes(index({"flag": "link.safetensors"}))
    (place.base / "link.safetensors").symlink_to(place.base / FIRST)
    place.refuse("does not list 'flag'|does not list 'model.odd'")


def test_shards_whose_names_differ_in_case_only(place):
    for seed, folder in enumerate((place.base, place.tuned)):
        files = sharded(seed)
        text = files[INDEX].replace(FIRST.encode(), b"x.safetensors").replace(SECOND.encode(), b"X.safetensors")
        put(folder, {INDEX: text, "x.safetensors": files[FIRST], "X.safetensors": files[SECOND]})
    # Where case does not count, the one has replaced the other.
    assert place.use() == (len(os.listdir(place.base)) == 3)


def test_the_witness_sees_what_it_should(place):
    """Else the tests above could not fail."""
    inside, outside = place.base / "config.json", place.outside / SINGLE
    native = [lambda: safe_open(outside, "pt"), lambda: safe_open(SINGLE, "pt")] if sys.platform == "linux" else []
    others = [
        *(lambda: outside.read_bytes(), lambda: os.listdir(place.outside), lambda: Path("../stray").touch()),
        *(inside.touch, lambda: Path("/dev/null").read_bytes(), lambda: pickle.loads(pickle.dumps(Path))),
    ]
    for act in native + others:
        with pytest.raises(AssertionError), place.witness.watching():
            act()
    with place.witness.watching():
        inside.read_bytes()
        safe_open(place.base / SINGLE, "pt")
        (place.out / "new").touch()
