"""StagedUpdate: one update on a host, from its offer until it is written or forgotten.

It knows bytes and digests, and neither states nor messages.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from weights.bucket import Bucket, Piece, pack
from weights.digest import BLOCK_BYTES, Digest, TensorHash, tensor_digest
from weights.errors import ManifestError
from weights.messages import Offer
from weights.naming import HostedLayout
from weights.plan import CopyPlan, PlannedCopy, plan
from weights.version import WeightVersion


class StagedUpdate:
    """The plan of an update, its segments as they arrive, and what their bytes hash to."""

    def __init__(self, offer: Offer, layout: HostedLayout) -> None:
        """ManifestError if the offer does not fit the layout, ValueError if its version or its buckets are none."""
        self.offer = offer
        self.version = WeightVersion(run=offer.run, step=offer.step, digest=offer.manifest.digest)
        self.buckets: tuple[Bucket, ...] = pack(offer.manifest, offer.bucket_bytes)
        self._plan: CopyPlan = plan(offer.manifest, layout)
        self._hashes = [TensorHash(entry.name, entry.shape, entry.dtype) for entry in offer.manifest.entries]
        self._digests = [function.header for function in self._hashes]
        self._segments: dict[int, Tensor] = {}

    def stage(self, bucket: int, segment: Tensor | None) -> None:
        """Keeps a bucket's segment (flat uint8) and hashes its blocks; a bucket that is here already is not taken
        again.

        ManifestError if there is no such bucket, or no segment, or one too short for it.
        """
        if bucket in self._segments:
            return
        if bucket >= len(self.buckets):
            raise ManifestError(f"bucket {bucket} is none of the update's {len(self.buckets)}")
        needed = self.buckets[bucket].bytes
        if segment is None:
            raise ManifestError(f"bucket {bucket} came without a segment")
        if segment.numel() < needed:
            raise ManifestError(
                f"the segment of bucket {bucket} has {segment.numel()} bytes, its tensors take {needed}"
            )
        for piece in self.buckets[bucket].pieces:
            function = self._hashes[piece.tensor]
            first_block = piece.tensor_offset // BLOCK_BYTES
            self._digests[piece.tensor] += function.blocks(_bytes_of(piece, segment), first_block)
        self._segments[bucket] = segment

    def faults(self) -> list[str]:
        """What keeps a host from voting: buckets that did not arrive, or else tensors whose bytes are others."""
        missing = [
            f"bucket {bucket}: did not arrive" for bucket in range(len(self.buckets)) if bucket not in self._segments
        ]
        if missing:
            return missing
        entries = self.offer.manifest.entries
        return [
            f"{entry.name}: the bytes that arrived have digest {found}, the manifest says {entry.digest}"
            for entry, found in zip(entries, self._digests, strict=True)
            if found != entry.digest
        ]

    @property
    def digest(self) -> Digest:
        """Of the bytes that arrived."""
        return Digest.total(self._digests)

    @torch.inference_mode()  # the parameters may be inference tensors, which nothing else may write to
    def write(self, parameters: Mapping[str, Tensor]) -> None:
        """Copies every tensor into its place. All buckets must be staged."""
        for bucket, segment in sorted(self._segments.items()):
            for piece in self.buckets[bucket].pieces:
                copy = self._plan.copies[piece.tensor]
                size = copy.entry.dtype.itemsize
                start = piece.tensor_offset // size
                # reshape gives a view, since hosted slices are contiguous; a copy would show in the digest of the live
                # parameters.
                target = copy.target.view(parameters).reshape(-1)[start : start + piece.bytes // size]
                target.copy_(_bytes_of(piece, segment).view(copy.entry.dtype))

    def live_faults(self, parameters: Mapping[str, Tensor]) -> Iterator[str]:
        """Names the tensors whose place in `parameters` does not hold what the manifest says, down to the last bit."""
        for copy in self._plan.copies:
            found = _live_digest(copy, parameters)
            if found != copy.entry.digest:
                place = copy.target.parameter
                yield f"{copy.entry.name}: {place} has digest {found}, the manifest says {copy.entry.digest}"


def _live_digest(copy: PlannedCopy, parameters: Mapping[str, Tensor]) -> Digest:
    return tensor_digest(copy.entry.name, copy.target.view(parameters), copy.entry.dtype)


def _bytes_of(piece: Piece, segment: Tensor) -> Tensor:
    return segment[piece.bucket_offset : piece.bucket_offset + piece.bytes]
