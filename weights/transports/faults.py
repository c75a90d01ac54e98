"""What may happen to messages in the in-process transport."""

from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from weights.catalogue import Catalogue
from weights.digests import Digests
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


def mangled(
    fault: FaultKind | None, request: Request, served: WeightVersion | None, known: Catalogue | None
) -> Request:
    """The request with its content changed, where the fault is one of an offer. known: the catalogue that the host has
    heard of, for an offer that does not repeat it."""
    if not isinstance(request, Offer):
        return request
    if fault is FaultKind.STALE_STEP:
        return request if served is None else replace(request, run=served.run, step=served.step)
    catalogue = known if request.tensors is None else request.tensors
    if catalogue is None:
        return request
    tensors, digests = list(catalogue.tensors), [request.digests[n] for n in range(len(request.digests))]
    match fault:
        case FaultKind.WRONG_DTYPE:
            tensors[0] = replace(tensors[0], dtype=torch.int8)
        case FaultKind.WRONG_SHAPE:
            tensors[0] = replace(tensors[0], shape=(1, *tensors[0].shape))
        case FaultKind.UNKNOWN_NAME:
            tensors.append(replace(tensors[0], name="model.unheard_of.weight"))
            digests.append(digests[0])
        case FaultKind.MISSING_NAME:
            del tensors[0], digests[0]
        case FaultKind.REPEATED_NAME:
            tensors.append(tensors[0])
            digests.append(digests[0])
        case _:
            return request
    changed = Catalogue(tensors)
    return replace(request, catalogue=changed.id, tensors=changed, digests=Digests.of(digests))


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
