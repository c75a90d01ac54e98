"""Held: a learner's tensors where they are, as an update's content. Python looks at each of them once, not per update.

Legend: N tensors of the catalogue, 2 lanes of a digest.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weights.aside import aside, settled
from weights.bucket import Bucket, Piece, pack
from weights.catalogue import Catalogue, TensorSpec
from weights.digest import tensor_digest, wire_bytes
from weights.digests import Digests
from weights.laid import Laid, laid
from weights.naming import to_wire
from weights.source import Named
from weights.spans import Form

if TYPE_CHECKING:
    from weights.kernel_copy import CopyTable


class Held:
    """Named tensors that stay where they are, contiguous and on one device.

    It holds on to them from its making, or `take`, to `let_go`; between updates a learner may free them, and whoever
    brings the same memory again is spared all the work.

    Args:
        named: a learner's state dict, under its own names.
        tied: wire names that the hosts do not want, with the names that host their content.

    Raises:
        ValueError: a tensor is sharded, not contiguous, or on another device than the rest.
    """

    def __init__(self, named: Named, tied: Mapping[str, str]) -> None:
        self._print = [(name, _identity(tensor)) for name, tensor in named.items()]
        self._named: Named = named
        self._tied = frozenset(tied)
        wire = list(to_wire(named.items(), keep_tied=True))
        kept = [(name, tensor) for name, tensor in wire if name not in tied]
        devices = {tensor.device for _, tensor in kept}
        faults = [f"{name}: not contiguous" for name, tensor in kept if not tensor.is_contiguous()]
        if faults or len(devices) != 1:
            raise ValueError(
                f"these tensors cannot be sent from where they are (on {', '.join(map(str, devices)) or 'no device'}):"
                + "".join(f"\n  {fault}" for fault in faults)
            )
        self.device: torch.device = devices.pop()
        self.catalogue = Catalogue(
            TensorSpec(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype) for name, tensor in kept
        )
        self._data: tuple[Tensor, ...] = tuple(wire_bytes(tensor) for _, tensor in kept)
        self._addresses = [data.data_ptr() for data in self.data]
        places = self.catalogue.places
        self._apart = {
            name: tied[name]
            for name, tensor in wire
            if name in tied
            if tied[name] not in places or _identity(kept[places[tied[name]]][1]) != _identity(tensor)
        }
        """Tied tensors that are no second name of the same memory: their content is compared in each update."""
        pieces = [Piece(place, 0, place, 0, data.numel()) for place, data in enumerate(self.data) if data.numel()]
        self._laid: Laid = laid(self.catalogue, pieces, self.data, self.device)
        self._fills: dict[tuple[int, int, int], CopyTable] = {}
        self._buckets: dict[int, tuple[Bucket, ...]] = {}

    def take(self, named: Named) -> bool:
        """Whether these are the same names with the same memory; they are held again then."""
        # Nothing here outlives its turn of the loop: tens of thousands of new objects would call Python's collector,
        # which takes longer in a large learner than all the rest of an update.
        if len(named) != len(self._print) or not all(
            name == known and _identity(tensor) == identity
            for (name, tensor), (known, identity) in zip(named.items(), self._print, strict=True)
        ):
            return False
        self._named = named
        return True

    @property
    def data(self) -> tuple[Tensor, ...]:
        """The bytes of each tensor, in the catalogue's order; flat uint8, no copies. Empty after `let_go`."""
        if not self._data and self._named:  # taken again, which does not look at each of them until it has to
            wire = to_wire(self._named.items(), keep_tied=True)
            self._data = tuple(wire_bytes(tensor) for name, tensor in wire if name not in self._tied)
        return self._data

    def let_go(self) -> None:
        """Holds on to nothing. On a CPU it is of no more use."""
        self._named, self._data = {}, ()
        self._laid.let_go()

    def digests(self) -> Digests:
        """Of what the tensors hold now; waits for whatever the device was doing.

        ValueError for a tied tensor that is not the same as the one that it is tied to.
        """
        settled(self.device)
        with aside(self.device):
            lanes_N2 = self.catalogue.headers.to(self.device, copy=True)
            self._laid.add_lanes(lanes_N2)
            found = Digests.of_lanes(lanes_N2)
        places, tensors = self.catalogue.places, self._named
        untied = {
            name: host
            for name, host in self._apart.items()
            if host not in places or tensor_digest(host, tensors[name]) != found[places[host]]
        }
        if untied:
            raise untied_error(untied)
        return found

    def buckets(self, bucket_bytes: int) -> tuple[Bucket, ...]:
        """As `bucket.pack` has them."""
        if bucket_bytes not in self._buckets:
            self._buckets = {bucket_bytes: pack(self.catalogue, bucket_bytes)}
        return self._buckets[bucket_bytes]

    def fill(self, index: int, bucket_bytes: int, slot: Tensor) -> None:
        """Copies a bucket into flat memory and waits for it."""
        bucket = self.buckets(bucket_bytes)[index]
        if self.device.type == "cpu" or self.device != slot.device:
            for piece in bucket.pieces:
                source = self.data[piece.tensor][piece.tensor_offset : piece.tensor_offset + piece.bytes]
                slot[piece.bucket_offset : piece.bucket_offset + piece.bytes].copy_(source)
            return
        key = index, bucket_bytes, slot.data_ptr()
        with aside(slot.device):
            if key not in self._fills:
                self._fills[key] = self._fill_table(bucket, slot)
            self._fills[key].run()
            torch.cuda.current_stream(slot.device).synchronize()

    def forget_fills(self) -> None:
        """The slots that it filled are no more."""
        self._fills.clear()

    def _fill_table(self, bucket: Bucket, slot: Tensor) -> "CopyTable":
        from weights.kernel_copy import CopyTable  # Triton, which a CPU learner does without

        rows = [
            (self._addresses[piece.tensor] + piece.tensor_offset, slot.data_ptr() + piece.bucket_offset, piece.bytes)
            for piece in bucket.pieces
        ]
        source_R, target_R, bytes_R = torch.tensor(rows, dtype=torch.int64).view(-1, 3).unbind(1)
        return CopyTable(source_R, target_R, bytes_R, torch.full_like(bytes_R, Form.SAME), device=slot.device)


def _identity(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...], torch.dtype]:
    """Equal for the same memory, seen alike; not a word about content."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def untied_error(tied: Mapping[str, str]) -> ValueError:
    """For tensors that the hosts tie and that differ in the learner."""
    return ValueError(
        "the hosts tie these tensors and the learner does not; send the same bytes for both or leave one out: "
        + ", ".join(f"{name} = {host}" for name, host in tied.items())
    )
