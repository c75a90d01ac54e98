"""The states of an update on a host, and how an update ended there.

IDLE -> OFFERED -> STAGED -> COMMITTING -> IDLE (new version)
  any failure up to STAGED      -> what it was before the offer (IDLE or TORN), untouched
  any failure in COMMITTING     -> TORN: serves nothing, heals only by a complete commit

A host in STAGED that loses its publisher settles with its siblings (`settlement.py`):
  one has committed             -> COMMITTING; if no pause can be had in time, TORN
  none has, each accounted for  -> what it was before the offer
  one may have, out of reach    -> TORN, "undecided": whole and old, but a sibling may be serving the new version
"""

from enum import StrEnum


class State(StrEnum):
    """Where a host stands in an update."""

    IDLE = "idle"
    """No update under way; its version serves."""
    OFFERED = "offered"
    """An update's manifest fits; its buckets are arriving."""
    STAGED = "staged"
    """Every block is here and verified, and the host has voted for the commit."""
    COMMITTING = "committing"
    """Requests are paused and parameters are being written."""
    TORN = "torn"
    """A commit failed half-way, or the host cannot tell whether its siblings committed: it serves nothing until a
    complete commit."""


class Outcome(StrEnum):
    """How an update ended on a host, as its siblings learn it."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    """It has not committed and never will, and nor has any other: it knows that for the whole fleet."""
    TORN = "torn"
    """The host was told to commit, or learned that a sibling did, and failed: for its siblings that is a decision to
    commit."""
    UNDECIDED = "undecided"
    """The host voted and could not learn how it ended: it has not committed, and serves nothing."""
    VOTED = "voted"
    """Not ended: the host has voted, and holds until the asker decides."""
    UNKNOWN = "unknown"
    """The host never took this update's offer, and now never will."""


class Intent(StrEnum):
    """What a host that lost its publisher wants of a sibling."""

    HOLD = "hold"
    """Say how it ended; if it has not, take no commit until this is settled."""
    ABORT = "abort"
    """No host has committed: abort."""
