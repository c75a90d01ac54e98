"""The experts that a rollout recorded, laid out as the batch that a learner feeds its model.

`padded_record` and `packed_record` make one of completions. B rows of the batch, S positions of a row, L MoE layers, K
slots of a token.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

NAMED_OFFENDERS = 10
"""How many offenders an error spells out; it counts the rest."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingRecord:
    """The experts of every recorded position of a batch.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, an id is negative, or a token has an expert twice.
    """

    expert_ids_BSLK: Tensor
    """Any integer dtype, slots in the rollout's order; of no meaning where nothing was recorded."""
    recorded_BS: Tensor
    """bool. Where it is False (padding, a token that the rollout never ran) the model routes the token itself."""
    weights_BSLK: Tensor | None = None
    """Combine weights of the rollout, floating point: to compare with, and to replay if asked to."""
    token_ids_BS: Tensor | None = None
    """What the learner must feed where something was recorded; None leaves it unchecked."""
    names: tuple[str, ...] = ()
    """Of the rows, for error messages."""

    def __post_init__(self) -> None:
        faults = [*self._misshapen()]
        if faults:
            raise ValueError(f"routing record: {'; '.join(faults)}")
        wrong = [*self._ill_assigned()]
        if wrong:
            raise ValueError(
                f"routing record: ids that are negative or twice in one token: {spelled_out(wrong, len(wrong))}"
            )

    def _ill_assigned(self) -> Iterable[str]:
        for layer in range(self.expert_ids_BSLK.shape[2]):
            ids_BSK = self.expert_ids_BSLK[:, :, layer].long().sort(dim=-1).values
            twice_BS = (ids_BSK[..., 1:] == ids_BSK[..., :-1]).any(dim=-1)
            for b, s in ((twice_BS | (ids_BSK < 0).any(dim=-1)) & self.recorded_BS).nonzero().tolist():
                ids = self.expert_ids_BSLK[b, s, layer].tolist()
                yield f"{self.name(b)} position {s} MoE layer {layer}: {ids}"

    def _misshapen(self) -> Iterable[str]:
        ids, recorded = self.expert_ids_BSLK, self.recorded_BS
        if ids.ndim != 4 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            yield f"expert ids: integers [B, S, L, K] expected, got {ids.dtype} {list(ids.shape)}"
        if recorded.dtype != torch.bool or recorded.shape != ids.shape[:2]:
            yield f"recorded: bool {list(ids.shape[:2])} expected, got {recorded.dtype} {list(recorded.shape)}"
        weights, tokens = self.weights_BSLK, self.token_ids_BS
        if weights is not None and (weights.shape != ids.shape or not weights.is_floating_point()):
            yield f"weights: floats {list(ids.shape)} expected, got {weights.dtype} {list(weights.shape)}"
        if tokens is not None and tokens.shape != ids.shape[:2]:
            yield f"token ids: {list(ids.shape[:2])} expected, got {list(tokens.shape)}"
        if self.names and len(self.names) != len(ids):
            yield f"{len(ids)} rows and {len(self.names)} names"
        devices = {str(tensor.device) for tensor in (ids, recorded, weights, tokens) if tensor is not None}
        if len(devices) > 1:
            yield f"tensors on {', '.join(sorted(devices))}: one device expected"

    def layer_ids(self, layer: int, device: torch.device) -> Tensor:
        """int64 [B * S, K] of one MoE layer."""
        return self.expert_ids_BSLK[:, :, layer].flatten(0, 1).to(device).long()

    def layer_weights(self, layer: int, device: torch.device) -> Tensor | None:
        """[B * S, K] of one MoE layer, where there are weights."""
        return None if self.weights_BSLK is None else self.weights_BSLK[:, :, layer].flatten(0, 1).to(device)

    def name(self, row: int) -> str:
        """What an error calls a row."""
        return f"row {row}" + (f" ({self.names[row]})" if self.names else "")


def spelled_out(offenders: Iterable[str], count: int) -> str:
    """The first of them, and how many more there are."""
    first = [offender for _, offender in zip(range(NAMED_OFFENDERS), offenders, strict=False)]
    more = count - len(first)
    return ", ".join(first) + (f", and {more} more" if more > 0 else "")
