"""Before anything is served: do the routers of a model have the trainer's bits on the device that hosts it?"""

import logging
from dataclasses import dataclass, replace

import torch

from rollout.model.spec import DecoderSpec, LayerSpec, MoeSpec
from routing import RouterSpec
from routing.parity import ParityReport, certify, examine

logger = logging.getLogger("rollout")


@dataclass(frozen=True, kw_only=True, slots=True)
class Certification:
    """What parity found for a model on a device."""

    spec: DecoderSpec
    """To serve: each router with the order of summation that PyTorch has here and, where a fused form of its reduce
    function is proven, that form."""
    reports: tuple[ParityReport, ...]
    """One for each of its different routers."""


def certified(spec: DecoderSpec, device: torch.device, *, refuses: bool) -> Certification:
    """Tries every router on probe rows, along the path that serves.

    Args:
        spec: the decoder.
        device: that hosts it.
        refuses: raise for a bit that differs, instead of saying so in the log.

    Raises:
        ParityRefused: a router cannot have the trainer's bits here; the operation is named.
        ValueError: a reduce function breaks its contract.
    """
    routers = dict.fromkeys(layer.mlp.router for layer in spec.layers if isinstance(layer.mlp, MoeSpec))
    reports = {router: certify(router, device) if refuses else examine(router, device) for router in routers}
    for report in reports.values():
        for row in report.mismatches:
            logger.warning("bits of %s: expected %s; found %s", row.operation, row.expected, row.found)
    served = {router: report.spec for router, report in reports.items()}
    layers = tuple(_with(layer, served) for layer in spec.layers)
    return Certification(spec=replace(spec, layers=layers), reports=tuple(reports.values()))


def _with(layer: LayerSpec, served: dict[RouterSpec, RouterSpec]) -> LayerSpec:
    if not isinstance(layer.mlp, MoeSpec):
        return layer
    return replace(layer, mlp=replace(layer.mlp, router=served[layer.mlp.router]))
