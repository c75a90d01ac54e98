"""Gathers a learner's tensors into segments and takes their digests.

This is the publisher's share of an update whose bytes are staged in shared memory, before any host hears of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weights.bucket import Packer
from weights.cargo import Segment
from weights.catalogue import Catalogue, TensorSpec
from weights.digest import BLOCK_BYTES, Digest, TensorHash, tensor_digest, wire_bytes
from weights.digests import Digests
from weights.held import untied_error
from weights.manifest import Manifest
from weights.naming import to_wire
from weights.source import Source, named_pairs
from weights.transports.seam import Transport


@dataclass(frozen=True, slots=True)
class Gathered:
    """An update's bytes, in segments, and what they are."""

    manifest: Manifest
    segments: tuple[Segment, ...]
    """One per bucket."""


class SegmentPool:
    """Segments of one size, kept from one update to the next so that their pages are touched only once."""

    def __init__(self, transport: Transport, size: int) -> None:
        self._transport = transport
        self._size = size
        self._segments: list[Segment] = []

    def take(self, bucket: int, *, from_device: bool) -> Segment:
        """The segment of this bucket; buckets are taken in order. from_device: a GPU is to write into it."""
        if bucket == len(self._segments):
            self._segments.append(self._transport.segment(self._size))
        if from_device:
            self._segments[bucket].lock()
        return self._segments[bucket]

    def drop(self) -> None:
        """A host may still read them: never write into them again."""
        for segment in self._segments:
            segment.close()
        self._segments = []


def gather(source: Source, tied: Mapping[str, str], pool: SegmentPool, bucket_bytes: int) -> Gathered:
    """Copies every tensor of `source` once, as contiguous wire bytes in its own dtype, and hashes it.

    tied: wire names that the hosts do not want, with the names that host their content; they are left out if the
    bytes are the same. ValueError if they are not, for a sharded tensor, and for a dtype that the wire does not know.
    """
    packer = Packer(bucket_bytes)
    specs: list[TensorSpec] = []
    lanes: list[Tensor] = []
    segments: list[Segment] = []
    repeated: dict[str, Digest] = {}
    devices: set[torch.device] = set()
    with named_pairs(source) as pairs:
        for name, tensor in to_wire(pairs, keep_tied=True):
            if name in tied:
                # Hashed at once: a learner that gathers one tensor at a time may not keep this one until the other
                # comes.
                repeated[name] = tensor_digest(tied[name], tensor)
                continue
            content = tensor.contiguous()
            on_device = content.device.type != "cpu"
            devices.add(content.device)
            data = wire_bytes(content)
            function = TensorHash(name, content.shape, content.dtype)
            specs.append(TensorSpec(name=name, shape=tuple(content.shape), dtype=content.dtype))
            lanes.append(torch.zeros(2, dtype=torch.int64, device=content.device))
            for piece in packer.place(data.numel()):
                if piece.bucket == len(segments) or (on_device and piece.bucket == len(segments) - 1):
                    segment = pool.take(piece.bucket, from_device=on_device)
                    segments[piece.bucket :] = [segment]
                place = segments[piece.bucket].data[piece.bucket_offset : piece.bucket_offset + piece.bytes]
                part = data[piece.tensor_offset : piece.tensor_offset + piece.bytes]
                place.copy_(part, non_blocking=on_device)
                # A device hashes what it has at hand; what arrived, the hosts hash.
                lanes[-1] += function.lanes(part if on_device else place, piece.tensor_offset // BLOCK_BYTES)
    for device in devices:
        if device.type != "cpu":
            torch.cuda.synchronize(device)
    catalogue = Catalogue(specs)
    found = torch.stack([lane.cpu() for lane in lanes]) if lanes else torch.zeros(0, 2, dtype=torch.int64)
    manifest = Manifest(catalogue, Digests.of_lanes(found + catalogue.headers))
    places = catalogue.places
    untied = {
        name: tied[name]
        for name, digest in repeated.items()
        if tied[name] not in places or manifest.digests[places[tied[name]]] != digest
    }
    if untied:
        raise untied_error(untied)
    return Gathered(manifest, tuple(segments))
