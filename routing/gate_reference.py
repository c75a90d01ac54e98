"""The order in which the gate adds in true fp32, written out. T tokens, E experts, D hidden, C chunks.

    chunk c = the chain of fused multiply-adds fma(h[d], w[d], sum) from +0.0, d ascending over CHUNK elements
    logit   = ((0.0 + chunk 0) + chunk 1) + ..., and then the bias

The last chunk may be shorter, which is as if zeros followed. Every step is one IEEE rounding, so the order is the whole
definition: nothing in it depends on T or on a row's place.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 128
"""Short enough for one token to be quick, long enough for the sums over chunks to cost many tokens nothing."""


def fp32_gate(hidden_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """[T, E] fp32, every bit as the kernel gives it; slow, and T * E * C numbers of memory."""
    (T, D), E = hidden_TD.shape, weight_ED.shape[0]
    missing = -D % CHUNK
    hidden_T1CD = pad(hidden_TD.float(), (0, missing)).view(T, 1, -1, CHUNK)
    weight_1ECD = pad(weight_ED.float(), (0, missing)).view(1, E, -1, CHUNK)
    sums_TEC = hidden_TD.new_zeros(T, E, hidden_T1CD.shape[2], dtype=torch.float32)
    for d in range(CHUNK):
        sums_TEC = fused_multiply_add(hidden_T1CD[..., d], weight_1ECD[..., d], sums_TEC)
    logits_TE = torch.zeros_like(sums_TEC[..., 0])
    for sums_TE in sums_TEC.unbind(dim=-1):
        logits_TE = logits_TE + sums_TE
    return logits_TE if bias_E is None else logits_TE + bias_E.float()


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of fp32 tensors, rounded once to fp32.

    The product of two fp32 numbers is exact in fp64. The sum may not be, and rounding it to fp64 and then to fp32 could
    err; rounded to odd in fp64 instead, it still tells fp32 on which side of a tie it lies.
    """
    product = a.double() * b.double()
    addend = c.double()
    total = product + addend
    other = total - product
    error = (product - (total - other)) + (addend - other)  # exact: total + error is the true sum
    bits = total.view(torch.int64)
    is_even = (bits & 1) == 0
    away = torch.where((error > 0) == (total > 0), 1, -1)  # the neighbour on the true sum's side
    is_moved = is_even & (error != 0) & total.isfinite() & error.isfinite()
    return torch.where(is_moved, bits + away, bits).view(torch.float64).float()
