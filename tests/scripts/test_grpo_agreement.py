"""Comparing hosts with the learner: what counts as a mismatch, what as a near tie, and what cannot be compared."""

import math

import pytest
import torch
from grpo.agreement import Agreement, Replayed, RouterDecisions, compare
from grpo.routers import NEAR_TIE, gap, near_ties, recorded_routing
from torch import Tensor
from transformers import Glm4MoeConfig, Qwen3MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

# One sample: one prompt token, three sampled ones of which the last has no position; one layer, two experts of a token.
OURS = [[0, 1], [2, 3], [4, 5]]


def compared(
    hosted: list[list[int]], *, ties: tuple[bool, ...] = (False, False, False), gaps: tuple[float, ...] = (0, 0, 0)
) -> Agreement:
    """One sample whose hosts say `hosted`, and log-probabilities that lie `gaps` apart."""
    routing = RouterDecisions(expert_ids=[torch.tensor(OURS)], near_ties=[torch.tensor(ties)])
    ids_SNLK = torch.tensor(hosted, dtype=torch.uint8).view(1, 3, 1, 2)
    return compare(torch.zeros(1, 3), torch.tensor([gaps]), routing, ids_SNLK, torch.tensor([True]))


def test_equal_experts_are_no_mismatch_whatever_their_order() -> None:
    assert compared([[1, 0], [2, 3], [5, 4]]) == Agreement(tokens=3, decisions=3)


def test_another_set_of_experts_is_a_mismatch() -> None:
    assert compared([[0, 1], [2, 4], [4, 5]]).mismatches == 1


def test_a_near_tie_is_neither_compared_nor_a_mismatch() -> None:
    assert compared(OURS, ties=(False, True, False)) == Agreement(tokens=3, decisions=2, near_ties=1)


def test_after_a_near_tie_that_fell_the_other_way_nothing_is_compared() -> None:
    got = compared([[0, 1], [2, 4], [6, 7]], ties=(False, True, False), gaps=(0.001, 7.0, 8.0))
    assert got.mismatches == 0
    assert got.decisions == 1
    assert got.tokens == 1
    assert got.logprob_abs_diff_max == pytest.approx(0.001)


def test_before_a_near_tie_that_fell_the_other_way_mismatches_count() -> None:
    assert compared([[0, 7], [2, 4], [4, 5]], ties=(False, True, False)).mismatches == 1


def test_the_largest_gap_is_told_and_not_a_number_is_no_agreement() -> None:
    assert compared(OURS, gaps=(0.5, -2.0, 1.0)).logprob_abs_diff_max == 2.0
    assert compared(OURS, gaps=(0.5, math.nan, 1.0)).logprob_abs_diff_max == math.inf


def test_only_chosen_samples_are_compared() -> None:
    routing = RouterDecisions(expert_ids=[torch.zeros(4, 1).long()], near_ties=[torch.zeros(4).bool()])
    hosted = torch.tensor([1, 1, 0, 0], dtype=torch.uint8).view(2, 2, 1, 1)
    chosen = torch.tensor([False, True])
    got = compare(torch.tensor([[5.0], [0.0]]), torch.zeros(2, 1), routing, hosted, chosen)
    assert got == Agreement(tokens=1, decisions=2)
    assert compare(torch.zeros(2, 1), torch.zeros(2, 1), routing, hosted, torch.zeros(2).bool()) == Agreement()


def test_agreements_add_up() -> None:
    first = Agreement(tokens=1, logprob_abs_diff_max=0.5, decisions=2, mismatches=1, near_ties=3)
    second = Agreement(tokens=10, logprob_abs_diff_max=0.25, decisions=20, mismatches=0, near_ties=30)
    assert first + second == Agreement(tokens=11, logprob_abs_diff_max=0.5, decisions=22, mismatches=1, near_ties=33)


def test_replays_add_up() -> None:
    first = Replayed(decisions=1, differing=2, tokens=3, logprob_abs_diff_max=0.5)
    second = Replayed(decisions=10, differing=20, tokens=30, logprob_abs_diff_max=0.25)
    assert first + second == Replayed(decisions=11, differing=22, tokens=33, logprob_abs_diff_max=0.5)


def qwen3_router() -> Qwen3MoeTopKRouter:
    return Qwen3MoeTopKRouter(Qwen3MoeConfig(hidden_size=4, num_experts=4, num_experts_per_tok=2))


def glm4_router(bias: list[float], *, groups: int = 1) -> Glm4MoeTopkRouter:
    router = Glm4MoeTopkRouter(
        Glm4MoeConfig(hidden_size=4, n_routed_experts=len(bias), num_experts_per_tok=2, n_group=groups, topk_group=1)
    )
    router.e_score_correction_bias.copy_(torch.tensor(bias))
    return router


def probabilities(*values: float) -> Tensor:
    """Logits whose softmax is this."""
    return torch.tensor([values]).log()


def test_qwen3_ties_are_near_in_probability() -> None:
    assert near_ties(qwen3_router(), probabilities(0.4, 0.3, 0.3 - NEAR_TIE / 2, NEAR_TIE / 2)).tolist() == [True]
    assert near_ties(qwen3_router(), probabilities(0.4, 0.3, 0.3 - NEAR_TIE * 2, NEAR_TIE * 2)).tolist() == [False]


def test_a_tie_within_the_chosen_or_within_the_rest_decides_nothing() -> None:
    assert near_ties(qwen3_router(), probabilities(0.4, 0.4, 0.1, 0.1)).tolist() == [False]


def test_glm4_ties_are_near_with_the_bias_added() -> None:
    logits = torch.tensor([[3.0, 0.5, 0.0, -3.0]])
    difference = float(logits.sigmoid()[0, 1] - logits.sigmoid()[0, 2])
    assert near_ties(glm4_router([0, 0, 0, 0]), logits).tolist() == [False]
    assert near_ties(glm4_router([0, 0, difference, 0]), logits).tolist() == [True]


def test_glm4_groups_can_tie_where_no_expert_does() -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0, 2.0, 1.0, -1.0]])
    assert near_ties(glm4_router([0] * 6, groups=2), logits).tolist() == [True]
    assert near_ties(glm4_router([0.1, 0, 0, 0, 0, 0], groups=2), logits).tolist() == [False]


def test_glm4_experts_of_a_group_that_lost_do_not_tie() -> None:
    logits = torch.tensor(
        [[2.0, 1.0, -1.0, 1.0, 0.5, -2.0]]
    )  # the loser of the second group ties with the winner of the first
    assert near_ties(glm4_router([0] * 6, groups=2), logits).tolist() == [False]


def test_nothing_is_near_where_every_expert_is_chosen() -> None:
    assert gap(torch.zeros(2, 3), kept=3).tolist() == [math.inf, math.inf]


def test_routing_is_recorded_only_inside_the_block() -> None:
    router = torch.nn.Sequential(qwen3_router())
    with recorded_routing(router) as record:
        router(torch.zeros(5, 4))
    router(torch.zeros(5, 4))
    assert [tuple(ids.shape) for ids in record.expert_ids] == [(5, 2)]
    assert [tuple(ties.shape) for ties in record.near_ties] == [(5,)]


def test_a_model_without_known_routers_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no"), recorded_routing(torch.nn.Linear(2, 2)):
        pass
