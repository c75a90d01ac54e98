"""Way: how buckets come to a host that shares no segments with its learner. It is joined once, for many updates."""

from typing import Protocol

import torch
from torch import Tensor

from weights.errors import MessageError, TransportError
from weights.lease import SlotTerms, WireTerms
from weights.reach import HostWire, OpenMemory, Reach


class Way(Protocol):
    """Buckets arrive in a fixed number of places, one after the other, round and round."""

    @property
    def name(self) -> str: ...

    @property
    def works(self) -> bool: ...

    @property
    def slots(self) -> tuple[Tensor, ...]:
        """Flat uint8; bucket n is in slot n mod their number."""
        ...

    def take(self, bucket: int, size: int) -> Tensor:
        """The first `size` bytes of a bucket's slot, once they are there. TransportError if they do not come."""
        ...

    def close(self) -> None: ...


class SlotWay:
    """Two buckets in the learner's device memory: a bucket is there when its message is."""

    def __init__(self, terms: SlotTerms, reach: Reach) -> None:
        self.name = terms.name
        self._opened: list[OpenMemory] = []
        try:
            for memory in terms.memories:
                self._opened.append(reach.open(memory))
        except BaseException:
            self.close()
            raise
        self.slots = tuple(opened.data for opened in self._opened)

    @property
    def works(self) -> bool:
        return bool(self._opened)

    def take(self, bucket: int, size: int) -> Tensor:
        slot = self.slots[bucket % len(self.slots)]
        if slot.numel() < size:
            raise TransportError(f"bucket {bucket} has {size} bytes and its slot {slot.numel()}")
        return slot[:size]

    def close(self) -> None:
        self.slots = ()
        while self._opened:
            self._opened.pop().close()


class WireWay:
    """A wire that brings every bucket into two places of the host's own."""

    def __init__(self, terms: WireTerms, host: str, reach: Reach, device: torch.device) -> None:
        if host not in terms.hosts:
            raise MessageError(f"a wire for {', '.join(terms.hosts)} does not reach {host}")
        self.name = terms.name
        self.slots = tuple(torch.empty(terms.bucket_bytes, dtype=torch.uint8, device=device) for _ in range(2))
        self._wire: HostWire = reach.join(terms, host)

    @property
    def works(self) -> bool:
        return self._wire.alive

    def take(self, bucket: int, size: int) -> Tensor:
        slot = self.slots[bucket % len(self.slots)]
        if slot.numel() < size:
            raise TransportError(f"bucket {bucket} has {size} bytes and its slot {slot.numel()}")
        self._wire.receive(slot[:size])
        return slot[:size]

    def close(self) -> None:
        self._wire.close()
        self.slots = ()
