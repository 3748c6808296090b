"""A checked plan on its way to the disk: work folder, journal, workers, and the moment when folders get their names.

Until it is finished, everything is in the work folder:

* `plan.json`: the identity of the job, so that nothing else goes on with it. Made last and removed first: without it,
  whatever else is there is rubbish;
* `outputs/LABEL/`: each output, with the files that are whole; gone when the output has its name;
* `journal/FILE.json`: for each whole file the checksums of its tensors; written when the file is on the disk;
* `journal/FILE.lock`: held by the process that writes the file;
* `present.lock`: shared by all processes that write files;
* `gate.lock`: held by the one that makes, finishes or removes the folder.

A job that was killed finds the files of the journal again and writes the others anew. At the end every output gets
its companions, manifest and card, and then its name.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Unpack

from fused_merge._version import __version__
from fused_merge.checkpoints import folders
from fused_merge.checkpoints.disk import sync_folder
from fused_merge.checkpoints.engine import Resources, write_file
from fused_merge.checkpoints.options import RunOptions
from fused_merge.checkpoints.plan import OutputFile
from fused_merge.io.headers import load_json
from fused_merge.io.sources import INDEX_FILE, SINGLE_FILE, FileSource
from fused_merge.io.writer import writing
from fused_merge.options import resolve
from fused_merge.progress import progress_bar

# Files that are open beside inputs and outputs: locks, a journal, a folder.
_SPARE_HANDLES = 16


class GlobalPass(Protocol):
    """Completes the rules of files with what whole tensors decide."""

    def bytes_read(self, files: Sequence[OutputFile], mine: Sequence[OutputFile]) -> int:
        """Return the bytes that this reads before `mine` of all files are written."""

    def complete(
        self, files: Sequence[OutputFile], file: OutputFile, resources: Resources, advance: Callable[[int], None]
    ) -> OutputFile:
        """Return one of all files with rules that know all they need."""


@dataclass(frozen=True)
class Output:
    """One folder that a job writes."""

    folder: Path  # its final name
    recipe: Mapping[str, Any]  # how to make it again, as the manifest says it
    title: str
    text: str  # of the card


@dataclass(frozen=True)
class Job:
    """Everything that is to be written, verified against the inputs and the disk before the first byte.

    Attributes:
        operation: what the progress bar says.
        targets: R folders.
        files: the weights of each output.
        companions: other files of each output, by name.
        stamps: size and time of change of every file that is read.
        work: where everything is until it is finished.
        overwrite: replace folders that exist.
        whole_tensor_pass: for methods that look at whole tensors first.
    """

    operation: str
    targets: Sequence[Output]
    files: Sequence[OutputFile]
    companions: Mapping[str, Path | bytes]
    stamps: Mapping[Path, tuple[int, int]]
    work: Path
    overwrite: bool
    whole_tensor_pass: GlobalPass | None = None

    def __post_init__(self) -> None:
        for output in self.targets:
            self._check_name(output)
            for path in self.stamps:
                if output.folder.resolve() in path.resolve().parents:
                    raise ValueError(
                        f"{output.folder} holds the input {path}, which it would replace; choose another folder"
                    )
        self._check_space()
        self._check_handles()

    @cached_property
    def identity(self) -> str:
        """SHA-256 over recipes, layout and inputs: jobs of one identity write the same bytes."""
        content = [
            __version__,
            [[output.folder.name, output.recipe] for output in self.targets],
            [[file.name, hashlib.sha256(file.header).hexdigest()] for file in self.files],
            [[str(path.absolute()), *stamp] for path, stamp in self.stamps.items()],
            [
                [name, str(content.absolute()) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()]
                for name, content in self.companions.items()
            ],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def outputs(self) -> list[Path]:
        """The folders that it writes."""
        return [output.folder for output in self.targets]

    @property
    def bytes_read(self) -> int:
        """Bytes of the inputs, each counted once."""
        return sum(
            segment.numel * file_range.dtype.itemsize
            for file in self.files
            for segment in file.segments
            for file_range in segment.inputs
        )

    @property
    def bytes_written(self) -> int:
        """Bytes of all outputs together."""
        return len(self.targets) * sum(map(_size, self.files)) + sum(
            len(content) if isinstance(content, bytes) else content.stat().st_size
            for content in self.companions.values()
        ) * len(self.targets)

    def describe(self) -> dict[str, Any]:
        """Return the plan in plain numbers and strings."""
        return {
            "operation": self.operation,
            "outputs": [str(folder) for folder in self.outputs],
            "files": [
                {"path": str(folder / file.name), "bytes": _size(file)}
                for folder in self.outputs
                for file in self.files
            ],
            "tensors": sum(len(file.entries) for file in self.files),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
        }

    def run(self, **options: Unpack[RunOptions]) -> list[Path]:
        """Write everything, or this worker's share of it; go on where a killed run of the same job ended.

        Args:
            worker: (i, n): this process writes the i-th of n shares of the files, 1 <= i <= n. The last to finish
                gives the folders their names.
            threads: that read, compute and write; None is five for every two cores.
            max_memory: of all buffers, in bytes or as in `"256MB"`; None is 80 MiB.
            device: that computes.
            impl: as for `fused_merge.interpolate`.
            verify: read everything from the disk again and compare it with its checksums, before it gets its name; a
                job that was finished before, too.
            progress: show a progress bar where rich is installed and standard error is a terminal.

        Returns:
            The folders; none while other workers still write.

        Raises:
            ValueError: if an option is out of range, an unfinished job of another recipe is in the way, or what was
                read again is not what was written.
            OSError: if an input vanished or changed, an output cannot be written, or its folder came to be while this
                ran. Files that were finished stay in the work folder.
            RuntimeError: if another process writes the same file or another job to the same place, or `impl` cannot
                run on `device`.
        """
        given = resolve(options, RunOptions)
        resources = Resources.of(given["threads"], given["max_memory"], given["device"], given["impl"])
        verify, rewrites, mine = given["verify"], self.overwrite, list(self.files)
        with self._keeping():
            with (
                self._presence(rewrites) as entered,
                progress_bar(self.operation, self._bytes_of(mine), enabled=given["progress"]) as advance,
            ):
                for file in mine if entered else ():
                    self._write_once(file, resources, advance)
            return self._finish(verify) if entered else self._named(verify)

    def _bytes_of(self, mine: Sequence[OutputFile]) -> int:
        """Return the bytes that the progress of some of the files counts."""
        reads = 0 if self.whole_tensor_pass is None else self.whole_tensor_pass.bytes_read(self.files, mine)
        return reads + len(self.targets) * sum(map(_size, mine))

    def _write_once(self, file: OutputFile, resources: Resources, advance: Callable[[int], None]) -> None:
        """Write a file unless the journal has it."""
        with self._locked(f"journal/{file.name}.lock", fcntl.LOCK_EX | fcntl.LOCK_NB) as free:
            if not free:
                raise RuntimeError(
                    f"another process is writing {file.name} in {self.work}; wait for it, or give each process a "
                    "share with worker=(i, n)"
                )
            if self._checksums(file) is None:
                self._write(file, resources, advance)
            else:
                advance(len(self.targets) * _size(file))

    def _write(self, file: OutputFile, resources: Resources, advance: Callable[[int], None]) -> None:
        self._check_inputs(self.stamps)
        paths = [self._part(output) / file.name for output in self.targets]
        completed = file
        if self.whole_tensor_pass is not None:
            completed = self.whole_tensor_pass.complete(self.files, file, resources, advance)
        checksums = write_file(completed, paths, resources, advance)
        # Nothing that was read while it changed goes into the journal.
        self._check_inputs(self.stamps)
        _write_whole(self._journal(file), json.dumps(checksums).encode())

    def _finish(self, verify: bool) -> list[Path]:
        """Complete every output that has not got its name yet, and rename it, unless files are still to be written."""
        with self._gate() as there:
            if not there or self._planned() != self._plan_text:
                # Another worker was faster.
                return self._named(verify)
            if self._all_checksums() is None:
                return []
            # Whoever came late sees that nothing is left to write, and leaves.
            with self._locked("present.lock", fcntl.LOCK_EX):
                checksums = self._all_checksums()
                if checksums is None:
                    return []
                self._check_inputs(content for content in self.companions.values() if isinstance(content, Path))
                unnamed = [output for output in self.targets if self._part(output).is_dir()]
                for i, output in enumerate(self.targets):
                    own = {file: {name: sums[i] for name, sums in found.items()} for file, found in checksums.items()}
                    if output in unnamed:
                        self._complete(output, own, verify)
                    elif verify:
                        folders.verify_checkpoint(output.folder)
                try:
                    for output in unnamed:
                        self._rename(output)
                finally:
                    self._restore()
                self._remove()
        return self.outputs

    def _named(self, verify: bool) -> list[Path]:
        """Return the folders when all have their names, read again if that is wished."""
        if verify:
            for folder in self.outputs:
                folders.verify_checkpoint(folder)
        return self.outputs

    def _complete(self, output: Output, checksums: Mapping[str, Mapping[str, str]], verify: bool) -> None:
        """Give an output all that belongs beside its weights."""
        part = self._part(output)
        if verify:
            for file, expected in checksums.items():
                self._verify(part / file, expected)
        for name, content in self.companions.items():
            _write_whole(part / name, content)
        _write_whole(part / folders.CARD, folders.card(output.title, output.text, output.recipe))
        _write_whole(part / folders.MANIFEST, folders.manifest(output.recipe, self.identity, checksums))

    def _rename(self, output: Output) -> None:
        """Give an output its name, and what has that name until then another."""
        self._check_name(output)
        with writing(output.folder):
            if output.folder.exists():
                replaced = self.work / "replaced" / output.folder.name
                replaced.parent.mkdir(exist_ok=True)
                output.folder.replace(replaced)
            self._part(output).replace(output.folder)
            sync_folder(output.folder.parent)

    def _verify(self, path: Path, expected: Mapping[str, str]) -> None:
        try:
            folders.verify_file(path, expected)
        except ValueError:
            # So that the next run writes it anew.
            (self.work / "journal" / f"{path.name}.json").unlink(missing_ok=True)
            raise

    def _is_finished(self, output: Output) -> bool:
        return folders.made_by(output.folder) == self.identity

    def _part(self, output: Output) -> Path:
        return self.work / "outputs" / output.folder.name

    def _journal(self, file: OutputFile) -> Path:
        return self.work / "journal" / f"{file.name}.json"

    @property
    def _plan(self) -> Path:
        return self.work / "plan.json"

    @property
    def _plan_text(self) -> bytes:
        return json.dumps(self.identity).encode()

    def _planned(self) -> bytes | None:
        """Return the plan that the work folder has, or None."""
        try:
            return self._plan.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _checksums(self, file: OutputFile) -> dict[str, list[str]] | None:
        """Return what the journal has of a file, or None if it is still to be written, for whatever reason."""
        parts = filter(Path.is_dir, map(self._part, self.targets))
        try:
            found: dict[str, list[str]] = load_json(self._journal(file).read_bytes())
            kinds = {name: [type(checksum) for checksum in checksums] for name, checksums in found.items()}
            whole = all((part / file.name).stat().st_size == _size(file) for part in parts)
        except (OSError, ValueError, RecursionError, AttributeError, TypeError):
            return None
        return found if whole and kinds == dict.fromkeys(file.entries, [str] * len(self.targets)) else None

    def _all_checksums(self) -> dict[str, dict[str, list[str]]] | None:
        """Return what the journal has of all files, or None if one is still to be written."""
        found = {file.name: sums for file in self.files if (sums := self._checksums(file)) is not None}
        return found if len(found) == len(self.files) else None

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """On failure, say what is finished, or leave nothing if nothing is."""
        try:
            yield
        except BaseException as error:
            ours = self._planned() == self._plan_text
            finished = sum(ours and self._journal(file).exists() for file in self.files)
            if not finished:
                with suppress(OSError), self._gate() as there:
                    if there and self._planned() in (None, self._plan_text):
                        with self._locked("present.lock", fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
                            if alone:
                                self._remove()
            elif isinstance(error, OSError) and any(self._part(output).is_dir() for output in self.targets):
                raise OSError(
                    f"{error}; {finished} of {len(self.files)} files are finished and kept in {self.work}: once that "
                    "is mended run the same again to go on, or delete that folder"
                ) from error
            raise

    @contextmanager
    def _presence(self, rewrites: bool) -> Iterator[bool]:
        """Make the work folder or enter that of a killed run, and be seen in it; yields whether there is work."""
        with ExitStack() as stack:
            with self._gate(make=not self._is_done(rewrites)) as there:
                entered = not self._is_done(rewrites)
                if entered:
                    self._enter()
                    stack.enter_context(self._locked("present.lock", fcntl.LOCK_SH))
                elif there and self._planned() is None:
                    # What a run left that was killed at its very end.
                    self._remove()
            yield entered

    def _is_done(self, rewrites: bool) -> bool:
        return not rewrites and self._planned() != self._plan_text and all(map(self._is_finished, self.targets))

    def _enter(self) -> None:
        found = self._planned()
        if found not in (None, self._plan_text) and not self.overwrite:
            raise ValueError(
                f"{self.work} is what another job, or this one with other inputs, left unfinished; run that one again, "
                "pass overwrite=True to drop it, or choose another folder"
            )
        if found != self._plan_text or not self._can_go_on():
            with self._locked("present.lock", fcntl.LOCK_EX | fcntl.LOCK_NB) as alone:
                if not alone:
                    raise RuntimeError(
                        f"another process is writing to {self.work}; wait for it, or choose another folder"
                    )
                self._make()

    def _make(self) -> None:
        """Empty the work folder and begin."""
        with writing(self.work):
            self._empty()
            for folder in (self.work / "journal", *map(self._part, self.targets)):
                folder.mkdir(parents=True)
        _write_whole(self._plan, self._plan_text)

    def _can_go_on(self) -> bool:
        """Return whether every output is here or has its name; those that have it cannot be written to any more."""
        named = [output for output in self.targets if not self._part(output).is_dir()]
        whole = not named or self._all_checksums() is not None
        return whole and all(map(self._is_finished, named)) and (self.work / "journal").is_dir()

    def _empty(self) -> None:
        """Remove all but locks from the work folder."""
        self._restore()
        self._plan.unlink(missing_ok=True)
        sync_folder(self.work)
        for path in self.work.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.suffix != ".lock":
                path.unlink()

    def _restore(self) -> None:
        """Put back what was moved out of the way of outputs that did not come."""
        for folder in (self.work / "replaced").glob("*"):
            if not (self.work.parent / folder.name).exists():
                folder.replace(self.work.parent / folder.name)

    def _remove(self) -> None:
        """Remove everything from the work folder, which goes itself when the gate is left."""
        try:
            self._empty()
            (self.work / "present.lock").unlink(missing_ok=True)
            (self.work / "gate.lock").unlink()
        except OSError as error:
            raise OSError(
                f"cannot remove {self.work}: {error.strerror}; nothing in it is needed any more, remove it"
            ) from error

    @contextmanager
    def _gate(self, *, make: bool = False) -> Iterator[bool]:
        """Let one process at a time make, finish or remove the work folder; yields whether there is one.

        Args:
            make: make it if there is none.
        """
        entered = False
        try:
            while not entered and (make or self.work.is_dir()):
                with ExitStack() as stack:
                    if make:
                        with writing(self.work):
                            self.work.parent.mkdir(parents=True, exist_ok=True)
                            with suppress(FileExistsError):
                                self.work.mkdir()
                    with writing(self.work), suppress(FileNotFoundError):
                        gate = stack.enter_context((self.work / "gate.lock").open("ab"))
                        fcntl.flock(gate, fcntl.LOCK_EX)
                        # Whoever held it before may have removed it.
                        entered = os.path.samestat(os.fstat(gate.fileno()), (self.work / "gate.lock").stat())
                    if entered:
                        yield True
            if not entered:
                yield False
        finally:
            # Succeeds only where nothing is in it.
            with suppress(OSError):
                self.work.rmdir()

    @contextmanager
    def _locked(self, name: str, how: int) -> Iterator[bool]:
        """Hold a lock that the operating system releases when its process dies; yields whether it could be had."""
        path = self.work / name
        with ExitStack() as stack:
            with writing(path):
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                stack.callback(os.close, handle)
                try:
                    fcntl.flock(handle, how)
                except BlockingIOError:
                    free = False
                else:
                    free = True
            yield free

    def _check_name(self, output: Output) -> None:
        """Verify that a folder may be replaced, if there is one."""
        folder = output.folder
        if folder.exists() and not self._is_finished(output) and not (self.overwrite and folder.is_dir()):
            raise FileExistsError(f"{folder} exists; pass overwrite=True to replace a folder, or choose another")

    def _check_inputs(self, paths: Iterable[Path]) -> None:
        """Verify that inputs are still those that were planned with."""
        for path in paths:
            try:
                unchanged = stamp_of(path) == self.stamps[path]
            except OSError:
                unchanged = False
            if not unchanged:
                raise OSError(f"{path} vanished or changed after it was looked at; put it back and run the same again")

    def _check_handles(self) -> None:
        """Verify that this process may open as many files as are written at once."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        inputs = max(
            len({file_range.file for segment in file.segments for file_range in segment.inputs}) for file in self.files
        )
        needed = sum(1 for _ in Path("/dev/fd").glob("*")) + len(self.targets) + inputs + _SPARE_HANDLES
        if needed > limit != resource.RLIM_INFINITY:
            raise OSError(
                f"{len(self.targets)} outputs at once need {needed} open files, of which this process may have "
                f"{limit}; allow more with `ulimit -n {needed}`, or write fewer outputs at once"
            )

    def _check_space(self) -> None:
        """Verify that the disk can be written to and holds what is still to be written."""
        if not self.overwrite and all(map(self._is_finished, self.targets)):
            return
        for place in (_existing(self.work.parent), _existing(self.work)):
            if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
                raise OSError(
                    f"cannot write to {self.work.parent}: {place} is not a folder that you may write to; choose another"
                )
        needed, free = self.bytes_written - _bytes_below(self.work), shutil.disk_usage(place).free
        if free < needed:
            raise OSError(
                f"{self.work.parent} needs {needed / 1e9:.3g} GB of {free / 1e9:.3g} GB free; "
                "make room or write less at once"
            )


def job_of(
    operation: str,
    outputs: Sequence[Output],
    sources: Sequence[FileSource],
    config_source: FileSource,
    lay_out: Callable[[int | None], Sequence[OutputFile]],
    *,
    work: Path,
    options: Mapping[str, Any],
    whole_tensor_pass: GlobalPass | None = None,
) -> Job:
    """Put a job together from outputs and checkpoints.

    Args:
        operation: what the progress bar says.
        outputs: folders and recipes.
        sources: the inputs.
        config_source: whose configuration and tokenizer go along.
        lay_out: distributes the tensors over files of at most so many bytes, None as in the inputs.
        work: folder for what is unfinished.
        options: `PlanOptions`, resolved.
        whole_tensor_pass: see `Job`.
    """
    files = lay_out(options["max_shard_size"])
    accompanying = folders.companions(config_source, options["dtype"])
    index = next((source.index for source in sources if source.index is not None), None) or {}
    if len(files) > 1 or files[0].name != SINGLE_FILE:
        about = index.get("metadata")
        content = {
            **index,
            "metadata": {
                **(about if isinstance(about, dict) else {}),
                "total_size": sum(file.nbytes for file in files),
            },
            "weight_map": {name: file.name for file in files for name in file.entries},
        }
        accompanying[INDEX_FILE] = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
    read = [path for source in sources for path in source.files()]
    read += [content for content in accompanying.values() if isinstance(content, Path)]
    stamps = {path: stamp_of(path) for path in read}
    return Job(operation, outputs, files, accompanying, stamps, work, options["overwrite"], whole_tensor_pass)


def stamp_of(path: Path) -> tuple[int, int]:
    """Return the size of a file and when it was changed."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _size(file: OutputFile) -> int:
    return len(file.header) + file.nbytes


def _bytes_below(folder: Path) -> int:
    """Return the bytes of all files in a folder that other processes may be writing to."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def _existing(path: Path) -> Path:
    """Return the path or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _write_whole(path: Path, content: Path | bytes) -> None:
    """Write or copy a small file beside its name, wait for the disk, and rename it."""
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            if isinstance(content, Path):
                shutil.copyfile(content, part)
            else:
                part.write_bytes(content)
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
            sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise
