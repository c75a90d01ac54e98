"""CheckpointFolder: the safetensors files of a Hugging Face checkpoint, as something to publish."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from weights.disk.opened import OpenFolder
from weights.disk.reading import read_ahead
from weights.disk.version_file import is_file_name
from weights.errors import FolderError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_INDEX_BYTES = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFolder:
    """A checkpoint folder that `read_checkpoint` found sound. Nothing in it says what its content should be."""

    path: Path
    files: tuple[str, ...]
    without: tuple[str, ...]
    """Prefixes of names that are left out."""
    names: tuple[str, ...]
    """Wire names of its tensors, in the order in which they are read."""
    bytes: int
    """Of all tensors that are not left out."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Wire names and tensors, read from the disk some MiB ahead, each into memory of its own.

        FolderError if the folder has changed for the worse since `read_checkpoint`.
        """
        with OpenFolder(self.path, follow_links=True) as folder:
            for file in folder.tensor_files(self.files):
                wanted = [stored for stored in file.tensors if not stored.name.startswith(self.without)]
                for stored, tensor in read_ahead(file, wanted):
                    yield stored.name, tensor


def read_checkpoint(path: Path | str, *, without: tuple[str, ...] = ()) -> CheckpointFolder:
    """Reads the headers of a checkpoint's files: model.safetensors, or those that its index names.

    Links are followed, since the hub's cache is made of them.

    Args:
        path: the folder.
        without: prefixes of names to leave out, such as a multi-token-prediction layer's that hosts do not hold.

    Raises:
        FolderError: no such folder, no such files, or one that is broken.
    """
    with OpenFolder(path, follow_links=True) as folder:
        files = _files(folder)
        here = [stored for _, stored in folder.stored(files) if not stored.name.startswith(without)]
    return CheckpointFolder(
        path=Path(path),
        files=files,
        without=without,
        names=tuple(stored.name for stored in here),
        bytes=sum(stored.bytes for stored in here),
    )


def _files(folder: OpenFolder) -> tuple[str, ...]:
    if folder.has(SINGLE_FILE):
        return (SINGLE_FILE,)
    if not folder.has(INDEX_FILE):
        raise FolderError(
            f"{folder.path}: holds neither {SINGLE_FILE} nor {INDEX_FILE}; give a checkpoint's folder, or a step's"
        )
    path = folder.path / INDEX_FILE
    try:
        index = json.loads(folder.read_small(INDEX_FILE, _MAX_INDEX_BYTES))
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{path}: is not JSON: {error}") from error
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files or not all(is_file_name(file) for file in files.values()):
        raise FolderError(f"{path}: expected weight_map, from names of tensors to .safetensors files of this folder")
    return tuple(sorted(set(files.values())))
