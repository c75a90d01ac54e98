"""One sequence: its tokens, how far its keys and values reach, and the account of both.

T tokens, L mixture-of-experts layers, K experts of a token.
"""

from enum import Enum
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rollout.config import EngineConfig
from rollout.engine.group import Group, ReadPrompt
from rollout.engine.sampler import SampledRow
from rollout.request import Completion, DiscardedKv, FinishReason, Prompt, SamplingParams, Score, VersionSpan
from weights.version import WeightVersion

Number = TypeVar("Number", bound=np.generic)


class Purpose(Enum):
    """What a sequence is run for."""

    GENERATE = "generate"
    SCORE = "score"


class Sequence:
    """Prompt tokens and what was sampled after them.

    `computed` of its tokens have keys and values in the cache; a step runs the next ones. A scoring sequence runs its
    tokens once and keeps their log-probabilities; a generating one goes on until it finishes.

    Args:
        key: client, prompt id and sample; unique in an engine.
        group: the samples of its prompt, where there are several.
    """

    def __init__(
        self,
        key: tuple[str, str, int],
        prompt: Prompt,
        params: SamplingParams,
        purpose: Purpose = Purpose.GENERATE,
        group: Group | None = None,
    ) -> None:
        self.key = key
        self.prompt = prompt
        self.params = params
        self.purpose = purpose
        self.group = group
        """None once it has begun."""
        self.token_ids = list(prompt.token_ids)
        self.computed = 0
        self.blocks: list[int] = []
        self.block_keys: list[bytes] = []
        """Prefix keys of its leading full blocks, as far as they were worked out under this content."""
        self.first_logits_V: Tensor | None = None
        """Where its prompt was read for the whole group: what its first token is drawn from."""
        self.commits = 0
        """That it has lived through since it began."""
        self.logprobs: list[float] = []
        self.model_logprobs: list[float] = []
        self.version_spans: list[VersionSpan] = []
        self.kv_version_spans: list[VersionSpan] = []
        self.expert_ids: list[NDArray[np.unsignedinteger]] = []
        self.expert_weights: list[NDArray[np.float32]] = []
        self.discarded_kv: list[DiscardedKv] = []
        self.kept_token_ids: list[NDArray[np.int32]] = []
        self.finish_reason: FinishReason | None = None

    @property
    def sampled(self) -> int:
        """Sampled tokens so far."""
        return len(self.token_ids) - len(self.prompt.token_ids)

    @property
    def uncomputed(self) -> int:
        """Tokens that have no keys and values yet: the rest of the prompt, or the last sampled token."""
        return len(self.token_ids) - self.computed

    @property
    def longest(self) -> int:
        """Positions whose keys and values it can come to need."""
        if self.purpose is Purpose.SCORE:
            return len(self.token_ids)
        return len(self.prompt.token_ids) + self.params.max_tokens - 1

    def advance(self, rows: int, version: WeightVersion) -> None:
        """`rows` more tokens got their keys and values under `version`."""
        extend_spans(self.kv_version_spans, version, self.computed, self.computed + rows)
        self.computed += rows

    def record(self, expert_ids_TLK: NDArray[np.unsignedinteger], expert_weights_TLK: NDArray[np.float32]) -> None:
        """The experts of the tokens that were just run."""
        self.expert_ids.append(expert_ids_TLK)
        self.expert_weights.append(expert_weights_TLK)

    def append(self, row: SampledRow, version: WeightVersion) -> None:
        """One sampled token and its account."""
        extend_spans(self.version_spans, version, self.sampled, self.sampled + 1)
        self.token_ids.append(row.token_id)
        self.logprobs.append(row.logprob)
        self.model_logprobs.append(row.model_logprob)
        if row.kept is not None:
            self.kept_token_ids.append(row.kept)

    def adopt(self, read: ReadPrompt, blocks: list[int]) -> None:
        """Begins after a prompt that another sample of the group has read; `blocks` hold its keys and values."""
        self.blocks = blocks
        self.computed = len(self.prompt.token_ids)
        self.kv_version_spans = list(read.kv_version_spans)
        self.expert_ids = list(read.expert_ids)
        self.expert_weights = list(read.expert_weights)
        self.first_logits_V = read.logits_V

    def discard_kv(self) -> None:
        """Its keys and values are gone, or will be rebuilt; the tokens stay, and so does the account of what they saw.

        A scoring sequence begins again as a whole, for its answer speaks of one version.
        """
        first = self.discarded_kv[-1].stop if self.discarded_kv else 0
        if self.sampled > first:
            self.discarded_kv.append(
                DiscardedKv(
                    start=first,
                    stop=self.sampled,
                    kv_version_spans=tuple(self.kv_version_spans),
                    expert_ids=joined(self.expert_ids),
                    expert_weights=joined(self.expert_weights),
                )
            )
        self.computed = 0
        self.block_keys.clear()
        self.kv_version_spans.clear()
        self.expert_ids.clear()
        self.expert_weights.clear()
        self.first_logits_V = None
        if self.purpose is Purpose.SCORE:
            self.model_logprobs.clear()

    def completion(self, host_id: str) -> Completion:
        """What the caller gets."""
        assert self.finish_reason is not None, "not finished"
        assert self.params.seed is not None, "unseeded"
        return Completion(
            prompt_id=self.prompt.id,
            sample=self.key[2],
            host_id=host_id,
            prompt_token_ids=self.prompt.token_ids,
            token_ids=tuple(self.token_ids[len(self.prompt.token_ids) :]),
            logprobs=tuple(self.logprobs),
            model_logprobs=tuple(self.model_logprobs),
            finish_reason=self.finish_reason,
            seed=self.params.seed,
            version_spans=tuple(self.version_spans),
            kv_version_spans=tuple(self.kv_version_spans),
            discarded_kv=tuple(self.discarded_kv),
            kept_token_ids=tuple(self.kept_token_ids) if self.params.return_kept else None,
            expert_ids=joined(self.expert_ids),
            expert_weights=joined(self.expert_weights),
        )

    def score(self) -> Score:
        """What the caller of score() gets."""
        (span,) = self.kv_version_spans
        return Score(version=span.version, logprobs=tuple(self.model_logprobs))


def joined(parts: list[NDArray[Number]]) -> NDArray[Number] | None:
    """The steps' records one after the other; None where nothing was recorded."""
    return np.concatenate(parts) if parts else None


def extend_spans(spans: list[VersionSpan], version: WeightVersion, start: int, stop: int) -> None:
    """Adds [start, stop), which follows on what is there, merged with the last span where the version is the same."""
    if spans and spans[-1].version == version:
        start = spans.pop().start
    spans.append(VersionSpan(version=version, start=start, stop=stop))


def validate_fits(sequence: Sequence, config: EngineConfig, *, context_length: int, vocab_size: int) -> None:
    """Raises ValueError where a sequence can never run: too long for the context or the cache, or tokens that the
    model has not got."""
    name, prompt_length = f"prompt {sequence.prompt.id!r}", len(sequence.prompt.token_ids)
    room = config.blocks * config.block_size
    if sequence.longest > context_length:
        raise ValueError(
            f"{name}: {prompt_length} prompt tokens and max_tokens={sequence.params.max_tokens} exceed the "
            f"{context_length} positions that the model was made for; shorten one of them"
        )
    if sequence.longest > config.max_context:
        raise ValueError(
            f"{name}: {prompt_length} prompt tokens and max_tokens={sequence.params.max_tokens} exceed "
            f"engine.max_context={config.max_context}; shorten one of them or raise engine.max_context"
        )
    if sequence.longest > room:
        raise ValueError(
            f"{name} can come to need keys and values of {sequence.longest} tokens, the KV cache holds {room}; "
            "shorten it or raise engine.kv_blocks"
        )
    outside = sorted({token for token in sequence.token_ids if not 0 <= token < vocab_size})
    if outside:
        raise ValueError(f"{name}: token ids {outside[:10]} are outside the model's vocabulary of {vocab_size}")
