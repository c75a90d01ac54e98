"""Asks the running PyTorch on this GPU: at which batch sizes does its own product equal our gate's, bit for bit?

T tokens, D hidden, E experts.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routing.bits import differs
from routing.gate import gate_logits, torch_product
from routing.terms import GateSpec


@dataclass(frozen=True, kw_only=True)
class GateMeasurement:
    """One gate, one weight, several numbers of tokens."""

    differing: Mapping[int, float]
    """Tokens -> the part of the logits that differ from PyTorch's own product of that many tokens."""
    torch_varies: Mapping[int, float]
    """Tokens -> the part of PyTorch's own logits that differ from its product of the most tokens: without 0.0 there,
    it has no one answer that could be equalled."""
    is_invariant: bool
    """Whether our rows were the same at every number of tokens, and in another order."""

    @property
    def equal_tokens(self) -> tuple[int, ...]:
        """Where every logit is PyTorch's."""
        return tuple(tokens for tokens, part in self.differing.items() if part == 0.0)

    @property
    def from_tokens(self) -> int | None:
        """The number of tokens from which on every measured one is equal; None if the largest is not."""
        least = None
        for tokens in sorted(self.differing, reverse=True):
            if self.differing[tokens] != 0.0:
                break
            least = tokens
        return least


@torch.no_grad()
def measure_gate(
    gate: GateSpec,
    weight_ED: Tensor,
    token_counts: Sequence[int],
    *,
    bias_E: Tensor | None = None,
    hidden_dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> GateMeasurement:
    """Multiplies random hidden states, on the weight's device. The process's precision of fp32 products is changed for
    as long as this runs, since it is part of what is asked. ValueError for no tokens at all.
    """
    if not token_counts or min(token_counts) < 1:
        raise ValueError(f"measure_gate: numbers of tokens expected, got {list(token_counts)}")
    random = torch.Generator(device=weight_ED.device).manual_seed(seed)
    most = max(token_counts)
    hidden_TD = torch.randn(most, weight_ED.shape[1], generator=random, device=weight_ED.device, dtype=torch.float32)
    hidden_TD = hidden_TD.to(hidden_dtype)
    with _precision(gate):
        ours_TE = gate_logits(hidden_TD, weight_ED, gate, bias_E)
        theirs_TE = torch_product(hidden_TD, weight_ED, gate, bias_E)
        order = torch.randperm(most, generator=random, device=weight_ED.device)
        is_invariant = not differs(gate_logits(hidden_TD[order], weight_ED, gate, bias_E), ours_TE[order]).any()
        differing, torch_varies = {}, {}
        for tokens in sorted(set(token_counts)):
            own_TE = gate_logits(hidden_TD[:tokens], weight_ED, gate, bias_E)
            is_invariant = is_invariant and not differs(own_TE, ours_TE[:tokens]).any()
            theirs = torch_product(hidden_TD[:tokens], weight_ED, gate, bias_E)
            differing[tokens] = _part(differs(own_TE, theirs))
            torch_varies[tokens] = _part(differs(theirs, theirs_TE[:tokens]))
    return GateMeasurement(differing=differing, torch_varies=torch_varies, is_invariant=is_invariant)


def _part(are_other: Tensor) -> float:
    return float(are_other.double().mean())


@contextlib.contextmanager
def _precision(gate: GateSpec) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if gate.tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
