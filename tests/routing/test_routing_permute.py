"""Grouping tokens by expert."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from routing import gather_tokens, group_by_expert


@given(tokens=st.integers(0, 12), slots=st.integers(1, 4), experts=st.integers(4, 9), seed=st.integers(0, 2**31))
def test_grouping_is_stable_and_complete(tokens: int, slots: int, experts: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    ids_TK = torch.stack(
        [torch.randperm(experts, generator=random)[:slots] for _ in range(tokens)] or [torch.empty(slots)]
    )
    ids_TK = ids_TK[:tokens].int()
    groups = group_by_expert(ids_TK, experts)
    flat = ids_TK.flatten().tolist()
    assert groups.order_N.tolist() == sorted(range(len(flat)), key=lambda i: (flat[i], i))
    assert groups.token_ids_N.tolist() == [i // slots for i in groups.order_N.tolist()]
    assert groups.offsets_E1.tolist() == [sum(e < bound for e in flat) for bound in range(experts + 1)]
    hidden_TD = torch.randn(tokens, 3, generator=random)
    rows_ND = gather_tokens(hidden_TD, groups)
    restored_ND = torch.empty_like(rows_ND).index_copy_(0, groups.order_N, rows_ND)
    assert torch.equal(restored_ND, hidden_TD.repeat_interleave(slots, dim=0))


def test_experts_without_tokens_have_empty_groups() -> None:
    groups = group_by_expert(torch.tensor([[4, 1], [1, 4]], dtype=torch.int32), 6)
    assert groups.offsets_E1.tolist() == [0, 0, 2, 2, 2, 4, 4]
    assert groups.offsets_E1.dtype == torch.int32
    assert groups.order_N.tolist() == [1, 2, 0, 3]


def test_ids_that_are_not_a_table_of_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"integers expected, got \(2,\) torch\.float32"):
        group_by_expert(torch.zeros(2), 4)
