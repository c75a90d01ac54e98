"""Reads the tensors of a folder in parallel: into places that there are, or some at a time into memory of their own."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from weights.disk.opened import OpenFolder
from weights.disk.tensor_file import StoredTensor, TensorFile
from weights.dtypes import dtype_name, fits
from weights.errors import FolderError
from weights.parallel_reader import ParallelReader, Reading, Wanted

AHEAD_BYTES = 256 << 20
"""Of tensors that `read_ahead` holds at once, unless a single one is larger."""


def read_into(
    folder: OpenFolder, files: Sequence[str], targets: Mapping[str, Tensor], reader: ParallelReader
) -> Reading:
    """Fills all `targets`, by wire name, with the tensors of these files; what else the files hold is left out.

    A target has the tensor's shape, and its dtype or one that widens it exactly, and is contiguous.

    Raises:
        FolderError: a file is missing or broken, tensors are missing, or do not fit their targets: nothing has been
            written then. Or a file cannot be read to its end: some targets are written.
    """
    with folder.opened(files) as found:
        wanted = [
            (targets[stored.name], file, stored) for file in found for stored in file.tensors if stored.name in targets
        ]
        there = {stored.name for _, _, stored in wanted}
        faults = [f"{name}: missing" for name in targets if name not in there]
        faults += [
            f"{stored.name}: {dtype_name(stored.dtype)} {list(stored.shape)}, "
            f"expected {dtype_name(target.dtype)} {list(target.shape)}"
            for target, _, stored in wanted
            if stored.shape != tuple(target.shape) or not fits(stored.dtype, target.dtype)
        ]
        if faults:
            raise FolderError(f"{folder.path} does not hold what is to be read:\n  " + "\n  ".join(faults))
        return reader.read(Wanted(file, stored.start, stored.dtype, target) for target, file, stored in wanted)


def read_ahead(file: TensorFile, wanted: Sequence[StoredTensor]) -> Iterator[tuple[StoredTensor, Tensor]]:
    """These tensors of a file in their order, some read at once, each in memory of its own.

    FolderError if the file cannot be read.
    """
    reader = ParallelReader("cpu")
    for group in _groups(wanted):
        tensors = [torch.empty(stored.shape, dtype=stored.dtype) for stored in group]
        reader.read(
            Wanted(file, stored.start, stored.dtype, tensor) for stored, tensor in zip(group, tensors, strict=True)
        )
        tensors.reverse()
        for stored in group:
            yield stored, tensors.pop()  # kept by whoever takes it, not here


def _groups(wanted: Sequence[StoredTensor]) -> Iterator[list[StoredTensor]]:
    """In order, each of at most AHEAD_BYTES or a single tensor."""
    group: list[StoredTensor] = []
    size = 0
    for stored in wanted:
        if group and size + stored.bytes > AHEAD_BYTES:
            yield group
            group, size = [], 0
        group.append(stored)
        size += stored.bytes
    if group:
        yield group
