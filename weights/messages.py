"""What the publisher, the hosts and their siblings say to each other; `codec.py` has the frames it travels in.

publisher -> host    Hello   Offer    Stage   Vote   Commit     Abort           sibling -> host   Ask
host -> publisher    Welcome Offered  Staged  Voted  Committed  Aborted         host -> sibling   Answer
                     Refused: to any of them
"""

from collections.abc import Mapping
from dataclasses import dataclass

from weights.digest import Digest
from weights.manifest import Manifest
from weights.state import Intent, Outcome, State
from weights.version import WeightVersion

PROTOCOL = 2
"""Both ends must speak the same; it changes with any message, with the digest, and with the packing of buckets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """What all messages have."""

    sequence: int
    """Counts a connection's requests from 1; a reply repeats it. 0: a refusal of something that could not be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hello(Message):
    """Opens a publisher's connection, and each update on it."""

    protocol: int
    publisher: str
    """Who it is, for the message that turns a second one away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer(Message):
    """An update, whole, before any of its bytes."""

    update: str
    run: str
    step: int
    base: Digest | None
    """The content that a subset update builds on; None for a full one."""
    bucket_bytes: int
    """With the manifest's order, this gives the buckets: both ends run `bucket.pack`."""
    manifest: Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage(Message):
    """A bucket's segment, which travels beside the frame."""

    update: str
    bucket: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote(Message):
    """Are all bytes there, and are they the manifest's?"""

    update: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit(Message):
    """Every host has voted: write."""

    update: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Abort(Message):
    """Forget this update. Never sent once a Commit of it was."""

    update: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask(Message):
    """A sibling that voted and lost its publisher: how did this update end with you?"""

    update: str
    asker: str
    intent: Intent


@dataclass(frozen=True, kw_only=True, slots=True)
class Welcome(Message):
    """To Hello: the host as it stands."""

    protocol: int
    host: str
    state: State
    version: WeightVersion | None
    """None for a torn host: it has none."""
    layout: str
    """`HostedLayout.digest`."""
    tied: Mapping[str, str]
    """Wire names that the host does not want, each with the one that hosts its content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Offered(Message):
    """To Offer: it fits."""

    update: str
    buckets: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Staged(Message):
    """To Stage: mapped and hashed."""

    update: str
    bucket: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Voted(Message):
    """To Vote: yes. A no is Refused."""

    update: str
    digest: Digest
    """Of the bytes that the host holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed(Message):
    """To Commit: the new version serves."""

    update: str
    version: WeightVersion
    pause_s: float
    """Seconds in which no engine step could run."""
    copy_s: float
    verify_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Aborted(Message):
    """To Abort: the host holds nothing of that update."""

    update: str
    state: State
    version: WeightVersion | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer(Message):
    """To Ask."""

    update: str
    host: str
    outcome: Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Refused(Message):
    """To anything: no, and why."""

    update: str
    """Empty where the request has none or could not be read."""
    state: State
    reason: str


Request = Hello | Offer | Stage | Vote | Commit | Abort | Ask
Reply = Welcome | Offered | Staged | Voted | Committed | Aborted | Answer | Refused

KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        *(Hello, Offer, Stage, Vote, Commit, Abort, Ask),
        *(Welcome, Offered, Staged, Voted, Committed, Aborted, Answer, Refused),
    )
}
