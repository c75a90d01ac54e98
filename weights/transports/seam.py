"""The seam: what a publisher needs of a transport.

Two planes. Control: framed messages, one request and one reply at a time per host, every wait with a deadline.
Payload: flat segments of bytes that the publisher fills and the hosts map.

The contract of every fill:

- A request is delivered to its host at most once per `send`, whole, or the link ends. Replies may come late: `receive`
  skips those of earlier requests, by their sequence.
- A segment's bytes reach the host as they are when `Stage` is sent, and stay readable there until the host lets go of
  them, whatever happens to the publisher ("staged" means that they outlive the learner).
- The publisher writes into a segment again only when every host has let go of it: it answered Committed or Aborted, or
  refused and is known to hold nothing. Where the publisher cannot know, it takes a new segment.
- When a link ends, the host notices at once (`Receiver.lost`) or at its deadline (`Receiver.silence_left_s`), and
  settles.
"""

from typing import Protocol

from weights.cargo import Loader, Segment
from weights.messages import Reply, Request


class Link(Protocol):
    """A publisher's connection to one host."""

    @property
    def host(self) -> str: ...

    def send(self, request: Request, segment: Segment | None, deadline_s: float) -> None:
        """TransportError if the host is gone, DeadlineExceeded if it takes nothing for so long."""
        ...

    def receive(self, sequence: int, deadline_s: float) -> Reply:
        """The reply to request `sequence`.

        TransportError, DeadlineExceeded, or MessageError if what came is no reply.
        """
        ...

    def close(self) -> None:
        """Ends the connection; the host notices."""
        ...


class Transport(Protocol):
    """How a publisher reaches a fleet."""

    def hosts(self) -> tuple[str, ...]:
        """The hosts of the fleet as it stands now. RosterError if there is none."""
        ...

    def connect(self, host: str, deadline_s: float) -> Link:
        """TransportError if the host cannot be reached."""
        ...

    def segment(self, size: int) -> Segment:
        """A new segment of `size` bytes."""
        ...

    def loader(self, bucket_bytes: int) -> Loader:
        """How updates are loaded for it."""
        ...
