"""OpenFolder: the files of one folder, opened by descriptor so that no name can lead out of it."""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from weights.disk.tensor_file import StoredTensor, TensorFile
from weights.errors import FolderError


class OpenFolder:
    """An open folder. Names given to it are plain names; links are followed only where it is said."""

    def __init__(self, path: Path | str, *, follow_links: bool = False) -> None:
        """FolderError if there is no such folder, or it is a link and links are not followed."""
        self.path = Path(path)
        self._follow_links = follow_links
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        if not follow_links and self.path.is_symlink():
            raise FolderError(f"{path}: is a symbolic link; give the folder that it points to")
        try:
            self._descriptor = os.open(self.path, flags if follow_links else flags | os.O_NOFOLLOW)
        except OSError as error:
            raise FolderError(f"{path}: cannot be opened as a folder: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def has(self, name: str) -> bool:
        """Whether there is an entry of this name, of whatever kind."""
        try:
            os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except OSError:
            return False
        return True

    @contextmanager
    def open(self, name: str) -> Iterator[int]:
        """A descriptor of a regular file. FolderError if there is none of this name."""
        path = self.path / name
        # Not blocking: to open a fifo would wait for its writer.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if self._follow_links else os.O_NOFOLLOW)
        try:
            if not self._follow_links and stat.S_ISLNK(self._status(name).st_mode):
                raise FolderError(f"{path}: is a symbolic link; put the file itself there")
            descriptor = os.open(name, flags, dir_fd=self._descriptor)
        except OSError as error:
            raise FolderError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise FolderError(f"{path}: is not a file")
            yield descriptor
        finally:
            os.close(descriptor)

    def read_small(self, name: str, limit: int) -> bytes:
        """The bytes of a file, at most one more than `limit` of them. FolderError if it cannot be read."""
        with self.open(name) as descriptor:
            data = b""
            try:
                while len(data) <= limit and (part := os.read(descriptor, limit + 1 - len(data))):
                    data += part
            except OSError as error:
                raise FolderError(f"{self.path / name}: cannot be read: {error.strerror}") from error
        return data

    def stored(self, files: Sequence[str]) -> Iterator[tuple[TensorFile, StoredTensor]]:
        """All tensors of these files, each with the open file to read it from.

        FolderError for a file that is missing or broken, and for tensors that stand in two of them.
        """
        for file in self.tensor_files(files):
            for stored in file.tensors:
                yield file, stored

    def tensor_files(self, files: Sequence[str]) -> Iterator[TensorFile]:
        """These files, each open until the next one comes. FolderError as `stored`."""
        seen: set[str] = set()
        for name in files:
            with self.open(name) as descriptor:
                yield self._tensor_file(name, descriptor, seen)

    @contextmanager
    def opened(self, files: Sequence[str]) -> Iterator[list[TensorFile]]:
        """These files, all open at once. FolderError as `stored`."""
        seen: set[str] = set()
        with ExitStack() as stack:
            yield [self._tensor_file(name, stack.enter_context(self.open(name)), seen) for name in files]

    def _tensor_file(self, name: str, descriptor: int, seen: set[str]) -> TensorFile:
        file = TensorFile(descriptor, str(self.path / name))
        twice = [stored.name for stored in file.tensors if stored.name in seen]
        if twice:
            raise FolderError(f"{self.path / name}: holds tensors that another file holds: {', '.join(twice)}")
        seen.update(stored.name for stored in file.tensors)
        return file

    def _status(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
