"""Laid: pieces of an update's tensors that lie in flat memory, to be hashed there and copied to their places.

The memory is a segment, a bucket on the device, or the learner's own. On a GPU either is one launch over a table that
is built once per stretch of memory and kept; on a CPU they go piece by piece.

Legend: N tensors of the catalogue, 2 lanes of a digest.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from weights.aside import aside
from weights.bucket import Piece
from weights.catalogue import Catalogue
from weights.digest import BLOCK_BYTES
from weights.placement import Placement
from weights.spans import Form, Spans

if TYPE_CHECKING:
    from weights.kernel_copy import CopyTable
    from weights.kernel_digest import DigestTable


class Laid(Protocol):
    """Pieces in memory."""

    def add_lanes(self, lanes_N2: Tensor) -> None:
        """Adds the hashes of their blocks to the lanes of their tensors: int64, on the device. Not waited for."""
        ...

    def copy_to(self, placement: Placement) -> None:
        """Copies them to their places, widened where the host stores a wider dtype. Not waited for."""
        ...

    def ready(self, placement: Placement) -> None:
        """Does ahead what `copy_to` needs, so that no pause has to wait for it."""
        ...

    def let_go(self) -> None:
        """Holds on to the memory no longer: of use again only on a device, when the same memory is there again."""
        ...


def laid(catalogue: Catalogue, pieces: Sequence[Piece], memories: Sequence[Tensor], device: torch.device) -> Laid:
    """`pieces`, whose buckets count `memories`: flat uint8, which `device` can read. It does the work."""
    if device.type == "cpu":
        return LaidOnCpu(catalogue, pieces, memories)
    return LaidOnDevice(catalogue, pieces, memories, device)


class LaidOnCpu:
    """Pieces in ordinary memory, whatever device the parameters are on."""

    def __init__(self, catalogue: Catalogue, pieces: Sequence[Piece], memories: Sequence[Tensor]) -> None:
        self._catalogue = catalogue
        self._pieces = pieces
        self._memories: Sequence[Tensor] = memories

    def add_lanes(self, lanes_N2: Tensor) -> None:
        for piece in self._pieces:
            function = self._catalogue.functions[piece.tensor]
            lanes_N2[piece.tensor] += function.lanes(self._bytes(piece), piece.tensor_offset // BLOCK_BYTES)

    @torch.inference_mode()  # the parameters may be inference tensors, which nothing else may write to
    def copy_to(self, placement: Placement) -> None:
        for piece in self._pieces:
            dtype = self._catalogue.tensors[piece.tensor].dtype
            start = piece.tensor_offset // dtype.itemsize
            # reshape gives a view, since hosted slices are contiguous; a copy would show in the digest of the live
            # parameters.
            target = placement.view(piece.tensor).reshape(-1)[start : start + piece.bytes // dtype.itemsize]
            target.copy_(self._elements(piece, dtype))

    def ready(self, placement: Placement) -> None:
        """Nothing to do."""

    def let_go(self) -> None:
        self._memories = ()

    def _elements(self, piece: Piece, dtype: torch.dtype) -> Tensor:
        data = self._bytes(piece)
        if data.data_ptr() % dtype.itemsize or data.storage_offset() % dtype.itemsize:
            data = data.clone()  # a learner's own memory may put it at any byte
        return data.view(dtype)

    def _bytes(self, piece: Piece) -> Tensor:
        return self._memories[piece.bucket][piece.bucket_offset : piece.bucket_offset + piece.bytes]


class LaidOnDevice:
    """Pieces in a GPU's memory, or a peer's that it can read. The memories stay where they are."""

    def __init__(
        self, catalogue: Catalogue, pieces: Sequence[Piece], memories: Sequence[Tensor], device: torch.device
    ) -> None:
        self._catalogue = catalogue
        self._memories: Sequence[Tensor] = memories  # kept alive: the tables hold their addresses
        self._device = device
        columns = [
            (piece.tensor, piece.tensor_offset, memories[piece.bucket].data_ptr() + piece.bucket_offset, piece.bytes)
            for piece in pieces
        ]
        self._tensor_R, self._offset_R, self._address_R, self._bytes_R = (
            torch.tensor(columns, dtype=torch.int64).view(-1, 4).unbind(1)
        )
        self._copies: dict[Placement, CopyTable] = {}

    def add_lanes(self, lanes_N2: Tensor) -> None:
        lanes_N2 += self._digests.digests(self._seeds)

    def copy_to(self, placement: Placement) -> None:
        self.ready(placement)
        self._copies[placement].run()

    def let_go(self) -> None:
        self._memories = ()  # the tables hold addresses

    def ready(self, placement: Placement) -> None:
        if placement not in self._copies:
            self._copies = {placement: self._copy_table(placement)}
            with aside(self._device):
                self._copies[placement].load()

    @cached_property
    def _seeds(self) -> Tensor:
        return self._catalogue.seeds.to(self._device)

    @cached_property
    def _digests(self) -> "DigestTable":
        from weights.kernel_digest import DigestTable

        spans = Spans(
            address=self._address_R,
            wire_bytes=self._bytes_R,
            form=torch.full_like(self._bytes_R, Form.SAME),
            tensor=self._tensor_R,
            first_block=self._offset_R // BLOCK_BYTES,
        )
        return DigestTable(spans, tensors=len(self._catalogue), device=self._device)

    def _copy_table(self, placement: Placement) -> "CopyTable":
        from weights.kernel_copy import CopyTable

        form_R = placement.forms[self._tensor_R]
        held_R = self._offset_R * torch.where(form_R == Form.SAME, 1, 2)  # a widened place has twice the bytes
        target_R = placement.addresses[self._tensor_R] + held_R
        return CopyTable(self._address_R, target_R, self._bytes_R, form_R, device=placement.device)
