"""Who may write a step: one writer at a time, and a dead one's leavings go with its lock.

A step is written into `.step-0000000043.tmp` by whoever holds `.step-0000000043.lock`. The kernel lets go of the lock
when its holder ends, however it ends, so a lock that can be had tells a dead writer from a living one. The lock file is
made before the temporary folder and removed after it: no temporary folder is ever without.
"""

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from weights.disk.step_names import parse_step_name
from weights.errors import FolderError

_OWNER_BYTES = 300


@contextmanager
def step_lock(folder: Path, name: str) -> Iterator[Path]:
    """Holds the lock of the step called `name` and gives the path for its temporary folder.

    What is left at that path in the end is removed. FolderError, naming the holder, if another writer has the lock.
    OSError if the file system refuses.
    """
    lock, temporary = _lock_path(folder, name), _temporary_path(folder, name)
    descriptor = _take(lock)
    if descriptor is None:
        raise FolderError(
            f"{folder / name}: is being written by {_owner(lock)}; a step has one writer, let only one process write it"
        )
    try:
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, owner.encode()[:_OWNER_BYTES], 0)
        shutil.rmtree(temporary, ignore_errors=True)
        yield temporary
    finally:
        _discard(lock, temporary)
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Removes what dead writers left. OSError if the folder cannot be listed."""
    for entry in os.listdir(folder):
        name = entry[1:].removesuffix(".lock")
        if entry != _lock_path(folder, name).name or parse_step_name(name) is None:
            continue
        try:
            descriptor = _take(_lock_path(folder, name))
        except OSError:
            continue  # another user's: not ours to sweep
        if descriptor is not None:
            _discard(_lock_path(folder, name), _temporary_path(folder, name))
            os.close(descriptor)


def _take(lock: Path) -> int | None:
    """A descriptor that holds the lock; None if a living writer has it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, lock):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it between our opening it and our locking it


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _discard(lock: Path, temporary: Path) -> None:
    """Removes both; what cannot be removed now is left for the next sweep, with its lock file."""
    shutil.rmtree(temporary, ignore_errors=True)
    if not os.path.lexists(temporary):
        with suppress(OSError):
            lock.unlink()


def _owner(lock: Path) -> str:
    try:
        return lock.read_text(errors="replace")[:_OWNER_BYTES] or "another process"
    except OSError:
        return "another process"


def _lock_path(folder: Path, name: str) -> Path:
    return folder / f".{name}.lock"


def _temporary_path(folder: Path, name: str) -> Path:
    return folder / f".{name}.tmp"
