"""How a learner's own routing compares with a rollout's record, gathered layer by layer without waiting for the device.

B rows of the batch, S positions, T = B * S, K slots of a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from routing.record import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayReport:
    """A forward's own routing beside the record; a decision is that of a token in a layer."""

    layers: int
    positions: int
    """With a record."""
    unrecorded: int
    """Positions without one, which the model routed itself."""
    decisions: int
    """With a record: positions times layers."""
    differing: int
    """Of these, the ones in which the model by itself would have chosen another set of experts."""
    positions_differing: int
    """Positions with such a decision in any layer."""
    weight_abs_diff_max: float | None
    """Between the record's combine weights and the model's own for the same experts; None without weights to compare.
    Where the model was only observed, over the decisions that do not differ."""
    weight_abs_diff_mean: float | None


class Comparison:
    """Takes in every layer of one forward.

    Args:
        replaced: whether the experts in use are the record's.
    """

    def __init__(self, record: RoutingRecord, *, replaced: bool) -> None:
        self._record = record
        self._replaced = replaced
        self._differ_T = torch.zeros_like(record.recorded_BS).flatten()
        self._differing: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._counts: list[Tensor] = []
        self._largest: list[Tensor] = []

    @torch.no_grad()
    def add(self, layer: int, own_ids_TK: Tensor, used_ids_TK: Tensor, weights_TK: Tensor) -> None:
        """One layer.

        Args:
            layer: among the MoE layers.
            own_ids_TK: int64, what the model chose by itself.
            used_ids_TK: int64, what it went on with.
            weights_TK: its own combine weights for these.
        """
        record, device = self._record, own_ids_TK.device
        recorded_T = record.recorded_BS.to(device).flatten()
        ids_TK = record.layer_ids(layer, device)
        differ_T = (own_ids_TK.sort(dim=1).values != ids_TK.sort(dim=1).values).any(dim=1) & recorded_T
        self._differing.append(differ_T.sum())
        self._differ_T |= differ_T.to(self._differ_T.device)
        theirs_TK = record.layer_weights(layer, device)
        if theirs_TK is None:
            return
        ours, theirs = (  # the same experts may stand in other slots
            values_TK.float().gather(1, order_TK.argsort(dim=1))
            for values_TK, order_TK in ((weights_TK, used_ids_TK), (theirs_TK, ids_TK))
        )
        compared_T = recorded_T if self._replaced else recorded_T & ~differ_T
        diffs_TK = torch.where(compared_T.view(-1, 1), (ours - theirs).abs(), 0.0)
        self._sums.append(diffs_TK.double().sum())
        self._counts.append(compared_T.sum() * diffs_TK.shape[1])
        self._largest.append(diffs_TK.max())

    def report(self) -> ReplayReport:
        """Of the layers so far; waits for the device."""
        positions, layers = int(self._record.recorded_BS.sum()), len(self._differing)
        compared = sum(int(count) for count in self._counts)
        return ReplayReport(
            layers=layers,
            positions=positions,
            unrecorded=self._record.recorded_BS.numel() - positions,
            decisions=positions * layers,
            differing=sum(int(count) for count in self._differing),
            positions_differing=int(self._differ_T.sum()),
            weight_abs_diff_max=float(torch.stack([each.cpu() for each in self._largest]).max()) if compared else None,
            weight_abs_diff_mean=sum(float(each) for each in self._sums) / compared if compared else None,
        )
