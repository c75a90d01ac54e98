"""What the publisher, the hosts and their siblings say to each other; `codec.py` has the frames it travels in.

publisher -> host    Hello   Join   Offer   Stage  Vote  Commit            Abort   sibling -> host   Ask
host -> publisher    Welcome Joined Offered Staged Voted Committed         Aborted host -> sibling   Answer
                     Refused: to any of them

Where the bytes come only after the votes (Delivery.STREAM), a commit is three requests:

publisher -> host    Commit  Deliver, bucket after bucket  Finish
host -> publisher    Begun   Delivered                     Committed
"""

from collections.abc import Mapping
from dataclasses import dataclass

from weights.catalogue import Catalogue
from weights.delivery import Delivery
from weights.digest import Digest
from weights.digests import Digests
from weights.lease import Lease, SlotTerms, WireTerms
from weights.state import Intent, Outcome, State
from weights.version import WeightVersion

PROTOCOL = 3
"""Both ends must speak the same; it changes with any message, with the digest, and with the packing of buckets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """What all messages have."""

    sequence: int
    """Counts a connection's requests from 1; a reply repeats it. 0: a refusal of something that could not be read."""


SIBLING = "a sibling that shares "
"""How a publisher that is a host itself begins to say who it is."""


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
    delivery: Delivery
    """How its bytes come."""
    bucket_bytes: int
    """With the catalogue's order, this gives the buckets: both ends run `bucket.pack`."""
    catalogue: str
    """`Catalogue.id` of its tensors."""
    tensors: Catalogue | None
    """They themselves; None for a catalogue that every host has said it knows."""
    digests: Digests
    """Of the tensors, in the catalogue's order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage(Message):
    """Some of an update's bytes: a bucket's segment, which travels beside the frame; a bucket that comes over the
    wire as soon as the host waits for it; or the learner's lease, which is all of them."""

    update: str
    bucket: int
    lease: str = ""
    """`Lease.id`; empty where the bytes are not leased."""
    terms: Lease | None = None
    """The lease itself; None for one that every host has said it holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Join(Message):
    """Opens the way that buckets take, for this and later updates: a wire that all hosts and the learner are on, or
    two buckets in the learner's device memory."""

    wire: WireTerms | None
    slots: SlotTerms | None
    """One of the two."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vote(Message):
    """Are all bytes there, and are they the manifest's?"""

    update: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit(Message):
    """Every host has voted: write; where the bytes are still to come, pause and wait for them."""

    update: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Deliver(Message):
    """A bucket of a streamed update is on its way, or lies in its slot: write it. From the first on there is no way
    back."""

    update: str
    bucket: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish(Message):
    """All buckets of a streamed update were delivered: verify, and serve it."""

    update: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Abort(Message):
    """Forget this update. Never sent once a Commit of it was; of a streamed one, once a Deliver was."""

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
    catalogue: str
    """The last one that this publisher's connection offered; empty without one."""
    lease: str
    """The one that the host holds open; empty without one."""
    way: str
    """The name of the wire or the slots that it has joined and that still work; empty without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined(Message):
    """To Join: the way is open."""

    way: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Offered(Message):
    """To Offer: it fits."""

    update: str
    stages: int
    """How many Stage requests it takes before the vote."""
    content: Digest
    """What the host holds after the commit; of a full update, the sum of the digests."""


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
    """Of the bytes that the host holds or reads; of a streamed update, of those that it waits for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun(Message):
    """To Commit of a streamed update: no step runs, and nothing is written yet."""

    update: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivered(Message):
    """To Deliver: the bucket is here, and its slot is free."""

    update: str
    bucket: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed(Message):
    """To Commit, or to Finish: the new version serves."""

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


Request = Hello | Join | Offer | Stage | Vote | Commit | Deliver | Finish | Abort | Ask
Reply = Welcome | Joined | Offered | Staged | Voted | Begun | Delivered | Committed | Aborted | Answer | Refused

KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        *(Hello, Join, Offer, Stage, Vote, Commit, Deliver, Finish, Abort, Ask),
        *(Welcome, Joined, Offered, Staged, Voted, Begun, Delivered, Committed, Aborted, Answer, Refused),
    )
}
