"""A rollout worker for reinforcement learning on mixture-of-experts language models."""

from typing import TYPE_CHECKING

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
from rollout.request import Completion, DiscardedKv, FinishReason, Prompt, SamplingParams, Score, VersionSpan
from rollout.status import FleetStatus, HostStatus

if TYPE_CHECKING:
    from rollout.fleet import Fleet

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


def __getattr__(name: str) -> object:
    """Fleet, once somebody asks for it: it brings Ray along, which a machine that only computes need not have."""
    if name == "Fleet":
        from rollout.fleet import Fleet

        return Fleet
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
