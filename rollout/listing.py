"""Listing: tells learners and siblings, through the roster, which hosts of a fleet are there."""

import logging
from collections.abc import Collection

from rollout.config import RolloutConfig
from rollout.member import Member
from rollout.terms import roster_of
from weights.rendezvous import RosterHost

logger = logging.getLogger("rollout")


class Listing:
    """The roster of a fleet as it was last written.

    Args:
        config: the fleet's.
        members: all of its hosts.
    """

    def __init__(self, config: RolloutConfig, members: Collection[Member]) -> None:
        self._config = config
        self._members = members
        self._written: tuple[RosterHost, ...] | None = None
        self._fault = ""

    def write(self, *, must: bool = False) -> None:
        """Writes it if who is there has changed. A disk that is full is tried again at the next call.

        Args:
            must: raise what keeps it from being written.
        """
        introduced = [
            member.introduction
            for member in self._members
            if member.listed and member.introduction is not None and member.introduction.address is not None
        ]
        listed = tuple(RosterHost(id=host.host_id, address=str(host.address)) for host in introduced)
        if self._config.weights.transport is None or listed == self._written:
            return
        try:
            roster_of(self._config, listed, introduced).write()
        except OSError as error:
            if must:
                raise
            if str(error) != self._fault:
                logger.warning("fleet %s: the roster cannot be written: %s", self._config.name, error)
            self._fault = str(error)
        else:
            self._written, self._fault = listed, ""
