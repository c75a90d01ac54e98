"""A rollout worker for reinforcement learning on mixture-of-experts language models."""

from rollout.config import RolloutConfig
from rollout.errors import (
    ConfigError,
    DeadlineExceeded,
    FleetNotFound,
    HostDied,
    HostFailed,
    HostGone,
    QueueFull,
    RolloutError,
    VersionTooOld,
)
from rollout.fleet import Fleet
from rollout.request import Completion, DiscardedKv, FinishReason, Prompt, SamplingParams, Score, VersionSpan
from rollout.status import FleetStatus, HostStatus

__all__ = [
    "Completion",
    "ConfigError",
    "DeadlineExceeded",
    "DiscardedKv",
    "FinishReason",
    "Fleet",
    "FleetNotFound",
    "FleetStatus",
    "HostDied",
    "HostFailed",
    "HostGone",
    "HostStatus",
    "Prompt",
    "QueueFull",
    "RolloutConfig",
    "RolloutError",
    "SamplingParams",
    "Score",
    "VersionSpan",
    "VersionTooOld",
]
