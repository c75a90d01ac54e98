"""The figures that a run ends with, and what they must be for the demo to have shown what it is for."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from grpo.agreement import Replayed
from grpo.record import Record, agreement_of, replayed_of

ENDS = 3  # updates that the first and the last reward are means over


def figures_of(records: Sequence[Record], *, family: str, transport: str | None, seconds: float) -> dict[str, Any]:
    """The run in one flat mapping that JSON can hold; without a single update there are no figures.

    Raises:
        ValueError: no records.
    """
    if not records:
        raise ValueError("no update was made: nothing to tell")
    agreement = agreement_of(records)
    replayed = replayed_of(records)
    return {
        "family": family,
        "updates": len(records),
        "reward_first": fmean(record.reward for record in records[:ENDS]),
        "reward_last": fmean(record.reward for record in records[-ENDS:]),
        "hosts": len(frozenset().union(*(record.hosts for record in records))),
        "tokens": sum(record.tokens for record in records),
        "transport": transport,
        "update_s_median": median(record.update_s for record in records),
        "pause_s_median": median(pause for record in records for pause in record.pause_s),
        "versions_seen": len(frozenset().union(*(record.versions for record in records))),
        "completions_across_commits": sum(record.crossed for record in records),
        "tokens_compared": agreement.tokens,
        "logprob_abs_diff_max": agreement.logprob_abs_diff_max,
        "routing_decisions_compared": agreement.decisions,
        "routing_mismatches": agreement.mismatches,
        "near_ties": agreement.near_ties,
        "staleness_mean": fmean(record.staleness for record in records),
        "tokens_masked": sum(record.masked_tokens for record in records),
        "replay": replayed is not None,
        **({} if replayed is None else _replay_figures(replayed)),
        "seconds": seconds,
    }


def _replay_figures(replayed: Replayed) -> dict[str, Any]:
    """Beside the figures above, which compare the hosts with the learner's own routing in either case."""
    return {
        "replay_decisions": replayed.decisions,
        "replay_decisions_other_than_own": replayed.differing,
        "replay_tokens_compared": replayed.tokens,
        "replay_logprob_abs_diff_max": replayed.logprob_abs_diff_max,
    }


Limit = tuple[str, Callable[[float], bool]]


def limits(hosts: int, *, replay: bool) -> dict[str, Limit]:
    """Per figure what it must be, in words and as a test that NaN fails."""
    replaying: dict[str, Limit] = {
        "replay_decisions": ("at least 10,000", lambda got: got >= 10_000),
        "replay_tokens_compared": ("at least 10,000", lambda got: got >= 10_000),
        "replay_logprob_abs_diff_max": ("below 1e-4", lambda got: got < 1e-4),
    }
    return {
        **(replaying if replay else {}),
        "updates": ("at least 30", lambda got: got >= 30),
        "reward_first": ("at most 0.4", lambda got: got <= 0.4),
        "reward_last": ("at least 0.8", lambda got: got >= 0.8),
        "hosts": (f"{hosts}", lambda got: got == hosts),
        "completions_across_commits": ("at least 20", lambda got: got >= 20),
        "tokens_compared": ("at least 10,000", lambda got: got >= 10_000),
        "logprob_abs_diff_max": ("below 1e-4", lambda got: got < 1e-4),
        "routing_decisions_compared": ("at least 10,000", lambda got: got >= 10_000),
        "routing_mismatches": ("0", lambda got: got == 0),
        "seconds": ("at most 300", lambda got: got <= 300),
    }


def misses(figures: Mapping[str, Any], *, hosts: int) -> list[str]:
    """A line for every figure that is not what it must be."""
    return [
        f"{name} is {figures[name]:g}, must be {words}"
        for name, (words, holds) in limits(hosts, replay=figures["replay"]).items()
        if not holds(figures[name])
    ]
