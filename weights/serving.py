"""What a receiver needs from the world around it: the host that serves its parameters, and that host's siblings."""

from contextlib import AbstractContextManager
from typing import Protocol

from weights.messages import Answer, Ask
from weights.version import WeightVersion


class Serving(Protocol):
    """What a host gives its receiver: a pause, and the last word on what it serves."""

    def paused(self) -> AbstractContextManager[object]:
        """Inside, no engine step runs. DeadlineExceeded on entry if the running step does not end in time."""
        ...

    def committed(self, version: WeightVersion) -> None:
        """Called inside the pause, after the live parameters were verified: serve this version from now on."""
        ...

    def torn(self, reason: str) -> None:
        """Serve nothing until a later `committed`.

        Called inside the pause when a commit failed half-way, and without one when the host may not serve on (its
        siblings may have another version) or no pause can be had. It never waits: no step begins after it, and one
        that runs may end, on parameters that are still whole.
        """
        ...


class Sibling(Protocol):
    """Another host of the fleet, as a host that lost its publisher sees it."""

    @property
    def host(self) -> str: ...

    def ask(self, question: Ask) -> Answer:
        """PeerGone if its process is known to have ended: then it serves nothing. Another TransportError, or
        MessageError, if it cannot be reached or does not answer in time: then it may be serving.
        """
        ...
