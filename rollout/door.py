"""The door of a host: where the publishers of weight updates, and siblings, reach its receiver."""

from rollout.config import RolloutConfig
from weights.receiver import Receiver
from weights.rendezvous import socket_path
from weights.transports.locked_segments import LockedSegments
from weights.transports.server import HostServer
from weights.transports.shared_memory import siblings


def open_door(config: RolloutConfig, receiver: Receiver, *, on_gpu: bool) -> HostServer | None:
    """Lets learners and siblings in; None where no learner will publish."""
    if config.weights.transport is None:
        return None
    deadline_s = config.deadlines.message_s
    return HostServer(
        receiver,
        socket_path(config.name, receiver.host),
        lambda: siblings(config.name, receiver.host, deadline_s),
        deadline_s=deadline_s,
        segments=LockedSegments() if on_gpu else None,
    )
