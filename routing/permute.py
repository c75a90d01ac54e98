"""Grouping tokens by expert. T tokens, K slots of a token, E experts, N = T * K rows, D hidden."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertGroups:
    """The (token, slot) pairs of a batch, grouped by expert; within an expert by token, then slot."""

    order_N: Tensor
    """int64: the flat index token * K + slot of each row."""
    token_ids_N: Tensor
    """int64: the token of each row."""
    offsets_E1: Tensor
    """int32 [E + 1]: expert e's rows are offsets[e] to offsets[e + 1]."""


def group_by_expert(expert_ids_TK: Tensor, num_experts: int) -> ExpertGroups:
    """By a stable sort, so the order is a function of the ids alone; never waits for the device. T = 0 is fine."""
    if expert_ids_TK.ndim != 2 or expert_ids_TK.is_floating_point():
        raise ValueError(
            f"expert ids: [T, K] integers expected, got {tuple(expert_ids_TK.shape)} {expert_ids_TK.dtype}"
        )
    K = expert_ids_TK.shape[1]
    sorted_N, order_N = expert_ids_TK.reshape(-1).sort(stable=True)
    bounds_E1 = torch.arange(num_experts + 1, device=expert_ids_TK.device, dtype=sorted_N.dtype)
    offsets_E1 = torch.searchsorted(sorted_N, bounds_E1, out_int32=True)
    return ExpertGroups(order_N=order_N, token_ids_N=order_N // K, offsets_E1=offsets_E1)


def gather_tokens(hidden_TD: Tensor, groups: ExpertGroups) -> Tensor:
    """[N, D]: each token's row, once per slot, in grouped order."""
    return hidden_TD[groups.token_ids_N]
