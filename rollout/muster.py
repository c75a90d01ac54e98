"""The wait at the launch of a fleet, until every host is up. Later starts are looked at without waiting."""

import time
from collections.abc import Callable, Iterable

from rollout.errors import DeadlineExceeded
from rollout.member import Member

LOOK_S = 0.05


def muster(members: Iterable[Member], deadline_s: float, clock: Callable[[], float]) -> None:
    """Waits for the starts of hosts, and takes down how each introduces itself.

    Raises:
        DeadlineExceeded: naming the hosts that did not report.
        Exception: what a host raised.
    """
    until = clock() + deadline_s
    waiting = {member.host_id: member for member in members}
    while waiting:
        for host_id, member in list(waiting.items()):
            assert member.work is not None
            outcome = member.work.outcome()
            if outcome is not None:
                if outcome.raised is not None:
                    raise outcome.raised
                member.introduction, member.work = outcome.value, None
                del waiting[host_id]
        if waiting and clock() > until:
            raise DeadlineExceeded(f"hosts to load the checkpoint: {', '.join(waiting)}", deadline_s)
        if waiting:
            time.sleep(LOOK_S)
