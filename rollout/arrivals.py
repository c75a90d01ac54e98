"""How a host takes in what its learner sends, by the configured transport."""

import torch

from rollout.config import RolloutConfig
from rollout.errors import ConfigError
from rollout.machine_memory import available_bytes
from weights.reach import NoReach, Reach

SPARE = 1.25
"""A shadow is kept where the machine has so many times the memory that all of its hosts' shadows take."""


def reach_of(config: RolloutConfig, device: torch.device) -> Reach:
    """What a host on this device can open of its learner.

    Raises:
        ConfigError: the transport is for GPUs and the host has none.
    """
    match config.weights.transport:
        case "cuda_ipc":
            if device.type != "cuda":
                raise ConfigError("weights.transport: cuda_ipc reads device memory, and this host runs on a CPU")
            from weights.transports.cuda_ipc import CudaReach

            return CudaReach(torch.device("cuda", torch.cuda.current_device()))
        case "nccl":
            from weights.transports.nccl import WireReach

            own = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
            return WireReach(own, config.deadlines.message_s)
    return NoReach()


def keeps_shadow(config: RolloutConfig, parameter_bytes: int, available: int | None = None) -> bool:
    """Whether hosts keep a full second copy of an update before they vote: as configured, or where it fits.

    Args:
        config: the fleet's.
        parameter_bytes: of one host.
        available: of this machine's memory; asked of it if None.
    """
    if config.weights.transport != "nccl":
        return False
    if config.weights.shadow is not None:
        return config.weights.shadow
    found = available_bytes() if available is None else available
    return parameter_bytes * config.hosts * SPARE < found
