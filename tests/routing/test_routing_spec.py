"""RouterSpec: validated, digested, and the same after a trip through YAML."""

import dataclasses
import pickle

import pytest
import torch
import yaml
from router_rows import SPECS, make_spec, sigmoid_spec

import routing
from routing import (
    GateSpec,
    GroupScore,
    GroupSpec,
    ReduceKind,
    RouterSpec,
    ScoreFunction,
    SlotOrder,
    SumOrder,
    TopkReduce,
)


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_survives_yaml_and_pickle(name: str) -> None:
    spec = SPECS[name]
    again = RouterSpec.from_plain(yaml.safe_load(yaml.safe_dump(spec.to_plain())))
    assert again == spec
    assert again.digest == spec.digest == pickle.loads(pickle.dumps(spec)).digest


def test_every_field_is_in_the_digest() -> None:
    spec = sigmoid_spec()
    changes = {
        "num_experts": 32,
        "top_k": 3,
        "score": ScoreFunction.SQRT_SOFTPLUS,
        "has_bias": False,
        "groups": GroupSpec(count=4, kept=2),
        "slot_order": SlotOrder.SORTED,
        "reduce": TopkReduce(kind=ReduceKind.SUM_EPS, eps=1e-6),
        "scale": 1.8,
        "expert_scale": True,
        "chain_dtype": torch.bfloat16,
        "sum_order": SumOrder.ADJACENT,
        "weight_dtype": torch.bfloat16,
        "gate": GateSpec(tf32=True),
        "platform": "cpu",
    }
    assert set(changes) == {field.name for field in dataclasses.fields(RouterSpec)}
    digests = {dataclasses.replace(spec, **{name: value}).digest for name, value in changes.items()}
    assert len(digests | {spec.digest}) == len(changes) + 1


def test_every_field_of_the_parts_is_in_the_digest() -> None:
    groups = GroupSpec(count=4, kept=2)
    parts = [
        groups,
        dataclasses.replace(groups, count=8),
        dataclasses.replace(groups, kept=3),
        dataclasses.replace(groups, top=3),
        dataclasses.replace(groups, score=GroupScore.MAX, top=1),
        dataclasses.replace(groups, top=1),
        dataclasses.replace(groups, mask_value=0.0),
        dataclasses.replace(groups, mask_value=0.0, masks_scores=True),
    ]
    assert len({sigmoid_spec(groups=part).digest for part in parts}) == len(parts)
    gates = [
        GateSpec(),
        GateSpec(tf32=True),
        GateSpec(has_bias=True),
        GateSpec(operand_dtype=torch.bfloat16),
        GateSpec(operand_dtype=torch.bfloat16, output_dtype=torch.bfloat16),
    ]
    assert len({sigmoid_spec(gate=gate).digest for gate in gates}) == len(gates)
    wide = GateSpec(operand_dtype=torch.float64, accumulate_dtype=torch.float64, output_dtype=torch.float64)
    assert wide.to_plain()["accumulate_dtype"] == "float64"


def test_what_has_a_default_may_be_left_out() -> None:
    plain = yaml.safe_load(
        "{num_experts: 16, top_k: 4, score: softmax, slot_order: sorted, reduce: sum,"
        " weight_dtype: float32, platform: cuda}"
    )
    assert RouterSpec.from_plain(plain) == make_spec()
    eps = RouterSpec.from_plain({**plain, "reduce": yaml.safe_load("{kind: sum_eps, eps: 1e-20}")})
    assert eps.reduce.eps == 1e-20  # which YAML 1.1 reads as text
    groups = {"count": 4, "kept": 2, "score": "max"}
    assert RouterSpec.from_plain({**plain, "groups": groups}).groups == GroupSpec(
        count=4, kept=2, score=GroupScore.MAX, top=1
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk": 8, "top_k": None}, r"unknown key 'topk', did you mean 'top_k'\?; missing key 'top_k'"),
        ({"score": "softmx"}, r"'softmx'; did you mean 'softmax'\?"),
        ({"reduce": {"kind": "sum", "epsilon": 1}}, r"TopkReduce: unknown key 'epsilon', did you mean 'eps'\?"),
        ({"gate": {"tf23": True}}, r"GateSpec: unknown key 'tf23', did you mean 'tf32'\?"),
        ({"groups": {"cuont": 4, "kept": 1}}, r"did you mean 'count'\?; missing key 'count'"),
        ({"weight_dtype": "bf16"}, r"not a floating-point dtype: 'bf16'"),
        ({"top_k": 2.5}, "top_k: a whole number expected, got 2.5"),
        ({"has_bias": 1}, "has_bias: true or false expected, got 1"),
        ({"scale": "much"}, "scale: a number expected, got 'much'"),
        ({"platform": "tpu"}, "platform='tpu'"),
        ({"reduce": {"kind": "sum_eps"}}, "kind sum_eps needs eps"),
        ({"reduce": {"kind": "callable"}}, "needs path and digest"),
    ],
)
def test_a_wrong_mapping_names_the_key_and_the_nearest(changes: dict[str, object], message: str) -> None:
    plain = {**make_spec().to_plain(), **changes}
    plain = {key: value for key, value in plain.items() if not (key == "top_k" and value is None)}
    with pytest.raises(ValueError, match=message):
        RouterSpec.from_plain(plain)


def test_every_fault_of_a_spec_is_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"top_k=17.*scale=inf.*chain_dtype=torch\.int8.*weight_dtype=torch\.int32"):
        make_spec(top_k=17, scale=float("inf"), chain_dtype=torch.int8, weight_dtype=torch.int32)
    with pytest.raises(
        ValueError, match=r"reduce=softmax in chain_dtype=torch\.float64.*sum_order=adjacent on platform"
    ):
        make_spec(
            chain_dtype=torch.float64,
            reduce=TopkReduce(kind=ReduceKind.SOFTMAX),
            sum_order=SumOrder.ADJACENT,
            platform="cpu",
        )
    with pytest.raises(ValueError, match=r"16 is no multiple of groups\.count=3"):
        make_spec(groups=GroupSpec(count=3, kept=1))
    with pytest.raises(ValueError, match=r"top=2 of a group of 1.*1 kept groups of 1 experts hold fewer than top_k=4"):
        make_spec(groups=GroupSpec(count=16, kept=1))
    with pytest.raises(ValueError, match=r"kept=5, count=4; top=0.*mask_value=1"):
        GroupSpec(count=4, kept=5, top=0, mask_value=1.0)
    with pytest.raises(ValueError, match=r"masks_scores with mask_value=-inf; 0\.0 expected"):
        GroupSpec(count=4, kept=2, masks_scores=True)
    with pytest.raises(ValueError, match="established for top_k <= 32"):
        make_spec(num_experts=64, top_k=33)
    assert make_spec(num_experts=64, top_k=33, platform="cpu").top_k == 33
    best_33 = GroupSpec(count=2, kept=1, top=33)
    with pytest.raises(ValueError, match=r"groups\.top=33; PyTorch's order on CUDA is established for top <= 32"):
        make_spec(num_experts=80, groups=best_33)
    assert make_spec(num_experts=80, groups=best_33, platform="cpu").groups == best_33
    with pytest.raises(ValueError, match=r"kind sum takes no eps.*neither path nor digest"):
        TopkReduce(kind=ReduceKind.SUM, eps=1.0, path="a:b")
    with pytest.raises(ValueError, match=r"float16; float32 or float64.*do not accumulate in|tf32 is a rounding"):
        GateSpec(accumulate_dtype=torch.float16, operand_dtype=torch.float64, tf32=True)
    with pytest.raises(ValueError, match=r"no product of torch\.bfloat16 operands .*torch\.bfloat16 or torch\.float32"):
        GateSpec(operand_dtype=torch.bfloat16, output_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"output_dtype=torch\.float32: PyTorch has no product of torch\.float64"):
        GateSpec(operand_dtype=torch.float64, accumulate_dtype=torch.float64)


def test_the_public_names_are_these() -> None:
    assert routing.__all__ == sorted(routing.__all__)
    assert set(routing.__all__) == {
        "Assignment", "Chosen", "ExpertGroups", "GateSpec", "GroupScore", "GroupSpec", "InstalledGate",
        "ParityRefused", "ParityReport", "Platform", "ReduceFunction", "ReduceKind", "Replay", "ReplayReport",
        "RouterClass", "RouterSpec", "RoutingRecord", "ScoreFunction", "SlotOrder", "SumOrder", "TopkReduce",
        "certify", "certify_reduce", "examine", "expert_counts", "gate_logits", "gather_tokens", "group_by_expert",
        "install_gate", "kernel_chosen", "kernel_route", "kernel_route_from_scores", "observe", "packed_record",
        "padded_record", "probe_digest", "reference", "reference_chosen", "reference_from_scores", "replay",
        "resolve", "returns_weights", "route",
    }  # fmt: skip
    for name in routing.__all__:
        assert hasattr(routing, name)
