"""What an engine has done since it started: numbers that only grow, for whoever watches."""

from collections import Counter
from dataclasses import dataclass, field

from rollout.request import FinishReason
from weights.version import WeightVersion


@dataclass(slots=True)
class Counts:
    """Totals since the start. The scheduler counts preemptions and prefix tokens itself."""

    prompt_tokens: int = 0
    """Of prompts that were read, found prefixes included; once for the samples of a prompt."""
    tokens_by_version: Counter[WeightVersion] = field(default_factory=Counter)
    """Sampled tokens by the version that made them."""
    finished: Counter[FinishReason] = field(default_factory=Counter)
    """Completions by why they ended."""

    @property
    def tokens(self) -> int:
        """Sampled tokens."""
        return self.tokens_by_version.total()
