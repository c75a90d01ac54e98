"""Known: what a host keeps of its learner between updates, so that none of it costs time again.

Catalogues that were planned and placed, the lease that is open, the way that was joined, and the memory that buckets
pass through. The learner's memory and wires are let go when its connection ends.
"""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from weights.aside import aside, settled
from weights.bucket import Bucket, pack
from weights.delivery import Delivery
from weights.errors import ManifestError
from weights.laid import Laid
from weights.lease_payload import LeasePayload, OpenLease
from weights.messages import Join, Offer, Stage
from weights.naming import HostedLayout
from weights.payload import Payload, in_slots
from weights.placement import Placement
from weights.reach import Reach
from weights.staged_payload import SegmentPayload, Shadow, ShadowPayload
from weights.stream_payload import StreamPayload
from weights.way import SlotWay, Way, WireWay

KEPT_CATALOGUES = 4
"""A full one and some subsets; the one that was used longest ago goes first."""


class Known:
    """Of one host. Not for several threads."""

    def __init__(self, host: str, layout: HostedLayout, parameters: Mapping[str, Tensor], reach: Reach) -> None:
        self._host = host
        self._layout = layout
        self._parameters = parameters
        self._reach = reach
        self._device: torch.device = next(iter(parameters.values())).device
        self._placements: OrderedDict[tuple[str, bool], Placement] = OrderedDict()
        self._buckets: dict[tuple[str, int], tuple[Bucket, ...]] = {}
        self._laid: dict[tuple[str, int, tuple[int, ...]], tuple[Laid, ...]] = {}
        self._lease: OpenLease | None = None
        self._way: Way | None = None
        self._slots: tuple[Tensor, ...] = ()
        """Of the host's own, through which segments pass."""
        self._shadow: tuple[int, Shadow] | None = None
        self.catalogue = ""
        """The last one that this learner offered."""

    @property
    def lease(self) -> str:
        """The id of the one that is open."""
        return "" if self._lease is None else self._lease.id

    @property
    def way(self) -> str:
        """The name of the one that was joined and works."""
        return "" if self._way is None or not self._way.works else self._way.name

    def placement(self, offer: Offer) -> Placement:
        """Of the offer's catalogue. ManifestError if it does not fit, or is not known and not given."""
        key = offer.catalogue, offer.base is not None
        found = self._placements.get(key)
        if found is None:
            other = self._placements.get((offer.catalogue, not key[1]))  # a full update's may come as a subset, too
            tensors = other.catalogue if offer.tensors is None and other is not None else offer.tensors
            if tensors is None:
                raise ManifestError(f"knows no catalogue {offer.catalogue:.8}: offer its tensors")
            if tensors.id != offer.catalogue:
                raise ManifestError(f"the tensors are catalogue {tensors.id:.8}, not {offer.catalogue:.8}")
            found = Placement(tensors, self._layout, self._parameters, subset=key[1])
            self._placements[key] = found
            while len(self._placements) > KEPT_CATALOGUES:
                self._drop(self._placements.popitem(last=False)[0][0])
        self._placements.move_to_end(key)
        self.catalogue = offer.catalogue
        return found

    def payload(self, offer: Offer, placement: Placement) -> Payload:
        """For the bytes of an update. ValueError for a bucket's size that is none, ManifestError where its way was not
        joined."""
        if offer.delivery is Delivery.LEASE:
            return LeasePayload(placement)
        buckets = self._packed(offer, placement)
        if offer.delivery is Delivery.STREAM:
            way = self._joined()
            return StreamPayload(placement, buckets, self._in_slots(offer, placement, buckets, way.slots), way)
        shadowed = offer.delivery is Delivery.SHADOW
        slots = self._joined().slots if shadowed else self._own_slots(offer.bucket_bytes)
        if self._device.type == "cpu":
            slots = ()  # a CPU reads segments where they are
        in_them = self._in_slots(offer, placement, buckets, slots) if slots else ()
        inner = SegmentPayload(placement, buckets, slots, in_them)
        if not shadowed:
            return inner
        return ShadowPayload(inner, buckets, self._joined(), self._own_shadow(offer.bucket_bytes))

    def join(self, join: Join) -> str:
        """Joins the way, in place of an earlier one; its name. TransportError if it cannot be joined."""
        terms = join.wire if join.slots is None else join.slots
        if terms is not None and self.way and terms.name == self.way:
            return terms.name  # the request came twice: nobody waits there any more
        self._leave()
        if join.slots is not None:
            self._way = SlotWay(join.slots, self._reach)
        elif join.wire is not None:
            with aside(self._device):
                self._way = WireWay(join.wire, self._host, self._reach, self._device)
        else:
            raise ManifestError("a way is a wire or slots, and neither came")
        return self._way.name

    def opened(self, stage: Stage, placement: Placement) -> OpenLease:
        """The lease of a Stage, opened now unless it is. ManifestError or TransportError if that cannot be."""
        if self._lease is None or self._lease.id != stage.lease:
            if stage.terms is None:
                raise ManifestError(f"holds no lease {stage.lease:.8}: send its terms")
            if stage.terms.id != stage.lease:
                raise ManifestError(f"the terms are of lease {stage.terms.id:.8}, not {stage.lease:.8}")
            self._end_lease()
            self._lease = OpenLease(stage.terms, placement.catalogue, self._reach, self._device)
        if self._lease.catalogue != placement.catalogue.id:
            raise ManifestError(
                f"lease {stage.lease:.8} is of catalogue {self._lease.catalogue:.8}, the update of "
                f"{placement.catalogue.id:.8}"
            )
        return self._lease

    def forget_learner(self) -> None:
        """Its connection ended: lets go of its memory and its wire, and of what its segments passed through."""
        settled(self._device)  # whatever still reads its segments does so until then
        self._end_lease()
        self._leave()
        self._drop_slots()
        self.catalogue = ""

    def _packed(self, offer: Offer, placement: Placement) -> tuple[Bucket, ...]:
        key = offer.catalogue, offer.bucket_bytes
        if key not in self._buckets:
            self._buckets[key] = pack(placement.catalogue, offer.bucket_bytes)
        return self._buckets[key]

    def _in_slots(
        self, offer: Offer, placement: Placement, buckets: tuple[Bucket, ...], slots: tuple[Tensor, ...]
    ) -> tuple[Laid, ...]:
        key = offer.catalogue, offer.bucket_bytes, tuple(slot.data_ptr() for slot in slots)
        if key not in self._laid:
            self._laid[key] = in_slots(placement, buckets, slots)
        return self._laid[key]

    def _joined(self) -> Way:
        if self._way is None or not self._way.works:
            raise ManifestError("has joined no way for buckets that works: join first")
        return self._way

    def _own_slots(self, size: int) -> tuple[Tensor, ...]:
        """One is enough: what is copied into it and out of it goes through one stream."""
        if self._device.type == "cpu":
            return ()
        if not self._slots or self._slots[0].numel() != size:
            self._drop_slots()
            with aside(self._device):
                self._slots = (torch.empty(size, dtype=torch.uint8, device=self._device),)
        return self._slots

    def _drop_slots(self) -> None:
        addresses = {slot.data_ptr() for slot in self._slots}
        self._laid = {key: value for key, value in self._laid.items() if not addresses & set(key[2])}
        self._slots = ()

    def _own_shadow(self, size: int) -> Shadow:
        if self._shadow is None or self._shadow[0] != size:
            self._shadow = size, Shadow(size, self._device)
        return self._shadow[1]

    def _end_lease(self) -> None:
        if self._lease is not None:
            settled(self._device)  # what still reads it does so until then
            self._lease.close()
            self._lease = None

    def _leave(self) -> None:
        if self._way is not None:
            settled(self._device)
            self._way.close()
            self._way = None
            self._laid = {}

    def _drop(self, catalogue: str) -> None:
        self._buckets = {key: value for key, value in self._buckets.items() if key[0] != catalogue}
        self._laid = {key: value for key, value in self._laid.items() if key[0] != catalogue}
