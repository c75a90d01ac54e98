"""A learner in a process of its own that stops and waits to be killed.

`python -m fakes.weights_learner FLEET RUN SEED BEFORE HOST` publishes, says "waiting" when it is about to send its
first message of kind BEFORE to HOST, and never goes on.
"""

import sys
import time

from fakes.weights_fleet import BUCKET_BYTES, learner_state

from weights.messages import Request
from weights.publisher import Publisher
from weights.cargo import Segment
from weights.transports.shared_memory import SharedMemoryTransport, SocketLink


class Stopping(SharedMemoryTransport):
    def __init__(self, fleet: str, before: str, host: str) -> None:
        super().__init__(fleet)
        self._before = (before, host)

    def connect(self, host: str, deadline_s: float) -> SocketLink:
        link = super().connect(host, deadline_s)
        send = link.send

        def stopping(request: Request, segment: Segment | None, within_s: float) -> None:
            if (type(request).__name__, host) == self._before:
                print("waiting", flush=True)
                time.sleep(600)
            send(request, segment, within_s)

        link.send = stopping  # type: ignore[method-assign]
        return link


def main(fleet: str, run: str, seed: str, before: str, host: str) -> None:
    transport = Stopping(fleet, before, host)
    Publisher(transport, run=run, deadline_s=30.0, bucket_bytes=BUCKET_BYTES).publish(learner_state(int(seed)), 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
