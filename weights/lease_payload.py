"""LeasePayload: bytes that are read where the learner has them, in memory that is opened once for many updates."""

import torch
from torch import Tensor

from weights.aside import aside
from weights.catalogue import Catalogue
from weights.digests import Digests
from weights.errors import ManifestError
from weights.laid import laid
from weights.lease import Lease
from weights.payload import Hashing
from weights.placement import Placement
from weights.reach import OpenMemory, Reach


class OpenLease:
    """A learner's memory, opened once, and a catalogue's tensors in it."""

    def __init__(self, lease: Lease, catalogue: Catalogue, reach: Reach, device: torch.device) -> None:
        """ManifestError if it is not that catalogue's, TransportError if a memory cannot be opened."""
        pieces = lease.pieces(catalogue)
        self.id = lease.id
        self.catalogue = lease.catalogue
        self._memories: list[OpenMemory] = []
        try:
            for memory in lease.memories:
                self._memories.append(reach.open(memory))
            short = [
                f"memory {place} has {opened.data.numel()} bytes, expected {memory.bytes}"
                for place, (opened, memory) in enumerate(zip(self._memories, lease.memories, strict=True))
                if opened.data.numel() < memory.bytes
            ]
            if short:
                raise ManifestError("the lease is of more memory than there is: " + "; ".join(short))
            self.tensors = laid(catalogue, pieces, [memory.data for memory in self._memories], device)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        while self._memories:
            self._memories.pop().close()


class LeasePayload:
    """Everything at once, where the learner has it."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._lease: OpenLease | None = None
        self._hashing = Hashing(placement.catalogue, placement.device)
        self.stages = 1

    def stage(self, part: int, segment: Tensor | None) -> None:
        raise ManifestError("a leased update is staged by its lease, and none came")

    def read(self, part: int, lease: OpenLease) -> None:
        """Hashes the learner's memory; once. ManifestError if there is no such part."""
        if part >= self.stages:
            raise ManifestError(f"part {part} is none of a leased update's {self.stages}")
        if self._lease is None:
            self._hashing.add(lease.tensors)
            self._lease = lease

    def missing(self) -> list[int]:
        return [0] if self._lease is None else []

    def found(self) -> Digests:
        return self._hashing.digests()

    def ready(self) -> None:
        assert self._lease is not None
        self._lease.tensors.ready(self._placement)

    def write(self) -> None:
        assert self._lease is not None
        with aside(self._placement.device):
            self._lease.tensors.copy_to(self._placement)
