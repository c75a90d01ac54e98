"""A rollout worker for reinforcement learning on mixture-of-experts language models."""

from rollout.config import RolloutConfig
from rollout.errors import (
    ConfigError,
    DeadlineExceeded,
    FleetNotFound,
    HostDied,
    HostFailed,
    HostGone,
    RolloutError,
)
from rollout.fleet import Fleet
from rollout.request import Completion, FinishReason, Prompt, SamplingParams, Score, VersionSpan
from rollout.status import FleetStatus, HostStatus

__all__ = [
    "Completion",
    "ConfigError",
    "DeadlineExceeded",
    "FinishReason",
    "Fleet",
    "FleetNotFound",
    "FleetStatus",
    "HostDied",
    "HostFailed",
    "HostGone",
    "HostStatus",
    "Prompt",
    "RolloutConfig",
    "RolloutError",
    "SamplingParams",
    "Score",
    "VersionSpan",
]
