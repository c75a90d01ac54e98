"""From a fleet's configuration to the choices that the model takes: whose routing, which gate, which dtype, where it
runs."""

import torch

from rollout.config import RolloutConfig
from rollout.model.hf_config import DtypeChoice
from rollout.model.router import Hosting

_DTYPES: dict[str, DtypeChoice] = {"checkpoint": "checkpoint", "float32": torch.float32, "bfloat16": torch.bfloat16}


def hosting_of(config: RolloutConfig, device: torch.device) -> Hosting:
    """The model's choices.

    With RL mode off the gate follows the checkpoint's dtype, as the trainer's own module does.
    """
    assert config.rl_mode is not None, "resolve_rl_mode comes first"
    return Hosting(
        trainer=config.trainer,
        gate=config.gate if config.rl_mode else "trainer",
        dtype=_DTYPES[config.dtype],
        platform="cuda" if device.type == "cuda" else "cpu",
        topk_reduce_func=config.topk_reduce_func,
        certify=config.rl_mode,
    )


def uses_gpu(device: str) -> bool:
    """Whether a host configured like this runs on a GPU."""
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())
