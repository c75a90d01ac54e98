"""Delivery: how the bytes of an update come to a host, and what "staged" means then."""

from enum import StrEnum


class Delivery(StrEnum):
    """Decides what a host may still do when its learner is gone after the vote."""

    SEGMENTS = "segments"
    """Memory that learner and hosts share, filled before the vote. It outlives the learner: a host can still commit."""
    LEASE = "lease"
    """The learner's own device memory, read in place: hashed before the vote, copied in the commit, and hashed again
    as live parameters. It ends with the learner."""
    SHADOW = "shadow"
    """Buckets over a wire, kept in host memory before the vote: a full second copy, so that a host can still commit."""
    STREAM = "stream"
    """Buckets that are written as they come, in the commit: nothing is staged. A learner that is lost on the way
    leaves a torn host."""

    @property
    def outlives_the_learner(self) -> bool:
        """Whether a host that voted holds all bytes itself."""
        return self in (Delivery.SEGMENTS, Delivery.SHADOW)
