"""Manifest: what an update holds. A catalogue of tensors, and the digest of each."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from weights.catalogue import Catalogue, TensorSpec
from weights.digest import Digest
from weights.digests import Digests
from weights.errors import ManifestError


@dataclass(frozen=True)
class Manifest:
    """The content of an update. ManifestError unless there is a digest for each tensor."""

    catalogue: Catalogue
    digests: Digests
    """`tensor_digest` of each tensor, in the catalogue's order."""

    def __post_init__(self) -> None:
        if len(self.catalogue) != len(self.digests):
            raise ManifestError(f"{len(self.catalogue)} tensors and {len(self.digests)} digests: one is missing")

    @cached_property
    def digest(self) -> Digest:
        """The sum of its tensors' digests: the same in whatever order they come."""
        return self.digests.total

    @property
    def bytes(self) -> int:
        """The size of all tensors on the wire."""
        return self.catalogue.bytes

    def patched(self, subset: "Manifest") -> "Manifest":
        """This content with the tensors of `subset` in place of those of the same names.

        ManifestError naming those that are not in here.
        """
        places = self.catalogue.places
        unknown = [tensor.name for tensor in subset.catalogue.tensors if tensor.name not in places]
        if unknown:
            raise ManifestError(f"the base of this subset has no such tensors: {', '.join(unknown)}")
        at = [places[tensor.name] for tensor in subset.catalogue.tensors]
        lanes_N2 = self.digests.lanes
        lanes_N2[at] = subset.digests.lanes
        catalogue = self.catalogue
        changed = [
            (place, tensor)
            for place, tensor in zip(at, subset.catalogue.tensors, strict=True)
            if catalogue.tensors[place] != tensor
        ]
        if changed:  # another dtype on the wire than the base's
            tensors = list(catalogue.tensors)
            for place, tensor in changed:
                tensors[place] = tensor
            catalogue = Catalogue(tensors)
        return Manifest(catalogue, Digests.of_lanes(lanes_N2))

    @classmethod
    def of(cls, pairs: Iterable[tuple[TensorSpec, Digest]]) -> "Manifest":
        """From tensors with their digests."""
        listed = list(pairs)
        return cls(Catalogue(spec for spec, _ in listed), Digests.of(digest for _, digest in listed))
