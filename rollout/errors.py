"""What can go wrong in the rollout package, apart from a caller's mistake (ValueError).

RolloutError
├── ConfigError        (also a ValueError) a configuration that cannot be meant
├── DeadlineExceeded   (also a TimeoutError) a wait that outlasted its deadline; says what it waited for
├── FleetNotFound      no fleet of that name can be reached
├── HostFailed         a host stopped because of an error of its own; carries it as text
├── QueueFull          a host has as many requests as it may hold
├── VersionTooOld      a request is to be refused below a version that the host has not reached
├── StepNotTaken       a step in a watched folder, or the folder, is not fit to be served; the old version serves on
├── CheckpointError    a checkpoint folder does not hold what it says (rollout.model.checkpoint)
├── HostGone           a host's process does not answer any more
└── HostDied           a host's process is gone; names the requests that it took along
"""

NAMED_REQUESTS = 10  # of those that a dead host took along, in the message; the error holds them all


class RolloutError(Exception):
    """The root of this package's errors."""


class ConfigError(RolloutError, ValueError):
    """A configuration that cannot be meant: the message names the key, what it got and what it takes."""


class DeadlineExceeded(RolloutError, TimeoutError):
    """A wait outlasted its deadline.

    Args:
        awaited: what was waited for, as a noun phrase ("the engine to pause").
        deadline_s: how long, in seconds.
    """

    def __init__(self, awaited: str, deadline_s: float) -> None:
        super().__init__(f"waited {deadline_s:g} s for {awaited}")
        self.awaited = awaited
        self.deadline_s = deadline_s

    def __reduce__(self) -> tuple[type["DeadlineExceeded"], tuple[str, float]]:
        return (type(self), (self.awaited, self.deadline_s))


class FleetNotFound(RolloutError):
    """No fleet of that name can be reached."""


class HostFailed(RolloutError):
    """A host stopped because of an error of its own and serves nothing."""


class QueueFull(RolloutError):
    """A host has as many unfinished requests as it may hold; it takes more when some are done."""


class VersionTooOld(RolloutError):
    """A request is to be refused below a version that the host has not reached."""


class HostGone(RolloutError):
    """A host's process has ended and cannot be asked anything."""


class HostDied(RolloutError):
    """A host's process is gone, and with it the requests that it was running.

    Args:
        host_ids: the hosts that died.
        request_ids: the requests (prompt id, sample) without an answer.
    """

    def __init__(self, host_ids: tuple[str, ...], request_ids: tuple[tuple[str, int], ...]) -> None:
        lost = [f"{prompt_id}#{sample}" for prompt_id, sample in request_ids]
        more = f" and {len(lost) - NAMED_REQUESTS} more" if len(lost) > NAMED_REQUESTS else ""
        super().__init__(
            f"{', '.join(host_ids)} died; requests without an answer: "
            f"{', '.join(lost[:NAMED_REQUESTS]) or 'none'}{more}; submit them again"
        )
        self.host_ids = host_ids
        self.request_ids = request_ids

    def __reduce__(self) -> tuple[type["HostDied"], tuple[tuple[str, ...], tuple[tuple[str, int], ...]]]:
        return (type(self), (self.host_ids, self.request_ids))


class StepNotTaken(RolloutError):
    """A step in a watched folder was not taken up, or the folder or the fleet is out of reach: says which and why.

    What the hosts served before serves on. The cause is the error itself.
    """
