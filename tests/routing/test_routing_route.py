"""route() and the trainer's own reduce functions."""

import dataclasses
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from router_rows import bits, logit_rows, make_spec, operands, sigmoid_spec
from torch import Tensor

from routing import (
    ReduceKind,
    RouterSpec,
    TopkReduce,
    kernel_route,
    probe_digest,
    reference,
    resolve,
    returns_weights,
    route,
)

GLM4 = sigmoid_spec(num_experts=32, top_k=8, platform="cpu")
LOGITS = torch.cat(list(logit_rows(GLM4).values()))


def sum_eps(scores_TK: Tensor) -> Tensor:
    return scores_TK.sum(dim=-1, keepdim=True) + 1e-20


@pytest.fixture
def trainer_module() -> Iterator[types.ModuleType]:
    """An importable module of a trainer, with a reduce function."""
    module = types.ModuleType("some_trainer")
    module.reduce = sum_eps  # type: ignore[attr-defined]
    module.constant = 3  # type: ignore[attr-defined]
    sys.modules["some_trainer"] = module
    resolve.cache_clear()
    yield module
    del sys.modules["some_trainer"]
    resolve.cache_clear()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def test_the_function_gives_the_denominator_as_the_fused_form_does() -> None:
    for scale in (None, 2.5):
        spec = dataclasses.replace(GLM4, scale=scale)
        fused = route(LOGITS, spec, **operands(spec))
        called = route(LOGITS, spec, **operands(spec), topk_reduce_func=sum_eps)
        assert torch.equal(called.expert_ids_TK, fused.expert_ids_TK)
        assert same_bits(called.weights_TK, fused.weights_TK)


def test_the_function_replaces_the_reduce_and_never_the_scale() -> None:
    spec = dataclasses.replace(GLM4, scale=2.5)
    raw = route(
        LOGITS, dataclasses.replace(spec, reduce=TopkReduce(kind=ReduceKind.NONE), scale=None), **operands(spec)
    )
    called = route(LOGITS, spec, **operands(spec), topk_reduce_func=lambda s: torch.full_like(s[:, :1], 3.0))
    assert same_bits(called.weights_TK, raw.weights_TK / 3.0 * 2.5)
    elementwise = route(LOGITS, spec, **operands(spec), topk_reduce_func=lambda s: torch.full_like(s, 3.0))
    assert same_bits(elementwise.weights_TK, called.weights_TK)


def test_a_function_may_yield_the_weights_if_it_says_so() -> None:
    @returns_weights
    def softmax(scores_TK: Tensor) -> Tensor:
        return scores_TK.softmax(dim=-1)

    spec = dataclasses.replace(GLM4, reduce=TopkReduce(kind=ReduceKind.SOFTMAX))
    expected = route(LOGITS, spec, **operands(spec))
    called = route(LOGITS, GLM4, **operands(GLM4), topk_reduce_func=softmax)
    assert same_bits(called.weights_TK, expected.weights_TK)


def test_an_fp64_denominator_makes_the_rest_of_the_chain_fp64() -> None:
    raw = route(
        LOGITS, dataclasses.replace(GLM4, reduce=TopkReduce(kind=ReduceKind.NONE), scale=None), **operands(GLM4)
    )
    called = route(LOGITS, GLM4, **operands(GLM4), topk_reduce_func=lambda s: s.double().sum(dim=-1, keepdim=True))
    scores_TK = raw.weights_TK.double()
    assert same_bits(called.weights_TK, (scores_TK / scores_TK.sum(dim=-1, keepdim=True) * 2.5).float())


def test_the_scores_may_be_an_inference_tensor() -> None:
    with torch.inference_mode():
        called = route(LOGITS.clone(), GLM4, **operands(GLM4), topk_reduce_func=sum_eps)
    assert same_bits(called.weights_TK.clone(), route(LOGITS, GLM4, **operands(GLM4)).weights_TK)


def test_no_tokens_route_to_nothing() -> None:
    for function in (None, sum_eps):
        found = route(LOGITS[:0], GLM4, **operands(GLM4), topk_reduce_func=function)
        assert found.expert_ids_TK.shape == found.weights_TK.shape == (0, 8)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s: s.sum(dim=-1), r"returned shape \(\d+,\), expected \(\d+, 1\) or \(\d+, 8\)"),
        (lambda s: 1.0, "returned float, expected a tensor"),
        (lambda s: s.argmax(dim=-1, keepdim=True), "returned torch.int64, expected a floating-point dtype"),
        (lambda s: s.mul_(2).sum(dim=-1, keepdim=True), "wrote to its argument"),
        (returns_weights(lambda s: s.sum(dim=-1, keepdim=True)), r"expected \(\d+, 8\)"),
    ],
)
def test_a_function_that_breaks_the_contract_is_refused(function: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(LOGITS, GLM4, **operands(GLM4), topk_reduce_func=function)  # type: ignore[arg-type]


def test_a_function_named_in_yaml_is_called(trainer_module: types.ModuleType) -> None:
    plain = {**GLM4.to_plain(), "reduce": {"path": "some_trainer:reduce"}}
    spec = RouterSpec.from_plain(plain)
    assert spec.reduce == TopkReduce.of("some_trainer:reduce")
    assert RouterSpec.from_plain(spec.to_plain()) == spec
    assert same_bits(route(LOGITS, spec, **operands(spec)).weights_TK, route(LOGITS, GLM4, **operands(GLM4)).weights_TK)
    given = route(LOGITS, spec, **operands(spec), topk_reduce_func=sum_eps)
    assert same_bits(given.weights_TK, route(LOGITS, GLM4, **operands(GLM4)).weights_TK)
    with pytest.raises(ValueError, match="two functions: pass one"):
        route(LOGITS, spec, **operands(spec), topk_reduce_func=lambda s: sum_eps(s))


def test_only_route_runs_a_function(trainer_module: types.ModuleType) -> None:
    reduce = TopkReduce.of("some_trainer:reduce")
    with pytest.raises(ValueError, match=r"some_trainer:reduce: call routing\.route"):
        reference(torch.zeros(1, 16), make_spec(reduce=reduce))
    with pytest.raises(ValueError, match=r"some_trainer:reduce: call routing\.route"):
        kernel_route(torch.zeros(1, 16), make_spec(reduce=reduce))


def test_a_function_that_changed_since_the_spec_was_written_is_refused(trainer_module: types.ModuleType) -> None:
    plain = TopkReduce.of("some_trainer:reduce").to_plain()
    trainer_module.reduce = lambda s: s.sum(dim=-1, keepdim=True)  # type: ignore[attr-defined]
    resolve.cache_clear()
    with pytest.raises(ValueError, match="computes something else here"):
        TopkReduce.from_plain(plain)


def test_the_digest_tells_formulas_apart() -> None:
    functions = [
        sum_eps,
        lambda s: s.sum(dim=-1, keepdim=True),
        lambda s: s.sum(dim=-1, keepdim=True).clamp(min=1e-12),
        lambda s: s.sum(dim=-1, keepdim=True) + 1e-12,
        lambda s: s.double().sum(dim=-1, keepdim=True),
        lambda s: s.amax(dim=-1, keepdim=True),
        returns_weights(lambda s: s * 1.0),
    ]
    assert len({probe_digest(function) for function in functions}) == len(functions)
    assert probe_digest(sum_eps) == probe_digest(lambda s: 1e-20 + s.flip(-1).sum(dim=-1, keepdim=True))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_colon", "package.module:function expected"),
        ("no_such_module_here:f", "No module named.*PYTHONPATH"),
        ("some_trainer:nothing", "nothing does not exist in some_trainer"),
        ("some_trainer:constant", "constant is not callable"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_ends(
    trainer_module: types.ModuleType, path: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TopkReduce.of(path)
