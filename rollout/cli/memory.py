"""Whether what a configuration needs fits into what this machine has left, asked before anything is started."""

import math
from dataclasses import dataclass

import torch

from rollout.cli.terminal import amount
from rollout.config import RolloutConfig
from rollout.errors import ConfigError
from rollout.machine_memory import available_bytes
from rollout.model.spec import DecoderSpec
from rollout.model.storage import parameter_shapes


@dataclass(frozen=True, kw_only=True, slots=True)
class HostMemory:
    """Bytes that one host allocates when it starts; its process and PyTorch's own buffers come on top."""

    parameters: int
    kv_cache: int

    @property
    def total(self) -> int:
        return self.parameters + self.kv_cache


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """What there is where hosts are to run."""

    bytes: int
    hosts: int
    """That share it."""
    where: str
    """In words."""


def host_memory(config: RolloutConfig, spec: DecoderSpec) -> HostMemory:
    """What one host of this fleet needs."""
    tokens = config.engine.blocks * config.engine.block_size
    return HostMemory(
        parameters=sum(math.prod(shape) * dtype.itemsize for shape, dtype in parameter_shapes(spec).values()),
        kv_cache=2 * len(spec.layers) * tokens * spec.kv_heads * spec.head_dim * spec.dtype.itemsize,
    )


def room(config: RolloutConfig, platform: str) -> Room:
    """The least that any host of this fleet finds on this machine.

    Raises:
        ConfigError: the fleet needs more GPUs than there are.
    """
    if platform == "cpu":
        return Room(bytes=available_bytes(), hosts=config.hosts, where="in this machine's memory")
    count = torch.cuda.device_count()
    per_gpu = max(1, math.floor(1 / config.gpus_per_host))
    if config.hosts > per_gpu * count / max(1.0, config.gpus_per_host):
        raise ConfigError(
            f"hosts: {config.hosts} with gpus_per_host={config.gpus_per_host:g} need more than the {count} GPUs here; "
            "lower one of the two"
        )
    free = min(torch.cuda.mem_get_info(device)[0] for device in range(count))
    return Room(bytes=free, hosts=min(config.hosts, per_gpu), where="on a GPU")


def refuse_shortage(config: RolloutConfig, need: HostMemory, found: Room) -> None:
    """ConfigError, with the knob to turn, where the hosts do not fit."""
    if need.total * found.hosts <= found.bytes:
        return
    each = f"{amount(need.parameters)} of parameters and {amount(need.kv_cache)} of KV cache"
    hosts = f"{found.hosts} hosts need {each} each" if found.hosts > 1 else f"a host needs {each}"
    left = found.bytes // found.hosts - need.parameters
    blocks = left // (need.kv_cache // config.engine.blocks)
    if blocks >= -(-config.engine.max_context // config.engine.block_size):
        knob = f"set engine.kv_blocks to at most {blocks} (now {config.engine.blocks})"
    else:
        fewer = found.bytes // need.total
        knob = f"set hosts to at most {fewer}" if 1 <= fewer < found.hosts else "lower engine.max_context"
        if left <= 0 and not fewer:
            knob = "take a smaller model, dtype: bfloat16, or a machine with more memory"
    raise ConfigError(f"too little memory: {hosts}, and {amount(found.bytes)} are free {found.where}; {knob}")
