"""Placement: the tensors of a catalogue in a host's parameters. Planned whole and once, whatever is written how often.

On a GPU the parameters are hashed by one kernel that walks a table of all tensors; on a CPU tensor by tensor.

Legend: N tensors of the catalogue, 2 lanes of a digest.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weights.aside import aside
from weights.catalogue import Catalogue
from weights.digest import tensor_digest
from weights.digests import Digests
from weights.naming import HostedLayout, HostedSlice
from weights.plan import plan
from weights.spans import Spans, form_of

if TYPE_CHECKING:
    from weights.kernel_digest import DigestTable


class Placement:
    """Where each tensor of a catalogue lies.

    Args:
        catalogue: the tensors.
        layout: of the host.
        parameters: of the host, contiguous; their addresses never change.
        subset: whether the catalogue may leave hosted tensors out.

    Raises:
        ManifestError: the catalogue does not fit; all offenders are named.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        layout: HostedLayout,
        parameters: Mapping[str, Tensor],
        *,
        subset: bool = False,
    ) -> None:
        self.catalogue = catalogue
        self.targets: tuple[HostedSlice, ...] = tuple(plan(catalogue, layout, subset=subset))
        self._parameters = parameters
        self.device: torch.device = next(iter(parameters.values())).device

    def view(self, tensor: int) -> Tensor:
        """The place of the catalogue's n-th tensor, no copy."""
        return self.targets[tensor].view(self._parameters)

    @cached_property
    def addresses(self) -> Tensor:
        """int64 [N], on the CPU: the first byte of each tensor's place."""
        starts = {
            name: (parameter.data_ptr(), parameter.shape, parameter.itemsize)
            for name, parameter in self._parameters.items()
        }
        found = []
        for target in self.targets:
            address, shape, itemsize = starts[target.parameter]
            found.append(address + target.offset(shape) * itemsize)
        return torch.tensor(found, dtype=torch.int64)

    @cached_property
    def forms(self) -> Tensor:
        """int64 [N], on the CPU: how each tensor's wire bytes are held (`spans.Form`)."""
        pairs = zip(self.catalogue.tensors, self.targets, strict=True)
        return torch.tensor([form_of(tensor.dtype, target.dtype) for tensor, target in pairs], dtype=torch.int64)

    def live(self) -> Digests:
        """The digests of what the parameters hold now, in wire dtypes; waits for the device."""
        if self.device.type == "cpu":
            named = ((tensor, self.view(place)) for place, tensor in enumerate(self.catalogue.tensors))
            return Digests.of(tensor_digest(tensor.name, view, tensor.dtype) for tensor, view in named)
        with aside(self.device):
            seeds_N2, headers_N2 = self._hashing
            return Digests.of_lanes(self._table.digests(seeds_N2) + headers_N2)

    def ready(self) -> None:
        """Builds what `live` needs, so that no pause has to wait for it."""
        if self.device.type != "cpu":
            self.live()

    @cached_property
    def _hashing(self) -> tuple[Tensor, Tensor]:
        return self.catalogue.seeds.to(self.device), self.catalogue.headers.to(self.device)

    @cached_property
    def _table(self) -> "DigestTable":
        from weights.kernel_digest import DigestTable  # Triton, which a CPU host does without

        count = len(self.catalogue)
        spans = Spans(
            address=self.addresses,
            wire_bytes=torch.tensor([tensor.bytes for tensor in self.catalogue.tensors], dtype=torch.int64),
            form=self.forms,
            tensor=torch.arange(count),
            first_block=torch.zeros(count, dtype=torch.int64),
        )
        return DigestTable(spans, tensors=count, device=self.device)
