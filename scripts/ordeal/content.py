"""Weights as a function of a seed: a learner publishes them, and whoever judges works them out again."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from weights.digest import Digest, tensor_digest
from weights.version import WeightVersion


class Content:
    """All tensors of a checkpoint folder under wire names, redrawn from a seed."""

    def __init__(self, folder: Path) -> None:
        self._template = load_file(folder / "model.safetensors")

    def tensors(self, seed: int) -> dict[str, Tensor]:
        """Different in every tensor for different seeds; scaled so that activations stay of order 1."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for name, tensor in self._template.items():
            noise = torch.randn(tensor.shape, generator=generator)
            drawn[name] = (1 + 0.1 * noise if "norm" in name else noise / tensor.shape[-1] ** 0.5).to(tensor.dtype)
        return drawn

    def version(self, run: str, step: int, seed: int) -> WeightVersion:
        """What a host that took them says that it serves."""
        digest = Digest.total(tensor_digest(name, tensor) for name, tensor in self.tensors(seed).items())
        return WeightVersion(run=run, step=step, digest=digest)
