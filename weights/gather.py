"""Gathers a learner's tensors into segments and takes their digests.

This is the publisher's share of an update, before any host hears of it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weights.bucket import Packer
from weights.digest import BLOCK_BYTES, Digest, TensorHash, tensor_digest, wire_bytes
from weights.manifest import Manifest, TensorEntry
from weights.naming import to_wire
from weights.transports.seam import Segment, Transport

Source = torch.nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
"""What may be published: a module, a state dict, or pairs of name and tensor that are gathered one by one."""


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

    def take(self, bucket: int) -> Segment:
        """The segment of this bucket; buckets are taken in order."""
        if bucket == len(self._segments):
            self._segments.append(self._transport.segment(self._size))
        return self._segments[bucket]

    def drop(self) -> None:
        """A host may still read them: never write into them again."""
        for segment in self._segments:
            segment.close()
        self._segments = []


def gather(source: Source, tied: Mapping[str, str], pool: SegmentPool, bucket_bytes: int) -> Gathered:
    """Copies every tensor of `source` once, as contiguous wire bytes in its own dtype, and hashes the copies.

    tied: wire names that the hosts do not want, with the names that host their content; they are left out if the
    bytes are the same. ValueError if they are not, for a sharded tensor, and for a dtype that the wire does not know.
    """
    packer = Packer(bucket_bytes)
    entries: list[TensorEntry] = []
    segments: list[Segment] = []
    repeated: dict[str, Digest] = {}
    for name, tensor in to_wire(named_pairs(source), keep_tied=True):
        if name in tied:
            # Hashed at once: a learner that gathers one tensor at a time may not keep this one until the other comes.
            repeated[name] = tensor_digest(tied[name], tensor)
            continue
        content = tensor.contiguous()
        data = wire_bytes(content)
        function = TensorHash(name, content.shape, content.dtype)
        digest = function.header
        for piece in packer.place(data.numel()):
            if piece.bucket == len(segments):
                segments.append(pool.take(piece.bucket))
            place = segments[piece.bucket].data[piece.bucket_offset : piece.bucket_offset + piece.bytes]
            place.copy_(data[piece.tensor_offset : piece.tensor_offset + piece.bytes])
            digest += function.blocks(place, piece.tensor_offset // BLOCK_BYTES)
        entries.append(TensorEntry(name=name, shape=tuple(content.shape), dtype=content.dtype, digest=digest))
    digests = {entry.name: entry.digest for entry in entries}
    untied = [name for name, digest in repeated.items() if digests.get(tied[name]) != digest]
    if untied:
        raise ValueError(
            "the hosts tie these tensors and the learner does not; send the same bytes for both or leave one out: "
            + ", ".join(f"{name} = {tied[name]}" for name in untied)
        )
    return Gathered(Manifest(tuple(entries)), tuple(segments))


def named_pairs(source: Source) -> Iterable[tuple[str, Tensor]]:
    """(name, tensor) of whatever may be published."""
    if isinstance(source, torch.nn.Module):
        source = source.state_dict()
    return source.items() if isinstance(source, Mapping) else source
