"""What can go wrong in a weight update, apart from a caller's mistake (ValueError) and our own (AssertionError).

    WeightsError
    ├── ManifestError            what an update holds is malformed, or does not fit the hosted model
    ├── MessageError             bytes that are no message
    ├── RosterError              no such fleet, or its roster file is malformed
    ├── FolderError              a folder of weights cannot be written, read, or trusted
    ├── TransportError           a peer is gone, refuses the connection, or breaks the protocol
    │   ├── PeerGone             its process has ended: it serves nothing
    │   ├── DeadlineExceeded     a wait ended without what it waited for
    │   └── DeviceFull           a device has no memory left for a buffer
    ├── UpdateAborted            nothing was committed: every host keeps what it had
    └── CommitIncomplete         some hosts committed and some did not

Every one of them survives pickling.
"""

from collections.abc import Mapping


class WeightsError(Exception):
    """Root of the tree; its text says what happened, what was expected, and the remedy."""


class ManifestError(WeightsError):
    """An update's list of tensors is malformed or does not fit the hosted model; the text names every offender."""


class MessageError(WeightsError):
    """Bytes on a control connection that are no message of ours: truncated, corrupted, or from another program."""


class RosterError(WeightsError):
    """A fleet's roster cannot be found, read, or trusted."""


class FolderError(WeightsError):
    """A folder of weights (a step's or a checkpoint's) cannot be written, read, or trusted. Nothing was taken from it,
    and a step that could not be written left nothing behind."""


class TransportError(WeightsError):
    """A peer is gone, cannot be reached, turned us away, or answered what the protocol does not allow."""


class PeerGone(TransportError):
    """A peer's process has ended, or it has left the fleet: it serves nothing, whatever it did last."""


class DeadlineExceeded(TransportError):
    """A wait ended; the text says what was waited for and how long."""


class DeviceFull(TransportError):
    """A device has no memory left for a buffer; the text says what is free."""


class UpdateAborted(WeightsError):
    """An update ended before anything was committed. Every host serves what it served before."""

    def __init__(self, message: str, hosts: Mapping[str, str]) -> None:
        super().__init__(message, dict(hosts))
        self.hosts: Mapping[str, str] = dict(hosts)
        """The hosts at fault, each with its reason; empty where the fault is the learner's own."""

    def __str__(self) -> str:
        return str(self.args[0])


class CommitIncomplete(WeightsError):
    """The commit was sent, and not every host confirmed it. Publish again: a complete commit heals every host."""

    def __init__(
        self, message: str, committed: tuple[str, ...], torn: Mapping[str, str], unknown: Mapping[str, str]
    ) -> None:
        super().__init__(message, tuple(committed), dict(torn), dict(unknown))
        self.committed: tuple[str, ...] = tuple(committed)
        """Hosts that confirmed the new version."""
        self.torn: Mapping[str, str] = dict(torn)
        """Hosts that serve nothing until a complete commit, each with its reason."""
        self.unknown: Mapping[str, str] = dict(unknown)
        """Hosts that did not say: they settle with their siblings. Each with the reason."""

    def __str__(self) -> str:
        return str(self.args[0])
