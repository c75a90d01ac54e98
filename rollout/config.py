"""Every knob of a rollout fleet, from YAML. Imports neither torch nor Ray.

A key that does not exist is an error that names the nearest one that does; so is a value of the wrong type.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from rollout.errors import ConfigError
from rollout.schema import YAML_ERRORS, check_types, from_mapping, load_yaml, require_positive

RL_MODE_VARIABLE = "MOE_ROLLOUT_RL"
FASTDEPLOY_RL_VARIABLE = "FD_ENABLE_RL"
FLEET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What one host may hold and do at once."""

    max_running: int = 64
    """Sequences that run at once; the others wait."""
    max_context: int = 4096
    """Tokens of a prompt and its completion together, at most."""
    block_size: int = 16
    """Tokens per block of the KV cache."""
    kv_blocks: int | None = None
    """Blocks of the KV cache; None takes what max_running sequences of max_context need. Where blocks run out, the
    youngest sequences step back and resume later with the same tokens."""
    prefix_cache: bool = True
    """Find prefixes that were read before under the same version."""
    max_waiting: int = 16384
    """Sequences that wait, at most; beyond it a host takes no more and says so."""
    prefill_chunk: int = 512
    """Prompt tokens per step, at most; they share the step with the sequences that decode."""
    cpu_threads: int = 1
    """PyTorch threads of a host that runs on the CPU."""

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "engine", *(f.name for f in fields(self) if f.name != "prefix_cache"))

    @property
    def blocks(self) -> int:
        """Blocks to allocate."""
        if self.kv_blocks is not None:
            return self.kv_blocks
        return self.max_running * -(-self.max_context // self.block_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsConfig:
    """How fresh weights arrive."""

    transport: Literal["shared_memory", "cuda_ipc", "nccl", "disk"] | None = "shared_memory"
    """shared_memory: learner and hosts on one machine, through its memory. cuda_ipc: the hosts read the learner's
    device memory, on the same GPU or one that reaches it. nccl: broadcast from the learner's GPU to the hosts' (between
    CPUs, by gloo). disk: the learner writes step folders into `folder`, and the process that launched the fleet takes
    them up. None: no learner will ever publish."""
    shadow: bool | None = None
    """With the transport nccl: whether a host keeps a full second copy of an update in its machine's memory before it
    votes. With one, a learner that dies in a commit leaves the old version or the new; without, hosts that serve
    nothing until the next update. None: where it fits."""
    folder: str | None = None
    """Where step folders appear; with the transport disk, and only with it."""
    poll_s: float = 1.0
    """Seconds between two looks into the folder."""
    bucket_mib: int = 256
    """Size of the segments that tensors travel in, in MiB; a larger tensor is sliced."""
    requests_in_flight: Literal["keep", "recompute", "abort"] = "keep"
    """What becomes of running requests at a commit: they go on with the keys and values they have, rebuild them under
    the new version, or end. A request may say otherwise."""

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "weights", "bucket_mib", "poll_s")
        if (self.transport == "disk") != (self.folder is not None):
            raise ConfigError(
                f"weights.folder: got {self.folder!r} with weights.transport {self.transport or 'null'}; "
                "the transport disk needs a folder and no other has one"
            )
        if self.shadow is not None and self.transport != "nccl":
            raise ConfigError(
                f"weights.shadow: got {str(self.shadow).lower()} with weights.transport {self.transport or 'null'}; "
                "only nccl has a choice: remove it"
            )
        if self.folder == "":
            raise ConfigError("weights.folder: got an empty path; give the folder that the learner writes steps into")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadlineConfig:
    """How long to wait before saying what was waited for, in seconds."""

    start_s: float = 300.0
    """For a host to load its checkpoint and report."""
    pause_s: float = 30.0
    """For a running step to end, at a commit."""
    message_s: float = 60.0
    """For a host's answer to one message of a weight update."""
    silence_s: float = 180.0
    """For a sign of the learner during an update, before a host forgets the update or settles it with its siblings;
    more than message_s."""
    progress_s: float = 600.0
    """For the next completion of any host while requests are running."""
    stop_s: float = 20.0
    """For a host to stop."""
    answer_s: float = 30.0
    """For a host's answer to the launcher that watches it; beyond it the host counts as frozen and is started again."""
    torn_s: float = 60.0
    """For an update to heal a torn host, before it is started again."""

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "deadlines", *(f.name for f in fields(self)))
        if self.pause_s >= self.message_s:
            raise ConfigError(
                f"deadlines.pause_s: got {self.pause_s}, must be less than deadlines.message_s={self.message_s}, "
                "or a learner gives up on a host that still waits for its pause"
            )
        if self.silence_s <= self.message_s:
            raise ConfigError(
                f"deadlines.silence_s: got {self.silence_s}, must be more than deadlines.message_s={self.message_s}, "
                "or a host settles under a learner that is still waiting"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """A fleet: which model, whose routing to match, how many hosts.

    Example:
        name: grpo-run-7
        model: checkpoints/Qwen3-30B-A3B
        trainer: transformers
        hosts: 2
    """

    name: str
    """Under which the trainer and the learner find the fleet."""
    model: str
    """A Hugging Face checkpoint folder."""
    trainer: str | Mapping[str, Any] = "transformers"
    """Whose routing and rounding to match, or the router spelled out as a RouterSpec's fields."""
    topk_reduce_func: str | None = None
    """package.module:function, called on the chosen scores instead of the trainer's own normalisation; see
    routing.route."""
    rl_mode: bool | None = None
    """Train-inference consistency. None leaves it to MOE_ROLLOUT_RL, and without that it is on."""
    gate: Literal["fp32", "trainer"] = "fp32"
    """In RL mode: fp32 weights and logits, or computed as the named trainer does."""
    dtype: Literal["checkpoint", "float32", "bfloat16"] = "checkpoint"
    """Of the hosted parameters; the checkpoint's own unless said."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    load: Literal["checkpoint", "random"] = "checkpoint"
    """random: weights are drawn instead of read, the same on every host; the folder needs no more than config.json. To
    measure, or for a learner that publishes before anybody generates."""
    hosts: int = 1
    """Replicas of the model."""
    restarts: int = 5
    """Times within an hour that a host which died, froze, failed or stayed torn is started again; then it is left
    out."""
    gpus_per_host: float = 1.0
    """Share of a GPU that Ray sets aside for a host that runs on one; below 1 leaves room for a learner on the same
    card."""
    metrics_port: int | None = None
    """Where Prometheus reads the metrics of a local Ray that the launch starts; None lets Ray choose."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    deadlines: DeadlineConfig = field(default_factory=DeadlineConfig)

    def __post_init__(self) -> None:
        check_types(self)
        if not FLEET_NAME.fullmatch(self.name):
            raise ConfigError(
                f"name: got {self.name!r}; use 1 to 64 of A-Z a-z 0-9 . _ - with a letter or digit first: "
                "it becomes part of a socket's name"
            )
        if not self.model:
            raise ConfigError("model: got an empty path; give a Hugging Face checkpoint folder")
        require_positive(self, "", "hosts", "gpus_per_host")
        if self.restarts < 0:
            raise ConfigError(f"restarts: got {self.restarts}, must be at least 0")
        if self.metrics_port is not None and not 1 <= self.metrics_port <= 65535:
            raise ConfigError(f"metrics_port: got {self.metrics_port}, must be from 1 to 65535, or null")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "RolloutConfig":
        """Reads a file.

        Raises:
            ConfigError: the file cannot be read, is no YAML mapping, or has keys or values that do not exist; all are
            named.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        try:
            data = load_yaml(content)
        except YAML_ERRORS as error:
            raise ConfigError(f"{path} is not YAML of plain values: {error}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{path}: expected a mapping of keys to values, got {type(data).__name__}")
        return cls.from_mapping(data)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> "RolloutConfig":
        """The same from a mapping as YAML gives it."""
        return from_mapping(cls, data, "configuration")


def resolve_rl_mode(config: RolloutConfig, environ: Mapping[str, str]) -> tuple[bool, tuple[str, ...]]:
    """Whether RL mode is on, and what the user should be told about it.

    Raises:
        ConfigError: config and environment both say something, and not the same; or the variable is neither 0 nor 1.
    """
    hints = []
    if FASTDEPLOY_RL_VARIABLE in environ:
        hints.append(
            f"{FASTDEPLOY_RL_VARIABLE} is FastDeploy's switch and does nothing here: "
            f"set rl_mode in the configuration or {RL_MODE_VARIABLE} (on by default)"
        )
    said = environ.get(RL_MODE_VARIABLE)
    if said is None:
        in_force = True if config.rl_mode is None else config.rl_mode
    elif said not in ("0", "1"):
        raise ConfigError(f"{RL_MODE_VARIABLE}: got {said!r}, must be 0 or 1")
    elif config.rl_mode is not None and config.rl_mode != (said == "1"):
        raise ConfigError(
            f"rl_mode: {str(config.rl_mode).lower()} in the configuration and {RL_MODE_VARIABLE}={said} "
            "in the environment contradict each other; remove one of them"
        )
    else:
        in_force = said == "1"
    if not in_force and config.weights.transport is not None:
        hints.append(
            "RL mode is off and a learner may publish: gates follow the checkpoint's dtype, "
            "so tokens may be routed differently from the trainer's"
        )
    return in_force, tuple(hints)
