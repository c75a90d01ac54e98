"""StepFolder: one step's weights on disk, and whether they are what version.yaml says."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from weights.digest import ZERO, tensor_digest
from weights.disk.opened import OpenFolder
from weights.disk.reading import read_ahead, read_into
from weights.disk.step_names import step_name
from weights.disk.version_file import MAX_VERSION_FILE_BYTES, VERSION_FILE, VersionFile
from weights.errors import FolderError
from weights.parallel_reader import ParallelReader, Reading
from weights.version import WeightVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFolder:
    """A step folder that `read_step` found sound."""

    path: Path
    version: WeightVersion
    """As version.yaml says; `tensors` and `verify` hold its digest against the content."""
    files: tuple[str, ...]
    names: tuple[str, ...]
    """Wire names of its tensors, in the order in which they are read."""
    bytes: int
    """Of all tensors."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Wire names and tensors, read from the disk some MiB ahead, each into memory of its own.

        Ends in FolderError, after the last tensor, if they are not those that the version's digest is of. Hence a
        publisher, which takes all of them before it tells any host, never offers them; whoever takes them one by one
        has them for good only when the iterator has ended.
        """
        found = ZERO
        with OpenFolder(self.path) as folder:
            for file in folder.tensor_files(self.files):
                for stored, tensor in read_ahead(file, file.tensors):
                    found += tensor_digest(stored.name, tensor)
                    yield stored.name, tensor
        if found != self.version.digest:
            raise FolderError(
                f"{self.path}: its tensors have digest {found}, {VERSION_FILE} says {self.version.digest}: a file was "
                "changed, or belongs to another step; write the step again"
            )

    def read_into(self, targets: Mapping[str, Tensor], reader: ParallelReader) -> Reading:
        """Fills targets, by wire name, as `reading.read_into`.

        The version's digest is not held against them: whoever has them takes theirs, there where they are.
        """
        with OpenFolder(self.path) as folder:
            return read_into(folder, self.files, targets, reader)

    def verify(self) -> None:
        """Reads everything once. FolderError as `tensors`."""
        for _ in self.tensors():
            pass


def read_step(path: Path | str, *, content: bool = True) -> StepFolder:
    """Reads a step folder's version.yaml and the headers of its files, and holds the one against the other.

    content: also reads and hashes all tensors. Without it that is left to `StepFolder.tensors`, which does it as it
    goes: for whoever reads them all anyway.

    Raises:
        FolderError: no such folder, no version.yaml, one that is malformed or names another step than the folder,
            files that are missing, broken, links or elsewhere, a digest of other content. One error that says which.
    """
    path = Path(os.path.abspath(path))
    with OpenFolder(path) as folder:
        said = _version_file(folder)
        here = [stored for _, stored in folder.stored(said.files)]
    step = StepFolder(
        path=path,
        version=said.version,
        files=said.files,
        names=tuple(stored.name for stored in here),
        bytes=sum(stored.bytes for stored in here),
    )
    if content:
        step.verify()
    return step


def _version_file(folder: OpenFolder) -> VersionFile:
    try:
        said = VersionFile.parse(folder.read_small(VERSION_FILE, MAX_VERSION_FILE_BYTES))
    except ValueError as error:
        raise FolderError(f"{folder.path / VERSION_FILE}: {error}") from error
    name = folder.path.name
    # A folder may be exported under a name of its own, but none may claim one step and hold another.
    if name.startswith("step-") and name != step_name(said.version.step):
        raise FolderError(
            f"{folder.path / VERSION_FILE}: is of step {said.version.step}, which belongs into "
            f"{step_name(said.version.step)}, not {name}"
        )
    return said
