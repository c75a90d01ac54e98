"""From completions to the learner's batch."""

from collections.abc import Mapping, Sequence

import numpy as np

from grpo.batch import Batch
from rollout import Completion, VersionSpan
from weights import WeightVersion


def collate(
    completions: Sequence[Completion], rewards: Sequence[float], update_of: Mapping[WeightVersion, int], *, samples: int
) -> Batch:
    """Completions with their rewards as one batch.

    Args:
        completions: `samples` for each prompt, in any order.
        update_of: which update of the learner made a version; the checkpoint's own is update 0.

    Raises:
        ValueError: completions of different lengths, without routing, a prompt with more or fewer samples, or a
        version that nobody published.
    """
    order = sorted(range(len(completions)), key=lambda index: (completions[index].prompt_id, completions[index].sample))
    ordered = [completions[index] for index in order]
    _check(ordered, update_of, samples)
    return Batch(
        prompt_tokens=len(ordered[0].prompt_token_ids),
        samples=samples,
        token_ids_SM=np.array([(*c.prompt_token_ids, *c.token_ids) for c in ordered], dtype=np.int64),
        rewards_S=np.array([rewards[index] for index in order], dtype=np.float32),
        logprobs_SC=np.array([c.logprobs for c in ordered], dtype=np.float32),
        model_logprobs_SC=np.array([c.model_logprobs for c in ordered], dtype=np.float32),
        updates_SC=np.array([spread(c.version_spans, update_of) for c in ordered], dtype=np.int64),
        kv_updates_SN=np.array([spread(c.kv_version_spans, update_of) for c in ordered], dtype=np.int64),
        expert_ids_SNLK=np.stack([c.expert_ids for c in ordered if c.expert_ids is not None]),
    )


def spread(spans: Sequence[VersionSpan], update_of: Mapping[WeightVersion, int]) -> list[int]:
    """The update behind each position that the spans cover."""
    return [update_of[span.version] for span in spans for _ in range(span.start, span.stop)]


def _check(ordered: Sequence[Completion], update_of: Mapping[WeightVersion, int], samples: int) -> None:
    lengths = {(len(c.prompt_token_ids), len(c.token_ids)) for c in ordered}
    if len(lengths) != 1:
        raise ValueError(f"a batch needs prompts of one length and completions of one length, got {sorted(lengths)}")
    numbers: dict[str, list[int]] = {}
    for c in ordered:
        numbers.setdefault(c.prompt_id, []).append(c.sample)
    wrong = [f"{prompt_id} has {got}" for prompt_id, got in numbers.items() if got != list(range(samples))]
    if wrong:
        raise ValueError(f"every prompt needs samples 0 .. {samples - 1}; {'; '.join(wrong[:10])}")
    bare = [f"{c.prompt_id}#{c.sample}" for c in ordered if c.expert_ids is None]
    if bare:
        raise ValueError(f"completions without experts: {', '.join(bare[:10])}; sample with record_routing=True")
    strange = {
        str(s.version) for c in ordered for s in (*c.version_spans, *c.kv_version_spans) if s.version not in update_of
    }
    if strange:
        raise ValueError(
            f"completions made under versions that the learner did not publish: {', '.join(sorted(strange))}; "
            f"it published {', '.join(str(version) for version in update_of)}"
        )
