"""What a configuration would start, worked out without starting anything."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from rollout.config import RolloutConfig, resolve_rl_mode
from rollout.errors import ConfigError
from rollout.hosting import hosting_of, uses_gpu
from rollout.model.checkpoint import read_config
from rollout.model.families import decoder_spec
from rollout.model.spec import DecoderSpec
from weights.disk import read_checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class Prospect:
    """A fleet that could be launched, as far as its configuration and its checkpoint's headers tell."""

    config: RolloutConfig
    """rl_mode resolved, model an absolute path."""
    spec: DecoderSpec
    trainers: DecoderSpec
    """The same with the gate as the trainer computes it."""
    platform: Literal["cpu", "cuda"]
    hints: tuple[str, ...]
    checkpoint_bytes: int
    """Of all tensors in the folder; 0 where none are read."""

    @property
    def max_tokens(self) -> int:
        """Of a prompt and its completion together."""
        return min(self.config.engine.max_context, self.spec.context_length)


def prospect_of(config: RolloutConfig, environ: Mapping[str, str]) -> Prospect:
    """What this configuration would start here.

    Raises:
        ConfigError: configuration and environment contradict each other, or there is no such checkpoint or GPU.
        ValueError: the checkpoint cannot be hosted, or its routing cannot be matched.
        CheckpointError, FolderError: the checkpoint's files are missing or broken.
    """
    rl_mode, hints = resolve_rl_mode(config, environ)
    config = replace(config, rl_mode=rl_mode, model=os.path.abspath(config.model))
    if not Path(config.model).is_dir():
        raise ConfigError(f"model: there is no folder {config.model}; give a Hugging Face checkpoint folder")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda, but PyTorch sees no GPU here; set device: cpu, or install PyTorch for CUDA")
    if config.weights.transport == "cuda_ipc" and not uses_gpu(config.device):
        raise ConfigError(
            "weights.transport: cuda_ipc reads device memory, and the hosts would run on a CPU; "
            "set weights.transport: shared_memory, or run them on GPUs"
        )
    plain = read_config(config.model)
    hosting = hosting_of(config, torch.device("cuda" if uses_gpu(config.device) else "cpu"))
    spec = decoder_spec(plain, hosting)
    if config.engine.max_context > spec.context_length:
        hints += (
            f"engine.max_context={config.engine.max_context} is more than the {spec.context_length} positions that "
            "the model was made for; the KV cache can be smaller",
        )
    return Prospect(
        config=config,
        spec=spec,
        trainers=decoder_spec(plain, replace(hosting, gate="trainer")),
        platform=hosting.platform,
        hints=hints,
        checkpoint_bytes=read_checkpoint(config.model).bytes if config.load == "checkpoint" else 0,
    )
