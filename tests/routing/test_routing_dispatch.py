"""What expert dispatch needs from the kernel: padding that goes nowhere, counts per expert, replay in a CUDA graph."""

import pytest
import torch
from router_rows import SPECS, bits, logit_rows, operands
from torch import Tensor

from routing import Assignment, RouterSpec, expert_counts, kernel_chosen, kernel_route, reference, route

NAMES = ["qwen3", "glm4", "deepseek_v3", "lfm2, a bf16 chain", "one slot"]


def rows_of(spec: RouterSpec) -> Tensor:
    """Ordinary rows and every kind that the bounds leave in doubt."""
    return torch.cat(list(logit_rows(spec).values()))


def padded(whole: Assignment, count: int) -> Assignment:
    ids_TK, weights_TK = whole.expert_ids_TK.clone(), whole.weights_TK.clone()
    ids_TK[count:], weights_TK[count:] = -1, 0
    return Assignment(expert_ids_TK=ids_TK, weights_TK=weights_TK)


def counted(ids_TK: Tensor, num_experts: int) -> list[int]:
    return torch.bincount(ids_TK[ids_TK >= 0], minlength=num_experts).tolist()


def assert_same(found: Assignment, expected: Assignment) -> None:
    assert torch.equal(found.expert_ids_TK, expected.expert_ids_TK)
    assert torch.equal(bits(found.weights_TK), bits(expected.weights_TK))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_rows_from_num_tokens_on_are_routed_nowhere_and_not_counted(name: str, share: float) -> None:
    spec = SPECS[name]
    logits_TE = rows_of(spec)
    T = len(logits_TE)
    count = int(T * share)
    counts_E = expert_counts(spec.num_experts, "cpu")
    counts_E += 100
    found = kernel_route(
        logits_TE, spec, **operands(spec), num_tokens=torch.tensor(count, dtype=torch.int32), counts_E=counts_E
    )
    assert_same(found, padded(kernel_route(logits_TE, spec, **operands(spec)), min(count, T)))
    assert (counts_E - 100).tolist() == counted(found.expert_ids_TK, spec.num_experts)
    assert sum(counted(found.expert_ids_TK, spec.num_experts)) == min(count, T) * spec.top_k


def test_padding_may_hold_anything() -> None:
    spec = SPECS["glm4"]
    logits_TE = rows_of(spec)[:9].clone()
    logits_TE[5:] = torch.nan
    count = torch.tensor(5, dtype=torch.int32)
    found = kernel_route(logits_TE, spec, **operands(spec), num_tokens=count)
    assert_same(found, padded(reference(logits_TE, spec, **operands(spec)), 5))


def test_a_functions_scores_are_padded_and_counted_likewise() -> None:
    spec = SPECS["glm4"]
    logits_TE = rows_of(spec)[:9]
    counts_E = torch.zeros(spec.num_experts, dtype=torch.int32)
    count = torch.tensor(4, dtype=torch.int32)
    chosen = kernel_chosen(logits_TE, spec, **operands(spec), num_tokens=count, counts_E=counts_E)
    assert chosen.expert_ids_TK[4:].eq(-1).all()
    assert chosen.scores_TK[4:].eq(0).all()
    assert counts_E.tolist() == counted(chosen.expert_ids_TK, spec.num_experts)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_one_captured_graph_serves_every_number_of_tokens(name: str, cuda: torch.device) -> None:
    spec = SPECS[name]
    logits_TE = rows_of(spec).to(cuda)
    given = {key: tensor.to(cuda) for key, tensor in operands(spec).items()}
    count = torch.zeros((), dtype=torch.int32, device=cuda)
    counts_E = expert_counts(spec.num_experts, cuda)
    route(logits_TE, spec, **given, num_tokens=count, counts_E=counts_E)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts_E.zero_()
        found = route(logits_TE, spec, **given, num_tokens=count, counts_E=counts_E)
    whole = route(logits_TE, spec, **given)
    for tokens in (0, 1, 7, len(logits_TE)):
        found.expert_ids_TK.fill_(-7)
        found.weights_TK.fill_(-7)
        count.fill_(tokens)
        graph.replay()
        assert_same(found, padded(whole, tokens))
        assert counts_E.tolist() == counted(found.expert_ids_TK, spec.num_experts)
