"""What is known of one update, and of the run so far."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Self

from grpo.agreement import Agreement, Replayed
from grpo.messages import Published, Trained
from grpo.task import spelled
from rollout import Completion


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One update: the batch that it trained on, and how its weights went out."""

    update: int
    reward: float
    """Mean over the batch, in [0, 1]."""
    tokens: int
    """Sampled tokens of the batch."""
    generated: int
    """Tokens sampled meanwhile, for the next batch; 0 in the last update, which has none."""
    seconds: float
    """From the update before to this one, all included."""
    hosts: frozenset[str]
    """That made the batch."""
    crossed: int
    """Completions whose tokens come from more than one version."""
    versions: frozenset[str]
    """That made the batch."""
    published: str
    """The version that the update became."""
    update_s: float
    pause_s: tuple[float, ...]
    """Per host."""
    learn_s: float
    staleness: float
    masked_tokens: int
    agreement: Agreement
    example: str
    """A prompt and what came of it."""
    replayed: Replayed | None = None
    """None where the learner trained on its own routing."""

    @classmethod
    def of(
        cls,
        completions: Sequence[Completion],
        rewards: Sequence[float],
        trained: Trained,
        published: Published,
        *,
        generated: int,
        seconds: float,
    ) -> Self:
        """From what one turn of the loop has gathered."""
        first = completions[0]
        return cls(
            update=trained.update,
            reward=sum(rewards) / len(rewards),
            tokens=sum(len(c.token_ids) for c in completions),
            generated=generated,
            seconds=seconds,
            hosts=frozenset(c.host_id for c in completions),
            crossed=sum(len({span.version for span in c.version_spans}) > 1 for c in completions),
            versions=frozenset(str(span.version) for c in completions for span in c.version_spans),
            published=str(published.version),
            update_s=published.seconds,
            pause_s=published.pause_s,
            learn_s=trained.seconds,
            staleness=trained.staleness,
            masked_tokens=trained.masked_tokens,
            agreement=trained.agreement,
            example=f"{spelled(first.prompt_token_ids)} -> {spelled(first.token_ids)}",
            replayed=trained.replayed,
        )


def agreement_of(records: Sequence[Record]) -> Agreement:
    """Of all of them together."""
    return reduce(add, (record.agreement for record in records), Agreement())


def replayed_of(records: Sequence[Record]) -> Replayed | None:
    """Of all of them together; None where the learner trained on its own routing."""
    parts = [record.replayed for record in records if record.replayed is not None]
    return reduce(add, parts, Replayed()) if parts else None
