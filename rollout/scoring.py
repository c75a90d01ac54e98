"""Scoring over a fleet: which host scores which sequences, and what happens when one dies meanwhile."""

from collections.abc import Callable, Sequence
from typing import Any

from rollout.actor import ask
from rollout.balance import Rotation
from rollout.errors import HostGone
from rollout.request import Score


def score_over(
    rotation: Rotation,
    place: Callable[[Sequence[int]], list[tuple[str, Any]]],
    sequences: Sequence[Sequence[int]],
    deadline_s: float,
) -> list[Score]:
    """The scores of `sequences`, in order. A host that dies is passed over: another one scores its share.

    Args:
        rotation: where the load of the work is counted.
        place: gives a host and its actor for each of these weights, in order.
        sequences: tokens.
        deadline_s: for a host to score its share.

    Raises:
        ValueError: a sequence can never run.
        DeadlineExceeded: a host did not answer, or none takes work.
    """
    scores: dict[int, Score] = {}
    while left := [index for index in range(len(sequences)) if index not in scores]:
        weights = [len(sequences[index]) for index in left]
        by_actor: dict[int, tuple[str, Any, list[int]]] = {}
        for index, (host, actor) in zip(left, place(weights), strict=True):
            by_actor.setdefault(id(actor), (host, actor, []))[2].append(index)
        asked = [
            (host, actor, indices, actor.score.remote([tuple(sequences[index]) for index in indices], deadline_s))
            for host, actor, indices in by_actor.values()
        ]
        try:
            for host, actor, indices, ref in asked:
                try:
                    scores.update(zip(indices, ask(ref, f"{host} to score", deadline_s), strict=True))
                except HostGone:
                    rotation.take_out(host, actor)
        finally:
            for host, _, indices, _ in asked:
                rotation.done(host, sum(len(sequences[index]) for index in indices))
    return [scores[index] for index in range(len(sequences))]
