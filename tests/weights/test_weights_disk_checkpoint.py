"""A Hugging Face checkpoint folder as something to publish."""

import os
from pathlib import Path

import pytest
import torch
from checkpoints import perturb_, qwen3_config, save, tiny_model

from weights.disk import read_checkpoint
from weights.errors import FolderError
from weights.naming import to_wire


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_it_gives_the_tensors_that_save_pretrained_wrote(tmp_path: Path, sharded: bool) -> None:
    model = tiny_model(qwen3_config(), 1)
    perturb_(model, 7)
    found = read_checkpoint(save(model, tmp_path / "model", sharded=sharded))
    assert (len(found.files) > 1) == sharded
    state = dict(to_wire(model.state_dict().items()))
    read = dict(found.tensors())
    assert read.keys() == state.keys() == set(found.names)
    assert all(torch.equal(read[name], state[name]) for name in state)
    assert found.bytes == sum(tensor.nbytes for tensor in state.values())


def test_names_under_a_prefix_are_left_out(tmp_path: Path) -> None:
    model = tiny_model(qwen3_config(), 1)
    folder = save(model, tmp_path / "model", sharded=True)
    found = read_checkpoint(folder, without=("model.layers.1.",))
    assert set(found.names) == {
        name for name, _ in to_wire(model.state_dict().items()) if not name.startswith("model.layers.1.")
    }
    assert tuple(name for name, _ in found.tensors()) == found.names


def test_links_are_followed_as_the_hubs_cache_has_them(tmp_path: Path) -> None:
    blobs = save(tiny_model(qwen3_config(), 1), tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    os.symlink(blobs / "model.safetensors", tmp_path / "snapshot" / "model.safetensors")
    os.symlink(tmp_path / "snapshot", tmp_path / "main")
    assert read_checkpoint(tmp_path / "main").names == read_checkpoint(blobs).names


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "holds neither model.safetensors nor model.safetensors.index.json"),
        ({"model.safetensors": b"x"}, "model.safetensors: not a whole safetensors file"),
        ({"model.safetensors.index.json": b"{"}, "is not JSON"),
        ({"model.safetensors.index.json": b"[1]"}, "expected weight_map"),
        ({"model.safetensors.index.json": b'{"weight_map": {}}'}, "expected weight_map"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../x.safetensors"}}'}, "expected weight_map"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "x.safetensors"}}'},
            "x.safetensors: cannot be opened",
        ),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_one_error(tmp_path: Path, files: dict[str, bytes], says: str) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(FolderError, match=says) as caught:
        read_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="none: cannot be opened as a folder: No such file"):
        read_checkpoint(tmp_path / "none")
