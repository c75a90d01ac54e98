"""The learner's end of a step folder: a step is in its place whole, or it is not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from weights.catalogue import TensorSpec
from weights.digest import ZERO, Digest, tensor_digest
from weights.disk.step_folder import read_step
from weights.disk.step_lock import step_lock, sweep
from weights.disk.step_names import parse_step_name, step_name, step_paths
from weights.disk.version_file import VERSION_FILE, VersionFile
from weights.errors import FolderError, ManifestError
from weights.naming import to_wire
from weights.source import Source, named_pairs
from weights.version import WeightVersion

DEFAULT_FILE_BYTES = 1 << 30


def write_step(
    source: Source, folder: Path | str, *, run: str, step: int, file_bytes: int = DEFAULT_FILE_BYTES
) -> WeightVersion:
    """Writes `source` as the folder of this step, and returns the version that it now holds.

    The tensors go into a hidden folder beside it, are forced to the disk, and take their name as the last thing that
    happens: a reader never sees half of a step, and a writer that fails or dies leaves none. What dead writers left is
    swept. The tensors are copied as they are taken, so that the digest is always of what was written.

    The version equals the one that hosts report when they have taken the step up, unless a tied tensor is written
    twice: one that shares its storage with an earlier one is left out here, and hosts leave out every one that they
    tie.

    Args:
        source: a module, a state dict, or pairs of name and tensor, which are taken one by one.
        folder: where the steps lie; made if only it is missing.
        run: the trainer's run. A restarted learner has a new one.
        step: the trainer's step.
        file_bytes: tensors are collected, in memory, into files of about this size.

    Raises:
        ValueError: no such run or step, a tensor that cannot be sent, a name that comes twice, or no tensor at all.
        FolderError: the step is there already or has another writer, the folder holds later steps of another run, or
            the disk does not take it (full, read-only, gone).
    """
    WeightVersion(run=run, step=step, digest=ZERO)  # refuses a run or a step that no version may have
    if file_bytes <= 0:
        raise ValueError(f"file_bytes: got {file_bytes}, must be above 0")
    folder, target = Path(folder), Path(folder) / step_name(step)
    with ExitStack() as stack:
        with _disk_errors(target):
            _make(folder)
            sweep(folder)
            temporary = stack.enter_context(step_lock(folder, target.name))
            _refuse_to_shadow(folder, run, step)
            temporary.mkdir()
        files: list[str] = []
        digest = ZERO
        for tensors in _batches(source, file_bytes):
            digest += Digest.total(tensor_digest(name, tensor) for name, tensor in tensors.items())
            files.append(f"tensors-{len(files) + 1:05d}.safetensors")
            with _disk_errors(target):
                save_file(tensors, temporary / files[-1])
                _sync(temporary / files[-1])
        if not files:
            raise ValueError(f"step {step} has no tensors: the source is empty")
        version = WeightVersion(run=run, step=step, digest=digest)
        with _disk_errors(target):
            (temporary / VERSION_FILE).write_text(VersionFile(version=version, files=tuple(files)).to_yaml())
            _sync(temporary / VERSION_FILE)
            _sync(temporary)
            os.rename(temporary, target)
    try:
        _sync(folder)
    except OSError as error:
        raise FolderError(f"{target}: is in place, but the disk does not say that it will stay: {error}") from error
    return version


def _batches(source: Source, file_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Contiguous copies on the CPU, in batches of about `file_bytes`."""
    names: set[str] = set()
    batch: dict[str, Tensor] = {}
    size = 0
    with named_pairs(source) as pairs:
        for name, tensor in to_wire(pairs):
            if name in names:
                raise ValueError(f"{name} comes twice; a step holds every tensor once")
            try:
                TensorSpec(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype)
            except ManifestError as error:
                raise ValueError(str(error)) from error
            if batch and size + tensor.nbytes > file_bytes:
                yield batch
                batch, size = {}, 0
            names.add(name)
            batch[name] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
            size += tensor.nbytes
    if batch:
        yield batch


def _make(folder: Path) -> None:
    """The folder of the steps, if only it is missing: a path that is not there at all is a disk that is not."""
    if not folder.is_dir():
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _refuse_to_shadow(folder: Path, run: str, step: int) -> None:
    """FolderError if the step is there, or if nobody would take it up since another run's step is further on."""
    name = step_name(step)
    if os.path.lexists(folder / name):
        raise FolderError(
            f"{folder / name}: is there already, and a step is never replaced; remove it, or write to another folder"
        )
    for later in step_paths(folder):
        if (parse_step_name(later.name) or 0) < step:
            return
        try:
            other = read_step(later, content=False).version
        except FolderError:
            continue  # nobody takes that one up
        if other.run != run:
            raise FolderError(
                f"{folder}: holds {later.name} of run {other.run}, and the highest step is the one that is served: "
                f"{name} of run {run} never would be. Remove the other run's steps, or write to another folder"
            )


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """What the disk says, as a FolderError with what a reader of it needs."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FolderError(
            f"{path}: could not be written, and nothing of it is left there: {error}; {_room(path.parent)}"
        ) from error


def _room(folder: Path) -> str:
    try:
        return f"{folder} has {shutil.disk_usage(folder).free >> 20} MiB free"
    except OSError as error:
        return f"{folder} is out of reach: {error.strerror}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
