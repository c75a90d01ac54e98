"""What a learner lets its hosts read or join: leased memory, slots for buckets, a wire. Plain data, checked on arrival.

A handle is text that means something to whoever opens it (`reach.Reach`): on a GPU, a CUDA IPC handle in hexadecimal.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from weights.bucket import Piece
from weights.catalogue import Catalogue
from weights.errors import ManifestError

MAX_HANDLE_CHARACTERS = 512


@dataclass(frozen=True, slots=True)
class Memory:
    """A stretch of a learner's memory."""

    handle: str
    identity: str
    """Differs from that of any other memory of the learner, also of one that had its address before."""
    bytes: int

    def to_plain(self) -> list[object]:
        return [self.handle, self.identity, self.bytes]


@dataclass(frozen=True)
class Lease:
    """Where a catalogue's tensors lie in a learner's memory, whole and contiguous."""

    catalogue: str
    """`Catalogue.id`."""
    memories: tuple[Memory, ...]
    places: tuple[tuple[int, int], ...]
    """For each tensor, in the catalogue's order: which memory, and its first byte in it."""

    @cached_property
    def id(self) -> str:
        """32 hexadecimal digits: two leases share them if they lease the same memory for the same tensors."""
        return hashlib.blake2b(json.dumps(self.to_plain()).encode(), digest_size=16).hexdigest()

    def pieces(self, catalogue: Catalogue) -> tuple[Piece, ...]:
        """A piece per tensor; its bucket counts the memories.

        ManifestError if this is no lease of that catalogue, or leads out of its memories.
        """
        if self.catalogue != catalogue.id or len(self.places) != len(catalogue):
            raise ManifestError(
                f"the lease is of {len(self.places)} tensors of catalogue {self.catalogue:.8}, "
                f"the update of {len(catalogue)} of {catalogue.id:.8}"
            )
        pieces, faults = [], []
        for place, (tensor, (memory, offset)) in enumerate(zip(catalogue.tensors, self.places, strict=True)):
            if memory >= len(self.memories) or offset + tensor.bytes > self.memories[memory].bytes:
                faults.append(f"{tensor.name}: {tensor.bytes} bytes from byte {offset} of memory {memory}")
            elif tensor.bytes:
                pieces.append(Piece(place, 0, memory, offset, tensor.bytes))
        if faults:
            raise ManifestError("the lease leads out of its memory:\n  " + "\n  ".join(faults))
        return tuple(pieces)

    def to_plain(self) -> dict[str, object]:
        """As JSON can hold it; `from_plain` is its inverse."""
        return {
            "catalogue": self.catalogue,
            "memories": [memory.to_plain() for memory in self.memories],
            "places": [list(place) for place in self.places],
        }

    @classmethod
    def from_plain(cls, plain: object) -> "Lease":
        """ManifestError for anything that `to_plain` does not give."""
        match plain:
            case {"catalogue": str(catalogue), "memories": [*memories], "places": [*places], **rest} if not rest:
                return cls(catalogue, _memories(memories), tuple(_place(place) for place in places))
        raise ManifestError(f"a lease has a catalogue, memories and places, got {plain!r:.200}")


@dataclass(frozen=True, slots=True)
class SlotTerms:
    """Buckets in a learner's device memory that are filled again and again: bucket n of an update lies in slot n mod
    their number."""

    name: str
    memories: tuple[Memory, ...]

    def to_plain(self) -> dict[str, object]:
        """As JSON can hold it; `from_plain` is its inverse."""
        return {"name": self.name, "memories": [memory.to_plain() for memory in self.memories]}

    @classmethod
    def from_plain(cls, plain: object) -> "SlotTerms":
        """ManifestError for anything that `to_plain` does not give."""
        match plain:
            case {"name": str(name), "memories": [_, *_] as memories, **rest} if not rest:
                return cls(name, _memories(memories))
        raise ManifestError(f"slots have a name and memories, got {plain!r:.200}")


@dataclass(frozen=True, slots=True)
class WireTerms:
    """Where and how a learner and its hosts meet on a wire: the learner is rank 0, the hosts follow in their order."""

    name: str
    store_host: str
    store_port: int
    backend: str
    hosts: tuple[str, ...]
    bucket_bytes: int

    def to_plain(self) -> dict[str, object]:
        """As JSON can hold it; `from_plain` is its inverse."""
        return {
            "name": self.name,
            "store": [self.store_host, self.store_port],
            "backend": self.backend,
            "hosts": list(self.hosts),
            "bucket_bytes": self.bucket_bytes,
        }

    @classmethod
    def from_plain(cls, plain: object) -> "WireTerms":
        """ManifestError for anything that `to_plain` does not give."""
        match plain:
            case {
                "name": str(name),
                "store": [str(host), int(port)],
                "backend": "nccl" | "gloo" as backend,
                "hosts": [_, *_] as hosts,
                "bucket_bytes": int(size),
                **rest,
            } if not rest and 0 < port < 1 << 16 and size > 0 and all(isinstance(h, str) for h in hosts):
                return cls(name, host, port, backend, tuple(hosts), size)
        raise ManifestError(f"a wire has a name, a store, a backend, hosts and a bucket's size, got {plain!r:.200}")


def _memories(plain: Sequence[object]) -> tuple[Memory, ...]:
    return tuple(_memory(row) for row in plain)


def _memory(plain: object) -> Memory:
    match plain:
        case [str(handle), str(identity), int(size)] if len(handle) <= MAX_HANDLE_CHARACTERS and size > 0:
            return Memory(handle, identity, size)
    raise ManifestError(f"a memory is [handle, identity, bytes], got {plain!r:.200}")


def _place(plain: object) -> tuple[int, int]:
    match plain:
        case [int(memory), int(offset)] if memory >= 0 and offset >= 0:
            return memory, offset
    raise ManifestError(f"a tensor's place is [memory, offset], got {plain!r:.80}")
