"""What may happen to messages in the in-process transport."""

from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from weights.manifest import Manifest
from weights.messages import Offer, Request
from weights.version import WeightVersion

Arrival = tuple[bytes, Tensor | None]
"""A frame and the segment beside it."""


class FaultKind(StrEnum):
    """What may happen to a message on its way."""

    DROP = "drop"
    DUPLICATE = "duplicate"
    REORDER = "reorder"
    """It arrives only after the next message in its direction."""
    TRUNCATE = "truncate"
    CORRUPT = "corrupt"
    """One bit of the frame flips."""
    DISCONNECT = "disconnect"
    """The connection ends in its place."""
    LOSE_SEGMENT = "lose segment"
    TRUNCATE_SEGMENT = "truncate segment"
    CORRUPT_SEGMENT = "corrupt segment"
    """One bit of the bucket's first tensor flips."""
    WRONG_DTYPE = "wrong dtype"
    WRONG_SHAPE = "wrong shape"
    UNKNOWN_NAME = "unknown name"
    MISSING_NAME = "missing name"
    REPEATED_NAME = "repeated name"
    STALE_STEP = "stale step"


CONNECTION_FAULTS = frozenset(
    {
        FaultKind.DROP,
        FaultKind.DUPLICATE,
        FaultKind.REORDER,
        FaultKind.TRUNCATE,
        FaultKind.CORRUPT,
        FaultKind.DISCONNECT,
    }
)
"""Those that may befall any message; the others need one that carries a segment (Stage) or a manifest (Offer)."""

SEGMENT_FAULTS = frozenset({FaultKind.LOSE_SEGMENT, FaultKind.TRUNCATE_SEGMENT, FaultKind.CORRUPT_SEGMENT})

OFFER_FAULTS = frozenset(FaultKind) - CONNECTION_FAULTS - SEGMENT_FAULTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What befalls the n-th request of a kind to one host, or the reply to it.

    ValueError for a kind of message that it cannot befall.
    """

    kind: FaultKind
    host: str
    message: str
    """The request's kind, as in `messages.KINDS`."""
    occurrence: int = 1
    """Counted from the injection."""
    reply: bool = False
    """Befalls the reply instead of the request."""

    def __post_init__(self) -> None:
        carrier = "Stage" if self.kind in SEGMENT_FAULTS else "Offer" if self.kind in OFFER_FAULTS else self.message
        if self.message != carrier or (self.reply and self.kind not in CONNECTION_FAULTS):
            raise ValueError(f"{self.kind} befalls the request {carrier} only, got {self}")


def befall(fault: FaultKind | None, arriving: Arrival, late: list[Arrival]) -> list[Arrival]:
    """What arrives of one message; what arrives with the next is put into `late`."""
    frame, rest = arriving
    match fault:
        case FaultKind.DROP:
            return []
        case FaultKind.DUPLICATE:
            return [arriving, arriving]
        case FaultKind.REORDER:
            late.append(arriving)
            return []
        case FaultKind.TRUNCATE:
            return [(frame[: len(frame) * 2 // 3], rest)]
        case FaultKind.CORRUPT:
            middle = len(frame) * 2 // 3
            return [(frame[:middle] + bytes([frame[middle] ^ 1]) + frame[middle + 1 :], rest)]
    return [arriving]


def mangled(fault: FaultKind | None, request: Request, served: WeightVersion | None) -> Request:
    """The request with its content changed, where the fault is one of an offer."""
    if not isinstance(request, Offer):
        return request
    entries = request.manifest.entries
    first = entries[0]
    match fault:
        case FaultKind.WRONG_DTYPE:
            entries = (replace(first, dtype=torch.int8), *entries[1:])
        case FaultKind.WRONG_SHAPE:
            entries = (replace(first, shape=(1, *first.shape)), *entries[1:])
        case FaultKind.UNKNOWN_NAME:
            entries = (*entries, replace(first, name="model.unheard_of.weight"))
        case FaultKind.MISSING_NAME:
            entries = entries[1:]
        case FaultKind.REPEATED_NAME:
            entries = (*entries, first)
        case FaultKind.STALE_STEP if served is not None:
            return replace(request, run=served.run, step=served.step)
    return replace(request, manifest=Manifest(entries))


def damaged(fault: FaultKind | None, segment: Tensor | None) -> Tensor | None:
    """The segment as one host sees it."""
    if segment is None or fault is FaultKind.LOSE_SEGMENT:
        return None
    match fault:
        case FaultKind.TRUNCATE_SEGMENT:
            return segment[:1]
        case FaultKind.CORRUPT_SEGMENT:
            damaged = segment.clone()
            damaged[0] ^= 1
            return damaged
    return segment
