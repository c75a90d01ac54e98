"""Reads a Hugging Face checkpoint folder into hosted parameters, in place.

config.json, and model.safetensors or its shards with model.safetensors.index.json. Every tensor is checked before the
first byte is written.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rollout.errors import RolloutError
from rollout.model.spec import DecoderSpec
from weights.disk.opened import OpenFolder
from weights.disk.tensor_file import SAFETENSORS_DTYPES, StoredTensor, TensorFile
from weights.dtypes import dtype_name, fits
from weights.errors import FolderError
from weights.naming import HostedLayout, HostedSlice
from weights.parallel_reader import ParallelReader, Wanted

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class CheckpointError(RolloutError):
    """A checkpoint folder cannot be read, or does not hold the model that its config describes; names all offenders."""


def read_config(folder: Path | str) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    return read_json_object(Path(folder) / "config.json")


def read_json_object(path: Path) -> dict[str, Any]:
    """The content of a file of the checkpoint, such as config.json.

    Raises:
        CheckpointError: there is no such file, or it is no JSON object.
    """
    content = _read_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {json.dumps(content)[:80]}")
    return content


def load_checkpoint(
    folder: Path | str, spec: DecoderSpec, layout: HostedLayout, parameters: Mapping[str, Tensor]
) -> dict[str, torch.dtype]:
    """Copies all tensors of a checkpoint into their places; a narrower dtype is widened where that is exact.

    Tensors of multi-token-prediction layers are left out, and a tied lm_head.weight that equals the embedding.

    Args:
        folder: the checkpoint.
        spec: the decoder that its config describes.
        layout: where its tensors lie.
        parameters: written in place, on whatever device they are.

    Returns:
        The dtype of every hosted tensor in the checkpoint, by its name there.

    Raises:
        CheckpointError: a file is missing or broken, or tensors are missing, unknown, of a wrong shape, or of a dtype
            that the hosted one does not widen exactly; nothing has been written then. Or a file cannot be read to its
            end.
    """
    folder = Path(folder)
    extra = tuple(f"model.layers.{len(spec.layers) + offset}." for offset in range(spec.extra_layers))
    with ExitStack() as stack:
        where: dict[str, tuple[TensorFile, StoredTensor]] = {}
        faults: list[str] = []
        for path in _files(folder):
            file = _open(path, stack)
            for stored in file.tensors:
                if stored.name in where:
                    faults.append(f"{stored.name}: stands in more than one file")
                if not stored.name.startswith(extra):
                    where[stored.name] = file, stored
        faults += _faults({name: stored for name, (_, stored) in where.items()}, layout)
        if faults:
            raise CheckpointError(
                f"{folder} does not hold the model that its config.json describes "
                f"({spec.architecture}, {dtype_name(spec.dtype)}):\n  " + "\n  ".join(faults)
            )
        try:
            for alias, name in layout.tied.items():
                if alias in where and not torch.equal(_read(*where[alias]), _read(*where[name])):
                    raise CheckpointError(
                        f"{folder}: {alias} differs from {name}, and config.json says tie_word_embeddings; "
                        "set it to false"
                    )
            ParallelReader(next(iter(parameters.values())).device).read(
                Wanted(where[name][0], where[name][1].start, where[name][1].dtype, block)
                for name, block in layout.state_dict(parameters)
            )
        except FolderError as error:
            raise CheckpointError(str(error)) from error
        return {name: where[name][1].dtype for name in layout}


def _open(path: Path, stack: ExitStack) -> TensorFile:
    """Open as long as the stack is."""
    try:
        folder = stack.enter_context(OpenFolder(path.parent, follow_links=True))
        return TensorFile(stack.enter_context(folder.open(path.name)), str(path))
    except FolderError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(f"{path}: cannot be read as safetensors: {reason}") from error


def _read(file: TensorFile, stored: StoredTensor) -> Tensor:
    return file.read(stored)


def _files(folder: Path) -> list[Path]:
    """The files that hold the tensors: the single one, or those that the index names."""
    if (folder / SINGLE_FILE).exists():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).exists():
        raise CheckpointError(f"{folder}: holds neither {SINGLE_FILE} nor {INDEX_FILE}")
    index = _read_json(folder / INDEX_FILE)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(_is_plain_name(file) for file in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX_FILE}: expected weight_map, from tensor names to files of this folder")
    return [folder / file for file in sorted(set(weight_map.values()))]


def _is_plain_name(file: object) -> bool:
    return isinstance(file, str) and Path(file).name == file


def _faults(found: Mapping[str, StoredTensor], layout: HostedLayout) -> Iterable[str]:
    """Everything that keeps these tensors from being hosted, a line each."""
    for name in layout:
        if name not in found:
            yield f"{name}: missing"
    for name, stored in found.items():
        hosted = layout.get(layout.tied.get(name, name))
        if hosted is None:
            yield f"{name}: unknown, the model has no such tensor"
        else:
            yield from _misfits(stored, hosted)


def _misfits(stored: StoredTensor, hosted: HostedSlice) -> Iterable[str]:
    if stored.shape != hosted.shape:
        yield f"{stored.name}: shape {list(stored.shape)}, expected {list(hosted.shape)}"
    if not fits(stored.dtype, hosted.dtype):
        yield (
            f"{stored.name}: dtype {_NAMES[stored.dtype]} cannot be hosted as {dtype_name(hosted.dtype)} "
            "without loss; host the model in the checkpoint's dtype"
        )


_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
