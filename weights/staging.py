"""StagedUpdate: one update on a host, from its offer until it is written or forgotten.

It knows bytes and digests, and neither states nor messages.
"""

from collections.abc import Callable

from weights.digests import Digests
from weights.manifest import Manifest
from weights.messages import Offer
from weights.payload import Payload
from weights.placement import Placement
from weights.version import WeightVersion


class StagedUpdate:
    """What an update holds, where it goes, what the host holds after it, and its bytes as they arrive."""

    def __init__(self, offer: Offer, *, content: Manifest, placement: Placement, payload: Payload) -> None:
        """content: of the host after the commit; more than the offer's tensors if that is a subset. ValueError if its
        version is none."""
        self.offer = offer
        self.content = content
        self.placement = placement
        self.payload = payload
        self.version = WeightVersion(run=offer.run, step=offer.step, digest=content.digest)

    def faults(self) -> list[str]:
        """What keeps a host from voting: parts that did not arrive, or else tensors whose bytes are others."""
        missing = [f"bucket {part}: did not arrive" for part in self.payload.missing()]
        if missing:
            return missing
        found = self.payload.found()
        return [] if found is None else self._differing(found, lambda place: "the bytes that arrived have")

    def live_faults(self) -> list[str]:
        """Names the tensors whose place in the parameters does not hold what the manifest says, to the last bit."""
        targets = self.placement.targets
        return self._differing(self.placement.live(), lambda place: f"{targets[place].parameter} has")

    def _differing(self, found: Digests, what: Callable[[int], str]) -> list[str]:
        tensors, expected = self.placement.catalogue.tensors, self.offer.digests
        return [
            f"{tensors[place].name}: {what(place)} digest {found[place]}, the manifest says {expected[place]}"
            for place in found.differing(expected)
        ]
