"""The engine: step() = schedule, forward, sample, append."""

from rollout.engine.engine import Engine

__all__ = ["Engine"]
