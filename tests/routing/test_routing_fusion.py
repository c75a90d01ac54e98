"""Reduce functions held against the fused forms: each is told from its neighbours, and what is no form stays itself."""

import dataclasses

import pytest
import torch
from router_specs import make_spec
from torch import Tensor

from routing import ReduceKind, TopkReduce, returns_weights
from routing.fusion import certify_reduce
from routing.orders import SUMS, rounded_sum
from routing.reduce_function import ReduceFunction

CPU = torch.device("cpu")
SUM = TopkReduce(kind=ReduceKind.SUM)


def add(scores_TK: Tensor) -> Tensor:
    return scores_TK.sum(-1, keepdim=True)


def sum_eps(eps: float) -> TopkReduce:
    return TopkReduce(kind=ReduceKind.SUM_EPS, eps=eps)


def clamped(eps: float) -> TopkReduce:
    return TopkReduce(kind=ReduceKind.CLAMPED_SUM, eps=eps)


FUSED: dict[str, tuple[ReduceFunction, TopkReduce]] = {
    "FastDeploy's": (lambda x: x.sum(-1, keepdim=True), SUM),
    "plus 1e-20": (lambda x: add(x) + 1e-20, sum_eps(1e-20)),
    "plus 1e-12": (lambda x: add(x) + 1e-12, sum_eps(1e-12)),
    "plus 1e-9": (lambda x: add(x) + 1e-9, sum_eps(1e-9)),
    "plus 1e-8": (lambda x: add(x) + 1e-8, sum_eps(1e-8)),
    "plus 1e-6": (lambda x: add(x) + 1e-6, sum_eps(1e-6)),
    "plus fp32's epsilon": (lambda x: add(x) + torch.finfo(torch.float32).eps, sum_eps(2.0**-23)),
    "clamped at 1e-12": (lambda x: add(x).clamp(min=1e-12), clamped(1e-12)),
    "clamped at bf16's epsilon": (lambda x: add(x).clamp(min=torch.finfo(torch.bfloat16).eps), clamped(2.0**-7)),
    "clamped at 1e-20": (lambda x: torch.clip(add(x), min=1e-20), clamped(1e-20)),
    "nothing": (lambda x: torch.ones_like(x), TopkReduce(kind=ReduceKind.NONE)),
    "weights": (returns_weights(lambda x: x / (add(x) + 1e-20)), sum_eps(1e-20)),
    "unchanged weights": (returns_weights(lambda x: x.clone()), TopkReduce(kind=ReduceKind.NONE)),
    "a softmax": (returns_weights(lambda x: torch.softmax(x, dim=-1)), TopkReduce(kind=ReduceKind.SOFTMAX)),
    "a norm": (lambda x: torch.norm(x, p=1, dim=-1, keepdim=True), TopkReduce(kind=ReduceKind.L1)),
    "a denominator for each slot": (lambda x: add(x).expand_as(x).contiguous(), SUM),
}

UNFUSED: dict[str, ReduceFunction] = {
    "twice the sum": lambda x: 2 * add(x),
    "a reciprocal": returns_weights(lambda x: x * (1 / add(x))),
    "scaled before it is divided": returns_weights(lambda x: (x * 2.5) / add(x)),
    "scaled after it is divided": returns_weights(lambda x: x / add(x) * 2.5),
    "a sum in another order": lambda x: rounded_sum("adjacent", x),
    "the largest": lambda x: x.amax(-1, keepdim=True),
    "a sum in fp64": lambda x: x.double().sum(-1, keepdim=True),
    "a sum in fp64, rounded": lambda x: x.double().sum(-1, keepdim=True).to(x.dtype),
    "the L2 norm": lambda x: torch.norm(x, p=2, dim=-1, keepdim=True),
    "an epsilon for small sums only": lambda x: torch.where(add(x) < 1e-3, add(x) + 1e-6, add(x)),
    "NaN made zero": lambda x: torch.nan_to_num(add(x)),
}


@pytest.mark.parametrize("K", [1, 2, 6, 8])
@pytest.mark.parametrize("name", FUSED)
def test_a_function_that_is_a_form_becomes_that_form(name: str, K: int) -> None:
    function, form = FUSED[name]
    spec = make_spec(top_k=K, reduce=TopkReduce(kind=ReduceKind.NONE))
    found = certify_reduce(spec, function, CPU)
    assert found.form in (form, found.equals[0])
    assert form in found.equals
    assert found.spec == dataclasses.replace(spec, reduce=found.form)
    if K > 1:
        assert found.form == form
        assert {other.kind for other in found.equals} == {form.kind}


@pytest.mark.parametrize("name", UNFUSED)
def test_a_function_that_is_no_form_stays_itself(name: str) -> None:
    spec = make_spec(top_k=6)
    found = certify_reduce(spec, UNFUSED[name], CPU)
    assert found.form is None
    assert found.equals == ()
    assert found.spec == spec
    assert found.why


@pytest.mark.parametrize("eps", [3.3e-7, 2e-3, 7e-25])
def test_an_epsilon_of_the_functions_own_is_found(eps: float) -> None:
    spec = make_spec(top_k=6)
    added = certify_reduce(spec, lambda x: add(x) + eps, CPU)
    capped = certify_reduce(spec, lambda x: add(x).clamp(min=eps), CPU)
    for found, kind in ((added, ReduceKind.SUM_EPS), (capped, ReduceKind.CLAMPED_SUM)):
        assert found.form is not None
        assert found.form.kind is kind
        assert found.form.eps == pytest.approx(eps, rel=1e-6)


@pytest.mark.parametrize("chain", [torch.bfloat16, torch.float16, torch.float64])
def test_the_chains_dtype_decides(chain: torch.dtype) -> None:
    spec = make_spec(top_k=6, chain_dtype=chain)
    assert certify_reduce(spec, add, CPU).form == SUM
    assert certify_reduce(spec, lambda x: add(x) + 1e-3, CPU).form is not None
    narrow = certify_reduce(spec, lambda x: x.float().sum(-1, keepdim=True), CPU)
    assert narrow.form is None
    if chain == torch.float16:  # there 1e-20 rounds to nothing
        assert certify_reduce(spec, lambda x: add(x) + 1e-20, CPU).form == SUM


def test_why_a_sum_in_another_order_is_not_fused_is_said() -> None:
    for order in SUMS:
        found = certify_reduce(make_spec(top_k=6), lambda x, order=order: rounded_sum(order, x), CPU)
        assert f"adds its slots in the order {order}" in found.why


IMPURE: dict[str, ReduceFunction] = {
    "the batch's mean": lambda x: add(x) + x.nan_to_num(0, 0, 0).mean(),
    "the batch's sum": lambda x: add(x) / x.sum().clamp(min=1),
    "the row before": lambda x: add(x) + add(x).roll(1, 0),
    "the first row": lambda x: add(x) * (1 + 0 * x[:1, :1].nan_to_num(1, 1, 1)) + x[:1, :1],
    "the number of rows": lambda x: add(x) * (1 + len(x)),
    "the place in the batch": lambda x: add(x) + torch.arange(len(x), dtype=x.dtype)[:, None],
    "chance": lambda x: add(x) * (1 + torch.rand(1)),
}


@pytest.mark.parametrize("name", IMPURE)
def test_a_function_whose_rows_depend_on_one_another_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"reduce function .*a row's result depends on other rows: .* differ"):
        certify_reduce(make_spec(top_k=6), IMPURE[name], CPU)


def test_a_function_that_keeps_count_is_refused() -> None:
    calls = 0

    def counting(scores_TK: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return add(scores_TK) + (calls > 4)

    with pytest.raises(ValueError, match="depends on other rows"):
        certify_reduce(make_spec(top_k=6), counting, CPU)


def test_a_function_that_cannot_take_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot take 0 rows"):
        certify_reduce(make_spec(), lambda x: add(x) + 0 * x.max(), CPU)


def test_a_function_that_writes_to_its_argument_is_refused() -> None:
    with pytest.raises(ValueError, match="wrote to its argument"):
        certify_reduce(make_spec(), lambda x: x.mul_(1).sum(-1, keepdim=True), CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("K", [2, 6, 8])
@pytest.mark.parametrize("name", FUSED)
def test_on_a_gpu_a_function_that_is_a_form_becomes_that_form(name: str, K: int, cuda: torch.device) -> None:
    function, form = FUSED[name]
    found = certify_reduce(make_spec(num_experts=64, top_k=K), function, cuda)
    assert found.form == form
    assert found.rows >= 1_000_000


@pytest.mark.gpu
@pytest.mark.parametrize("name", UNFUSED)
def test_on_a_gpu_a_function_that_is_no_form_stays_itself(name: str, cuda: torch.device) -> None:
    function = UNFUSED[name]
    if name == "a sum in another order":
        function = lambda x: rounded_sum("sequential", x)  # noqa: E731
    assert certify_reduce(make_spec(num_experts=64, top_k=6), function, cuda).form is None


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(set(IMPURE) - {"the place in the batch", "chance"}))
def test_on_a_gpu_a_function_whose_rows_depend_on_one_another_is_refused(name: str, cuda: torch.device) -> None:
    with pytest.raises(ValueError, match="depends on other rows"):
        certify_reduce(make_spec(num_experts=64, top_k=6), IMPURE[name], cuda)
