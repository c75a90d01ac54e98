"""A gate's weight out of a checkpoint folder, where it has one. E experts, D hidden."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rollout.model.checkpoint import CheckpointError

NAMES = ("gate.weight", "router.weight", "gate.wg.weight", "router.layer.weight")
"""How gates end in checkpoints; that of a shared expert has one row, and an expert's own has another shape."""


def find_gate_weight(folder: Path, num_experts: int) -> tuple[str, Tensor] | None:
    """The name and the weight [E, D] of the first gate in the folder's safetensors; None where there is none.

    Raises:
        CheckpointError: a file cannot be read.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):
                    if name.endswith(NAMES):
                        shape = file.get_slice(name).get_shape()
                        if len(shape) == 2 and shape[0] == num_experts:
                            return name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error
    return None
