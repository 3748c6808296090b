"""A checked plan on its way to the disk: files are written one after the other, then folders get their names.

Until then everything is in a work folder. At the end every output gets its sidecar files, manifest and card, and last
its name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fused_merge._version import __version__
from fused_merge.checkpoints import folders
from fused_merge.checkpoints.checksum import HASH, PIECE, verify_file
from fused_merge.checkpoints.engine import Resources, Written, write_file
from fused_merge.checkpoints.options import RunOptions
from fused_merge.checkpoints.plan import OutputFile
from fused_merge.checkpoints.work_folder import WorkFolder
from fused_merge.io.configs import declared_but_missing
from fused_merge.io.files import check_unchanged, stamp_of
from fused_merge.io.formats import ADAPTER_FILE
from fused_merge.io.sources import INDEX_FILE, SINGLE_FILE, FileSource
from fused_merge.io.writer import sync_folder, write_whole, writing
from fused_merge.names import some
from fused_merge.options import documented, resolve
from fused_merge.progress import progress_bar

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger("fused_merge")

# Files that are open beside inputs and outputs: the lock, a journal, a folder.
_SPARE_HANDLES = 16


class GlobalPass(Protocol):
    """Completes the rules of files with what whole tensors decide."""

    def bytes_read(self, files: Sequence[OutputFile], mine: Sequence[OutputFile]) -> int:
        """Return the bytes that this reads before `mine` of all files are written."""

    def complete(
        self, files: Sequence[OutputFile], file: OutputFile, resources: Resources, advance: Callable[[int], None]
    ) -> OutputFile:
        """Return one of all files with rules that know all they need."""


class Output(NamedTuple):
    """One folder that a job writes."""

    folder: Path  # its final name
    recipe: Mapping[str, Any]  # how to make it again, as the manifest says it
    title: str
    text: str  # of the card
    beside: folders.Beside  # all else that goes along
    library: str = "transformers"  # that loads it, as the card says


class Job:
    """Everything that is to be written, verified against the inputs and the disk before the first byte."""

    def __init__(
        self,
        operation: str,  # what the progress bar says
        targets: Sequence[Output],
        sources: Sequence[FileSource],
        files: Sequence[OutputFile],  # the weights of each output
        *,
        work: Path,  # where everything is until it is finished
        options: Mapping[str, Any],  # `PlanOptions`, resolved
        whole_tensor_pass: GlobalPass | None = None,  # for methods that look at whole tensors first
    ) -> None:
        self.operation, self._targets, self.files = operation, targets, files
        self._overwrite, self.whole_tensor_pass = options["overwrite"], whole_tensor_pass
        self.outputs = [output.folder for output in targets]
        # Other files of each output by path in it: where they are, or what they hold.
        self._beside = [dict(output.beside.files) for output in targets]
        self.left_behind = {path: why for output in targets for path, why in output.beside.left.items()}
        if len({file.name for file in files} | {SINGLE_FILE, ADAPTER_FILE}) > 2:
            index = next((source.index for source in sources if source.index is not None), None) or {}
            metadata = {**index.get("metadata", {}), "total_size": sum(file.nbytes for file in files)}
            weight_map = {name: file.name for file in files for name in file.entries}
            content = _index_text({**index, "metadata": metadata}, weight_map).encode()
            for beside in self._beside:
                beside[INDEX_FILE] = content
        # Of every file that is read: of weights as they were when their headers were.
        self._stamps = {path: stamp for source in sources for path, stamp in source.stamps.items()}
        self._stamps |= {path: stamp_of(path) for path in self._copied()}
        sizes = {file.key: file.size for file in files}
        self._work_folder = WorkFolder(work, json.dumps(self.identity).encode(), self.outputs, sizes)
        for folder in self.outputs:
            self._check_name(folder)
            if held := next((path for path in self._stamps if folder.resolve() in path.resolve().parents), None):
                raise ValueError(f"{folder} holds the input {held}, which it would replace; choose another folder")
        self._check_space()
        self._check_handles()
        self._warn()

    @cached_property
    def identity(self) -> str:
        """SHA-256 over recipes, layout and inputs: jobs of one identity write the same bytes."""
        beside = [
            [[name, str(each.absolute()) if isinstance(each, Path) else _sha256(each)] for name, each in own.items()]
            for own in self._beside
        ]
        content = [
            __version__,
            [HASH, PIECE],
            [[output.folder.name, output.recipe] for output in self._targets],
            [[file.key, _sha256(file.header)] for file in self.files],
            [[str(path.absolute()), *stamp] for path, stamp in self._stamps.items()],
            beside,
        ]
        return _sha256(json.dumps(content).encode())

    @property
    def bytes_read(self) -> int:
        """Bytes of the inputs, each counted once."""
        return sum(segment.bytes_read for file in self.files for segment in file.segments)

    @property
    def bytes_written(self) -> int:
        """Bytes of all outputs together."""
        contents = (each for own in self._beside for each in own.values())
        sizes = (each.stat().st_size if isinstance(each, Path) else len(each) for each in contents)
        return sum(len(self._holders(file)) * file.size for file in self.files) + sum(sizes)

    def describe(self) -> dict[str, Any]:
        """Return the plan in plain numbers and strings."""
        return {
            "operation": self.operation,
            "outputs": [str(folder) for folder in self.outputs],
            "files": [
                {"path": str(folder / file.name), "bytes": file.size}
                for folder in self.outputs
                for file in self.files
                if file.only in (None, folder.name)
            ],
            "tensors": len({name for file in self.files for name in file.entries}),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "left_behind": self.left_behind,
        }

    @documented(RunOptions)
    def run(self, **options: Unpack[RunOptions]) -> list[Path]:
        """Write everything and return the folders; go on where a killed run of the same job ended.

        Args:
            {options}

        Raises:
            ValueError: if an option is out of range, an unfinished job of another recipe is in the way, or what was
                read again is not what was written.
            OSError: if an input vanished or changed, an output cannot be written, or its folder came to be while this
                ran. Files that were finished stay in the work folder.
            RuntimeError: if another process writes to the same place, or `impl` cannot run on `device`.
        """
        given = resolve(options, RunOptions)
        resources = Resources.of(given["threads"], given["max_memory"], given["device"], given["impl"])
        if not self._is_done():
            with self._work_folder.held():
                # Another process may have finished it meanwhile.
                if not self._is_done():
                    self._work_folder.enter(filter(self._is_finished, self.outputs), overwrite=self._overwrite)
                    self._write_files(resources, progress=given["progress"])
                    self._finish(verify=given["verify"])
                    return self.outputs
        with suppress(OSError, RuntimeError):
            self._work_folder.tidy()
        for folder in self.outputs if given["verify"] else ():
            folders.verify_checkpoint(folder)
        return self.outputs

    def _is_done(self) -> bool:
        begun = self._work_folder.plan() == self._work_folder.identity
        return not self._overwrite and not begun and all(map(self._is_finished, self.outputs))

    def _is_finished(self, folder: Path) -> bool:
        return folders.made_by(folder) == self.identity

    def _write_files(self, resources: Resources, *, progress: bool) -> None:
        """Write all files that the journal does not have."""
        whole = self._work_folder.journal()
        missing = [file for file in self.files if file.key not in whole]
        total = sum(len(self._holders(file)) * file.size for file in missing)
        if self.whole_tensor_pass is not None:
            total += self.whole_tensor_pass.bytes_read(self.files, missing)
        with progress_bar(self.operation, total, enabled=progress) as advance:
            for file in missing:
                check_unchanged(self._stamps)
                if self.whole_tensor_pass is not None:
                    file = self.whole_tensor_pass.complete(self.files, file, resources, advance)
                paths = [self._work_folder.staging(folder) / file.name for folder in self._holders(file)]
                written = write_file(file, paths, resources, advance)
                # Nothing that was read while it changed goes into the journal.
                check_unchanged(self._stamps)
                write_whole(self._work_folder.entry(file.key), json.dumps(written).encode())

    def _finish(self, *, verify: bool) -> None:
        """Complete every output that has not got its name yet, and rename it."""
        check_unchanged({path: self._stamps[path] for path in self._copied()})
        journal, unnamed = self._work_folder.journal(), self._work_folder.unnamed
        for i, output in enumerate(self._targets):
            if output.folder in unnamed:
                self._complete(i, self._written_to(i, journal), verify=verify)
            elif verify:
                folders.verify_checkpoint(output.folder)
        try:
            for folder in unnamed:
                self._check_name(folder)
                self._work_folder.rename(folder)
        finally:
            self._work_folder.restore()
        self._work_folder.remove()
        if odd := _not_finite(journal):
            logger.warning("%s: written with %s", some(map(str, self.outputs)), self._told(odd))

    def _told(self, counts: Mapping[str, Sequence[int]]) -> str:
        """Say which elements of merged tensors are not finite, and why."""
        dtypes = {name: entry.dtype for file in self.files for name, entry in file.entries.items()}
        inputs, large = ([(name, own[k]) for name, own in counts.items() if own[k]] for k in (0, 1))
        said = []
        if inputs:
            listed = some(f"{count} of {name!r}" for name, count in inputs)
            said.append(f"{listed}, where an input is NaN or infinite (check the checkpoints)")
        if large:
            listed = some(f"{count} of {name!r} in {dtypes[name]}" for name, count in large)
            said.append(f"{listed}, which the result is too large for (write dtype='float32')")
        return f"elements that are not finite: {'; '.join(said)}"

    def _holders(self, file: OutputFile) -> list[Path]:
        """Return the outputs that have a file."""
        return [folder for folder in self.outputs if file.only in (None, folder.name)]

    def _written_to(self, i: int, journal: Mapping[str, Written]) -> dict[str, Written]:
        """Return what is known of the files of one output, and of no other."""
        own = {}
        for file in self.files:
            if self.outputs[i] in (holders := self._holders(file)):
                k, (digests, not_finite) = holders.index(self.outputs[i]), journal[file.key]
                own[file.key] = Written([digests[k]], {name: [counts[k]] for name, counts in not_finite.items()})
        return own

    def _complete(self, i: int, whole: Mapping[str, Written], *, verify: bool) -> None:
        """Give an output all that belongs beside its weights; `whole` is what is known of its files."""
        output = self._targets[i]
        folder = self._work_folder.staging(output.folder)
        digests, odd = {key.rpartition("/")[2]: own.digests[0] for key, own in whole.items()}, _not_finite(whole)
        for key, (file, expected) in zip(whole, digests.items(), strict=True) if verify else ():
            try:
                verify_file(folder / file, expected)
            except ValueError:
                # The next run writes it anew.
                self._work_folder.entry(key).unlink(missing_ok=True)
                raise
        # What is written into a folder synchronizes that one alone.
        inner = {place for name in self._beside[i] for place in (folder / name).parents if folder in place.parents}
        beside = {
            **self._beside[i],
            folders.CARD: folders.card(
                output.title,
                output.text + (f" It holds {self._told(odd)}." if odd else ""),
                output.recipe,
                output.library,
            ),
            folders.MANIFEST: folders.manifest(output.recipe, self.identity, digests, odd),
        }
        for name, content in beside.items():
            write_whole(folder / name, content)
        for place in inner:
            with writing(place):
                sync_folder(place)

    def _copied(self) -> list[Path]:
        """Return the files that are copied to outputs."""
        return [each for own in self._beside for each in own.values() if isinstance(each, Path)]

    def _warn(self) -> None:
        """Say what stays behind, and what configurations declare that is not written."""
        if self.left_behind:
            # First what somebody may miss.
            listed = sorted(self.left_behind.items(), key=lambda each: each[1] in folders.STAYS)
            named = some((f"{path} ({why})" for path, why in listed), 8)
            logger.warning("of what stands beside the weights stays behind: %s; copy what the outputs need", named)
        names = {name for file in self.files for name in file.entries}
        missing = {each: None for output in self._targets for each in declared_but_missing(output.beside.config, names)}
        if missing:
            logger.warning(
                "the config.json of an output declares %s, but no tensor that is written belongs to it; write it with "
                "unmatched='copy' if a model holds it, or correct the file",
                ", ".join(missing),
            )

    def _check_name(self, folder: Path) -> None:
        """Verify that a folder may be replaced, if there is one."""
        if folder.exists() and not self._is_finished(folder) and not (self._overwrite and folder.is_dir()):
            raise FileExistsError(f"{folder} exists; pass overwrite=True to replace a folder, or choose another")

    def _check_handles(self) -> None:
        """Verify that this process may open as many files as are written at once."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        inputs = max(len(file.inputs) for file in self.files)
        needed = len(os.listdir("/dev/fd")) + len(self._targets) + inputs + _SPARE_HANDLES
        if needed > limit != resource.RLIM_INFINITY:
            raise OSError(
                f"{len(self._targets)} outputs at once need {needed} open files, of which this process may have "
                f"{limit}; allow more with `ulimit -n {needed}`, or write fewer outputs at once"
            )

    def _check_space(self) -> None:
        """Verify that the disk can be written to and holds what is still to be written."""
        if not self._overwrite and all(map(self._is_finished, self.outputs)):
            return
        out = self._work_folder.path.parent
        for path in (out, self._work_folder.path):
            place = next(place for place in (path, *path.absolute().parents) if place.exists())
            if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
                raise OSError(f"cannot write to {out}: {place} is not a folder that you may write to; choose another")
        needed, free = self.bytes_written - self._work_folder.size, shutil.disk_usage(place).free
        if free < needed:
            room = f"{needed / 1e9:.3g} GB of {free / 1e9:.3g} GB free"
            raise OSError(f"{out} needs {room}; make room or write less at once")


def _not_finite(journal: Mapping[str, Written]) -> dict[str, list[int]]:
    """Return the counts of `Written` of the tensors, the largest of all outputs, where there are any."""
    tensors: dict[str, list[list[int]]] = {}
    for written in journal.values():
        for name, own in written.not_finite.items():
            tensors.setdefault(name, []).extend(own)
    found = {name: [max(counts) for counts in zip(*own, strict=True)] for name, own in tensors.items()}
    return {name: counts for name, counts in found.items() if any(counts)}


def _index_text(content: Mapping[str, Any], weight_map: Mapping[str, str]) -> str:
    """Return an index as JSON to read; the encoder that indents takes ten times as long over hundreds of thousands."""
    listed = json.dumps(weight_map, sort_keys=True, separators=(",\n    ", ": "))
    # Nothing that an index from outside may hold.
    place = _sha256(listed.encode())
    text = json.dumps({**content, "weight_map": place}, indent=2, sort_keys=True)
    return text.replace(f'"{place}"', f"{{\n    {listed[1:-1]}\n  }}") + "\n"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
