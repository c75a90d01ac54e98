"""The roll call of a fleet: what every host says of itself, and what is known of those that do not say it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rollout.actor import ask
from rollout.errors import DeadlineExceeded, HostGone
from rollout.member import Member, Stage
from rollout.status import HostStatus

_STATES = {
    Stage.DOWN: "dead",
    Stage.LEFT_OUT: "left out",
    Stage.STARTING: "starting",
    Stage.JOINING: "holding",
    Stage.HOLDING: "holding",
    Stage.SERVING: "dead",
}
"""What a status says where the host itself does not say it."""


def roll_call(actors: Mapping[str, Any], members: Mapping[str, Member], deadline_s: float) -> tuple[HostStatus, ...]:
    """The status of every host, in order.

    Args:
        actors: host id -> actor, None where it has none now.
        members: what the fleet's supervisor knows of them; empty in a process that only connected.
        deadline_s: how long to wait for each answer; a host that gives none is listed as dead.
    """
    stages = {host: members[host].stage if host in members else Stage.SERVING for host in actors}
    up = {host: actor for host, actor in actors.items() if actor is not None and stages[host] is not Stage.STARTING}
    refs = {host: actor.status.remote() for host, actor in up.items()}
    statuses = []
    for host, stage in stages.items():
        if host not in refs:
            why = members[host].why if host in members else ""
            statuses.append(HostStatus.absent(host, _STATES[stage], why or "its process ended"))
            continue
        try:
            found = ask(refs[host], f"{host} to report", deadline_s)
        except (HostGone, DeadlineExceeded) as error:
            found = HostStatus.absent(host, "dead", str(error))
        if stage in (Stage.JOINING, Stage.HOLDING):  # whatever it has, it serves nobody yet
            found = replace(found, state=_STATES[stage], version=None)
        statuses.append(found)
    return tuple(statuses)
