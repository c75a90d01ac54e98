"""What a host has done since it started: numbers that only grow, for whoever watches."""

from collections.abc import Mapping
from dataclasses import dataclass

from rollout.request import FinishReason
from rollout.updates import UpdateRecord
from weights.version import WeightVersion


@dataclass(frozen=True, kw_only=True, slots=True)
class HostTotals:
    """One host at one moment."""

    tokens_by_version: Mapping[WeightVersion, int]
    """Sampled tokens, by the version that made them."""
    prompt_tokens: int
    """Of prompts that were read, found prefixes included."""
    prefix_tokens: int
    """Of those, found in the prefix cache."""
    preemptions: int
    """Sequences that gave up their KV blocks, to resume later."""
    finished: Mapping[FinishReason, int]
    """Completions by why they ended."""
    updates: int
    """Weight updates committed."""
    update_records: tuple[UpdateRecord, ...]
    """The last of them, oldest first."""
    updates_refused: int
    updates_called_off: int
    torn: int
    """Commits that failed half-way."""
