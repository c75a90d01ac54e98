"""Which host takes which prompt (balancing; routing is another word)."""

from collections.abc import Mapping, Sequence


def spread(loads: Mapping[str, int], weights: Sequence[int]) -> list[str]:
    """A host for each item, in order: the one with the least load so far, the first of them on a tie.

    Args:
        loads: what each host has to do already.
        weights: what each item adds, in the same unit.
    """
    if not loads:
        raise ValueError("no hosts to spread over")
    running = dict(loads)
    chosen = []
    for weight in weights:
        host = min(running, key=lambda name: running[name])
        running[host] += weight
        chosen.append(host)
    return chosen
