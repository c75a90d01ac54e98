"""Gated MLPs: one that all tokens pass, and routed ones, computed as transformers' eager loop computes them.

T tokens, K slots of a token, D hidden, I intermediate, E experts, N = T * K rows sorted by expert.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from routing import Assignment, gather_tokens, group_by_expert


def gated_mlp(hidden_TD: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)).

    Args:
        hidden_TD: the tokens.
        w13: [2 I, D], rows gate | up.
        w2: [D, I].

    Returns:
        [T, D].
    """
    gate_TI, up_TI = functional.linear(hidden_TD, w13).chunk(2, dim=-1)
    return functional.linear(functional.silu(gate_TI) * up_TI, w2)


def routed_experts(hidden_TD: Tensor, assignment: Assignment, w13_E: Tensor, w2_E: Tensor) -> Tensor:
    """The weighted sum of each token's experts.

    The combine weight multiplies after down_proj, in the wider of the two dtypes; a token's experts are added in
    ascending order of their ids, each rounded to the hidden dtype first: the order of transformers' loop of index_add_.

    Args:
        hidden_TD: the tokens.
        assignment: K distinct experts per token and their weights.
        w13_E: [E, 2 I, D], rows gate | up.
        w2_E: [E, D, I].

    Returns:
        [T, D], hidden's dtype.
    """
    tokens, slots = assignment.expert_ids_TK.shape
    groups = group_by_expert(assignment.expert_ids_TK, w13_E.shape[0])
    rows_ND = gather_tokens(hidden_TD, groups)
    offsets = groups.offsets_E1.tolist()
    down_ND = torch.cat(
        [
            gated_mlp(rows_ND[start:stop], w13_E[expert], w2_E[expert])
            for expert, (start, stop) in enumerate(pairwise(offsets))
            if start < stop
        ]
    )
    weighted_ND = (down_ND * assignment.weights_TK.flatten()[groups.order_N][:, None]).to(hidden_TD.dtype)
    row_of_slot_N = torch.empty_like(groups.order_N)
    row_of_slot_N[groups.order_N] = torch.arange(tokens * slots, device=hidden_TD.device)
    rows_TK = row_of_slot_N.view(tokens, slots).sort(dim=1).values  # ascending rows are ascending experts
    summed_TD, *others = weighted_ND[rows_TK].unbind(1)
    for other_TD in others:
        summed_TD = summed_TD + other_TD
    return summed_TD
