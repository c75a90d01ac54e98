"""Finds a fleet that another process launched: what it is, and which of its hosts take work at the moment."""

import time
from collections.abc import Mapping
from typing import Any

from rollout.actor import Call, Placement, find_actor, named_actors, named_hosts
from rollout.balance import Rotation
from rollout.errors import DeadlineExceeded, FleetNotFound
from rollout.introduction import Introduction

GLANCE_S = 0.1
"""Between two looks for a host that takes work, where there is none."""


class Discovery:
    """The hosts of a fleet, as a process sees them that only connected to it.

    Args:
        name: the fleet's.
        rotation: where hosts that take work are put, and those that are gone are taken out.
        placement: calls actors.
    """

    def __init__(self, name: str, rotation: Rotation, placement: Placement) -> None:
        self.name = name
        self._rotation = rotation
        self._placement = placement
        self._known: dict[str, tuple[int, Any]] = {}
        """Host id -> (how many times it was started again, its actor)."""
        self._knocking: dict[str, Call] = {}

    @property
    def actors(self) -> Mapping[str, Any]:
        """Host id -> actor, as of the last look."""
        return {host: actor for host, (_, actor) in self._known.items()}

    def await_host(self, wait_s: float) -> None:
        """Finds out which hosts take work, and waits until one does.

        Raises:
            DeadlineExceeded: none did in time.
        """
        until = time.monotonic() + wait_s
        self.look()
        while not self._rotation.hosts():
            if time.monotonic() > until:
                raise DeadlineExceeded(f"a host of {self.name} that takes work", wait_s)
            time.sleep(GLANCE_S)
            self.look()

    def look(self) -> None:
        """Hosts that ended leave; those that were started again come, once they are admitted."""
        found = named_hosts(self.name)
        for host, (incarnation, actor) in list(self._known.items()):
            if found.get(host, (None, ""))[0] != incarnation:
                self._rotation.take_out(host, actor)
                del self._known[host]
                self._knocking.pop(host, None)
        for host, (incarnation, full) in found.items():
            if host not in self._known:
                actor = find_actor(full)
                if actor is not None:
                    self._known[host] = (incarnation, actor)
                    self._knocking[host] = self._placement.call(actor, "admitted")
                    self._knocking[host].outcome(GLANCE_S)
        for host, call in list(self._knocking.items()):
            actor = self._known[host][1]
            outcome = call.outcome()
            if outcome is not None and not outcome.value:
                self._knocking[host] = self._placement.call(actor, "admitted")  # it was not when it was asked
                outcome = self._knocking[host].outcome(GLANCE_S)
            if outcome is not None and outcome.value:
                self._rotation.put(host, actor)
                del self._knocking[host]


def introduction_of(name: str, wait_s: float) -> Introduction:
    """What a living host of a fleet says of itself.

    Raises:
        FleetNotFound: there is none.
        DeadlineExceeded: none answers.
    """
    until = time.monotonic() + wait_s
    while mine := named_hosts(name):
        calls = [Call(actor.introduce.remote()) for actor in (find_actor(full) for _, full in mine.values()) if actor]
        while calls and time.monotonic() < until:
            outcomes = [outcome for call in calls if (outcome := call.outcome()) is not None]
            answers = [outcome.value for outcome in outcomes if not outcome.error]
            if answers:
                found: Introduction = answers[0]
                return found
            if len(outcomes) == len(calls):
                break
            time.sleep(GLANCE_S / 4)
        if time.monotonic() > until:
            raise DeadlineExceeded(f"a host of fleet {name!r} to introduce itself", wait_s)
    others = sorted({full.rpartition("/")[0] for full in named_actors()})
    raise FleetNotFound(f"no fleet {name!r} in this Ray cluster; fleets here: {', '.join(others) or 'none'}")
