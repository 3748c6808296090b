"""Where a job keeps what is unfinished, until its outputs get their names.

* `lock`: held by the one process that may write here;
* `plan.json`: the identity of the job, so that no other goes on with it. Made last and removed first: without it,
  whatever else is there is rubbish;
* `outputs/NAME/`: each output, with the files that are whole; gone when the output has its name;
* `journal/FILE.json`: what is known of each whole file, as `Written`; made when the file is on the disk. Of a file of
  one output it is `OUTPUT@FILE.json`;
* `replaced/NAME/`: what had the name of an output before.

A job that was killed finds the files of the journal again and writes the others anew.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fused_merge.checkpoints.checksum import PIECE
from fused_merge.checkpoints.engine import Written
from fused_merge.io.files import explained
from fused_merge.io.headers import load_json
from fused_merge.io.writer import sync_folder, write_whole, writing

logger = logging.getLogger("fused_merge")

# Seconds after which it is said what is waited for.
_PATIENCE = 5.0
# What file systems without locks say, such as NFS without its lock daemon and Lustre mounted without flock.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class WorkFolder:
    """The work folder of one job; there from `held` to `remove`."""

    path: Path
    identity: bytes  # jobs of one identity write the same bytes
    outputs: Sequence[Path]  # final names of R folders, in the order of digests
    sizes: Mapping[str, int]  # `OutputFile.key` of each file -> its bytes

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make and lock the folder; on failure say what is finished and kept, or leave nothing if nothing is."""
        handle = self._take_lock()
        try:
            yield
        except BaseException as error:
            plan = self.plan()
            finished = sum(plan == self.identity and self.entry(file).exists() for file in self.sizes)
            if not finished and plan in (None, self.identity):
                with suppress(OSError):
                    self._empty()
            if finished and isinstance(error, OSError) and self.unnamed:
                raise OSError(
                    f"{error}; {finished} of {len(self.sizes)} files are finished and kept in {self.path}: once that "
                    "is mended run the same again to go on, or delete that folder"
                ) from error
            raise
        finally:
            with suppress(OSError):
                (self.path / "lock").unlink(missing_ok=True)
                # Succeeds only where nothing is in it.
                self.path.rmdir()
            os.close(handle)

    def _take_lock(self) -> int:
        path = self.path / "lock"
        while True:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                try:
                    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
                except FileNotFoundError:
                    # Another process has just removed the folder.
                    continue
            try:
                with _patiently(path):
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                why = error.strerror
                if error.errno in _NO_LOCKS:
                    logger.warning("%s cannot be locked (%s): let no second process write to it", self.path, why)
                    return handle
                os.close(handle)
                if isinstance(error, BlockingIOError):
                    busy = f"another process is writing to {self.path}; wait for it, or choose another folder"
                    raise RuntimeError(busy) from None
                raise OSError(f"cannot lock {path}: {why}; choose another folder") from error
            # Whoever held this file before may have removed it, and another process locked a new one.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), path.stat()):
                    return handle
            os.close(handle)

    def staging(self, output: Path) -> Path:
        """Return where an output is until it has its name."""
        return self.path / "outputs" / output.name

    @property
    def unnamed(self) -> list[Path]:
        """The outputs that have not got their names."""
        return [output for output in self.outputs if self.staging(output).is_dir()]

    def plan(self) -> bytes | None:
        """Return the identity of the job that what is here belongs to, None if it is rubbish."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return (self.path / "plan.json").read_bytes()
        return None

    def enter(self, finished: Iterable[Path], *, overwrite: bool) -> None:
        """Go on with what this job left here and has finished, or begin; only `overwrite` drops another job's."""
        plan = self.plan()
        if plan not in (None, self.identity) and not overwrite:
            raise ValueError(
                f"{self.path} is what another job, or this one with other inputs, left unfinished; run that one "
                "again, pass overwrite=True to drop it, or choose another folder"
            )
        # Outputs that are not here must be whole, since they cannot be written to any more.
        named = set(self.outputs) - set(self.unnamed)
        whole = named <= set(finished) and (not named or len(self.journal()) == len(self.sizes))
        if plan != self.identity or not whole:
            with writing(self.path):
                self._empty()
                for folder in (self.path / "journal", *map(self.staging, self.outputs)):
                    folder.mkdir(parents=True)
            write_whole(self.path / "plan.json", self.identity)

    def journal(self) -> dict[str, Written]:
        """Return what is known of the files that are whole; a torn or odd entry does not count, nor a lost file."""
        found = {}
        for file, size in self.sizes.items():
            holders, name = self._holders(file), file.rpartition("/")[2]
            try:
                digests, not_finite = load_json(self.entry(file).read_bytes())
                lengths = [len(own) if all(isinstance(each, str) for each in own) else 0 for own in digests]
                counts = {name: [[int(a), int(b)] for a, b in own] for name, own in not_finite.items()}
                whole = all(
                    (self.staging(output) / name).stat().st_size == size for output in self.unnamed if output in holders
                )
            except (OSError, ValueError, RecursionError, TypeError, AttributeError):
                continue
            whole &= {len(own) for own in counts.values()} <= {len(holders)}
            if whole and lengths == [-(-size // PIECE)] * len(holders):
                found[file] = Written(digests, counts)
        return found

    def entry(self, file: str) -> Path:
        """Return where the journal has what is known of a file."""
        return self.path / "journal" / f"{file.replace('/', '@')}.json"

    def _holders(self, file: str) -> list[Path]:
        """Return the outputs that have a file."""
        only = file.rpartition("/")[0]
        return [output for output in self.outputs if only in ("", output.name)]

    def rename(self, output: Path) -> None:
        """Give an output its name, and move what has that name until then out of the way."""
        with writing(output):
            if output.exists():
                replaced = self.path / "replaced" / output.name
                replaced.parent.mkdir(exist_ok=True)
                output.replace(replaced)
            self.staging(output).replace(output)
            sync_folder(output.parent)

    def restore(self) -> None:
        """Put back what was moved out of the way of outputs that did not come."""
        for folder in (self.path / "replaced").glob("*"):
            if not (place := self.path.parent / folder.name).exists():
                folder.replace(place)

    def tidy(self) -> None:
        """Remove what a run left here that was killed at its very beginning or end."""
        if self.path.is_dir() and self.plan() is None:
            with self.held():
                if self.plan() is None:
                    self.remove()

    def remove(self) -> None:
        """Remove everything but the lock, which goes with the folder when that is left."""
        with explained(f"cannot remove {self.path}", "nothing in it is needed any more, remove it"):
            self._empty()

    def _empty(self) -> None:
        self.restore()
        (self.path / "plan.json").unlink(missing_ok=True)
        sync_folder(self.path)
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    @property
    def size(self) -> int:
        """Bytes of all files here, which another process may be writing."""
        total = 0
        for place, _, names in os.walk(self.path):
            for name in names:
                with suppress(FileNotFoundError):
                    total += os.stat(os.path.join(place, name)).st_size
        return total


@contextmanager
def _patiently(lock: Path) -> Iterator[None]:
    """Say so if the system takes long over a lock that nobody should wait for, as over a network that is down."""
    said = "the file system of %s does not answer whether it can be locked; wait, or press Ctrl-C and choose another"
    timer = threading.Timer(_PATIENCE, logger.warning, (said, lock))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
