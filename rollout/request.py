"""What crosses between a trainer and a host: prompts and sampling parameters one way, completions the other.

P tokens of the prompt, C sampled tokens, L mixture-of-experts layers, K experts of a token.
"""

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from weights.version import WeightVersion


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Token ids to continue.

    Example:
        Prompt(id="sum-17", token_ids=(1, 7, 9, 2))
    """

    id: str
    """The caller's name for it; comes back in every completion. Unique among what one call of `generate` gets."""
    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError(f"prompt {self.id!r} is empty: give at least one token id")


LEAST_TEMPERATURE = 1e-5
"""Below it logits divided by the temperature overflow fp32; 0 is greedy."""

AtCommit = Literal["keep", "recompute", "abort"]
"""keep: go on with the keys and values at hand. recompute: rebuild them under the new version. abort: end there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to continue a prompt.

    Example:
        SamplingParams(n=8, temperature=1.0, max_tokens=512)
    """

    max_tokens: int
    """Sampled tokens at most, per sample."""
    n: int = 1
    """Samples per prompt."""
    temperature: float = 1.0
    """Divides the logits; 0 is greedy, and the lowest id wins a tie. At least LEAST_TEMPERATURE otherwise."""
    top_k: int | None = None
    """Keep the k likeliest tokens (more where the last of them ties). None keeps all."""
    top_p: float = 1.0
    """Of what top_k kept, keep the likeliest tokens until their mass reaches top_p."""
    seed: int | None = None
    """Random numbers are a function of this, the sample's index, the position and the token. None draws one, and the
    completion tells it."""
    stop_token_ids: tuple[int, ...] = ()
    """Sampling ends with any of these; the token stays in the completion."""
    ignore_eos: bool = False
    """Go on past the checkpoint's end-of-sequence tokens."""
    record_routing: bool = False
    """Return the experts of every token, the prompt's included."""
    return_kept: bool = False
    """Return, per sampled token, the ids that top_k and top_p kept: a trainer can renormalise as the sampler did."""
    at_commit: AtCommit | None = None
    """What becomes of the request at a commit; None leaves it to weights.requests_in_flight of the configuration."""
    min_version: WeightVersion | None = None
    """Begin under this version or a later step of its run."""
    below_min_version: Literal["wait", "refuse"] = "wait"
    """What happens where the host is not there yet: the request waits in the queue, or is refused."""
    max_staleness: int | None = None
    """Commits that the request may live through once it has begun; at the next one it is dropped as stale."""

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {got!r}, must be {want}"
            for name, got, ok, want in (
                ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
                ("n", self.n, self.n >= 1, "at least 1"),
                ("temperature", self.temperature, self._temperature_is_meant(), f"0, or from {LEAST_TEMPERATURE} up"),
                ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "None or at least 1"),
                ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
                ("max_staleness", self.max_staleness, (self.max_staleness or 0) >= 0, "None or at least 0"),
                ("seed", self.seed, self.seed is None or 0 <= self.seed < 2**63, "None or in [0, 2**63)"),
            )
            if not ok
        ]
        if wrong:
            raise ValueError("sampling parameters: " + "; ".join(wrong))

    def _temperature_is_meant(self) -> bool:
        return self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf

    def may_begin_under(self, version: WeightVersion) -> bool:
        """Whether `version` is min_version or a later step of its run."""
        least = self.min_version
        return least is None or (least.run == version.run and least <= version)

    def seeded(self, seed: int) -> "SamplingParams":
        """The same with `seed` where none was given."""
        return self if self.seed is not None else replace(self, seed=seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionSpan:
    """Positions [start, stop) that were made under one weight version."""

    version: WeightVersion
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DiscardedKv:
    """Keys and values that sampled tokens [start, stop) were made with, and that were then thrown away.

    A commit with recompute throws them away, and so does preemption; they are rebuilt under the version of the time.
    """

    start: int
    stop: int
    kv_version_spans: tuple[VersionSpan, ...]
    expert_ids: NDArray[np.unsignedinteger] | None = None
    """[positions, L, K]: the experts of every position at that time; None unless record_routing."""
    expert_weights: NDArray[np.float32] | None = None


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    """An end-of-sequence or stop token was sampled; it is the last of token_ids."""
    LENGTH = "length"
    """max_tokens were sampled."""
    ABORT = "abort"
    """The caller cancelled it, or a commit came and the request was to abort at one."""
    STALE = "stale"
    """It lived through more commits than max_staleness allows."""
    NOT_A_NUMBER = "not_a_number"
    """The model's logits held NaN or +inf, or no finite value: nothing can be sampled from them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One sample of one prompt, and the account of every token in it."""

    prompt_id: str
    sample: int
    """0 .. n - 1."""
    host_id: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """The C sampled tokens."""
    logprobs: tuple[float, ...]
    """Per sampled token, log-probability under the distribution that it was sampled from: temperature, top-k and
    top-p applied (0 when greedy)."""
    model_logprobs: tuple[float, ...]
    """Per sampled token, log-probability under the model's own distribution: temperature 1, nothing cut."""
    finish_reason: FinishReason
    seed: int
    """With this seed, the same prompt and the same sample index, the same random numbers come again."""
    version_spans: tuple[VersionSpan, ...]
    """Which version's logits each sampled token came from; positions count from the first sampled token, 0 .. C."""
    kv_version_spans: tuple[VersionSpan, ...]
    """Which version wrote each position's keys and values; positions count from the prompt's first token, 0 .. P + C
    - 1 (the last token has none yet)."""
    discarded_kv: tuple[DiscardedKv, ...] = ()
    """Keys and values that earlier tokens saw and kv_version_spans no longer tells of, in the order of tokens. The
    tokens after the last of them were made with what kv_version_spans tells."""
    kept_token_ids: tuple[NDArray[np.int32], ...] | None = None
    """Per sampled token, the ids kept by top_k and top_p, ascending; None unless return_kept."""
    expert_ids: NDArray[np.unsignedinteger] | None = None
    """[P + C - 1, L, K] in the smallest unsigned dtype that fits; None unless record_routing. They belong to the pass
    that kv_version_spans tells of; those of passes before it are in discarded_kv."""
    expert_weights: NDArray[np.float32] | None = None
    """[P + C - 1, L, K] combine weights, widened to fp32; None unless record_routing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Log-probabilities of given tokens under one weight version."""

    version: WeightVersion
    logprobs: tuple[float, ...]
    """Of tokens 1 .. len - 1 given the ones before, at temperature 1."""
