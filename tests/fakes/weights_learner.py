"""A learner in a process of its own that stops and waits to be killed.

`python -m fakes.weights_learner FLEET RUN SEED BEFORE HOST [N]` publishes, says "waiting" when it is about to send its
n-th message of kind BEFORE to HOST, and never goes on.
"""

import sys
import time
from collections.abc import Callable

from fakes.weights_fleet import BUCKET_BYTES, learner_state

from weights.cargo import Loader, Segment
from weights.messages import Request
from weights.publisher import Publisher
from weights.rendezvous import Roster
from weights.transports.by_roster import transport_of
from weights.transports.seam import Link, Transport


class Acting:
    """A transport that calls `act` just before the n-th message of a kind is sent to a host."""

    def __init__(self, transport: Transport, before: tuple[str, int], host: str, act: Callable[[], None]) -> None:
        self._transport = transport
        self._before = before
        self._host = host
        self._act = act
        self._seen = 0

    def hosts(self) -> tuple[str, ...]:
        return self._transport.hosts()

    def segment(self, size: int) -> Segment:
        return self._transport.segment(size)

    def loader(self, bucket_bytes: int) -> Loader:
        return self._transport.loader(bucket_bytes)

    def connect(self, host: str, deadline_s: float) -> Link:
        link = self._transport.connect(host, deadline_s)
        send = link.send

        def acting(request: Request, segment: Segment | None, within_s: float) -> None:
            if (type(request).__name__, host) == (self._before[0], self._host):
                self._seen += 1
                if self._seen == self._before[1]:
                    self._act()
            send(request, segment, within_s)

        link.send = acting  # type: ignore[method-assign]
        return link


def wait_to_be_killed() -> None:
    print("waiting", flush=True)
    time.sleep(600)


def main(fleet: str, run: str, seed: str, kind: str, host: str, occurrence: str = "1") -> None:
    transport = Acting(transport_of(Roster.read(fleet)), (kind, int(occurrence)), host, wait_to_be_killed)
    Publisher(transport, run=run, deadline_s=30.0, bucket_bytes=BUCKET_BYTES).publish(learner_state(int(seed)), 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
