"""Finds a running fleet by its name, for commands of other shells."""

from rollout.errors import FleetNotFound
from rollout.fleet import Fleet
from rollout.whereabouts import Whereabouts, fleets_here


def connect(name: str) -> Fleet:
    """FleetNotFound names the fleets that there are, and how to have one."""
    try:
        return Fleet.connect(name)
    except FleetNotFound as error:
        if Whereabouts.read(name) is not None:
            raise
        others = ", ".join(fleets_here()) or "none"
        raise FleetNotFound(
            f"no fleet {name!r} on this machine; fleets here: {others}; start one with moe-rollout launch CONFIG"
        ) from error
