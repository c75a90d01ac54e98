"""What is promised about the trainer's bits, and that no more is promised than holds."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from checkpoints import glm4_config, qwen3_config
from torch import Tensor

from rollout import RolloutConfig
from rollout.hosting import hosting_of
from rollout.model.families import decoder_spec
from rollout.statement import Row, certified_rows, statement
from routing import RouterSpec
from routing.oracle import EagerOracle
from routing.parity import ParityReport, certify, examine
from routing.verdict import Verdict

GIVEN = ("expert ids, given the logits", "combine weights, given the logits")


def halves(scores_TK: Tensor) -> Tensor:
    """A reduce function of a trainer's own."""
    return scores_TK.sum(dim=-1, keepdim=True) * 2


def said(hf_config: Any, platform: Any = "cpu", *, dtype: str = "float32", **changes: Any) -> dict[str, Row]:
    plain = hf_config.to_dict() | {"architectures": [ARCHITECTURES[hf_config.model_type]], "dtype": dtype}
    config = RolloutConfig(**{"name": "x", "model": "x", "rl_mode": True} | changes)
    hosting = replace(hosting_of(config, torch.device("cpu")), platform=platform)
    spec, trainers = decoder_spec(plain, hosting), decoder_spec(plain, replace(hosting, gate="trainer"))
    return {row.operation: row for row in statement(config, spec, trainers, platform)}


ARCHITECTURES = {"qwen3_moe": "Qwen3MoeForCausalLM", "glm4_moe": "Glm4MoeForCausalLM"}


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("hf_config", [qwen3_config(), glm4_config()], ids=["qwen3", "glm4"])
def test_given_the_logits_a_named_trainers_routing_is_equal(hf_config: Any, platform: str) -> None:
    rows = said(hf_config, platform)
    assert {rows[name].verdict for name in (*GIVEN, "weights", "embedding")} == {Verdict.EQUAL}


def test_an_fp32_gate_against_a_bf16_trainer_is_impossible_and_says_what_to_do() -> None:
    row = said(qwen3_config(), "cuda", dtype="bfloat16")["gate"]
    assert row.verdict is Verdict.IMPOSSIBLE
    assert "float32 operands and float32 logits here, bfloat16 operands and bfloat16 logits in the trainer" in row.why
    assert "gate: trainer" in row.why


def test_the_trainers_own_bf16_gate_is_unproved_on_a_gpu() -> None:
    assert said(qwen3_config(), "cuda", dtype="bfloat16", gate="trainer")["gate"].verdict is Verdict.UNPROVED


@pytest.mark.parametrize("hf_config", [qwen3_config(), glm4_config()], ids=["qwen3", "glm4"])
def test_an_fp32_product_is_never_promised(hf_config: Any) -> None:
    for platform in ("cpu", "cuda"):
        rows = said(hf_config, platform)
        assert rows["gate"].verdict is rows["linear layers"].verdict is Verdict.IMPOSSIBLE
        assert "follow the batch" in rows["gate"].why


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_that_contains_a_product_is_promised_anywhere(platform: str, dtype: str) -> None:
    rows = said(qwen3_config(), platform, dtype=dtype)
    equal = {name for name, row in rows.items() if row.verdict is Verdict.EQUAL}
    assert equal <= {"weights", "embedding", "rotary embedding", *GIVEN}


def test_a_router_spelled_out_is_followed_and_not_vouched_for() -> None:
    plain = qwen3_config().to_dict() | {"architectures": ["Qwen3MoeForCausalLM"], "dtype": "float32"}
    spelled = RouterSpec.from_trainer("transformers", plain, dtype=torch.float32, platform="cpu").to_plain()
    rows = said(qwen3_config(), trainer=spelled)
    assert {rows[name].verdict for name in GIVEN} == {Verdict.UNPROVED}
    assert "as it is spelled out" in rows[GIVEN[0]].why


def test_a_reduce_function_is_named_with_its_digest_and_unproved() -> None:
    rows = said(qwen3_config(), topk_reduce_func=f"{halves.__module__}:halves")
    assert rows[GIVEN[0]].verdict is Verdict.EQUAL
    assert rows[GIVEN[1]].verdict is Verdict.UNPROVED
    assert f"{halves.__module__}:halves (digest " in rows[GIVEN[1]].why
    assert "tries it on probe rows" in rows[GIVEN[1]].why


def test_on_a_gpu_without_rl_mode_routing_is_unproved_until_a_host_has_tried_it() -> None:
    assert said(qwen3_config(), "cuda")[GIVEN[0]].verdict is Verdict.EQUAL
    rows = said(qwen3_config(), "cuda", rl_mode=False)
    assert {rows[name].verdict for name in GIVEN} == {Verdict.UNPROVED}
    assert "a host that starts says what it finds" in rows[GIVEN[0]].why


def test_a_trainer_whose_kernels_do_not_run_here_is_unproved() -> None:
    rows = said(qwen3_config(), trainer="paddle")
    assert {rows[name].verdict for name in GIVEN} == {Verdict.UNPROVED}
    assert "do not run beside PyTorch" in rows[GIVEN[0]].why


CPU = torch.device("cpu")
ROUTER = RouterSpec.from_trainer("transformers", glm4_config().to_dict(), dtype=torch.float32, platform="cpu")


def found(report: ParityReport, **changes: Any) -> dict[str, Row]:
    config = RolloutConfig(name="x", model="x", rl_mode=True, **changes)
    return {row.operation: row for row in certified_rows(config, (report,))}


def test_what_a_host_found_takes_the_place_of_what_was_expected() -> None:
    rows = found(certify(ROUTER, CPU))
    assert set(rows) == set(GIVEN)
    assert {row.verdict for row in rows.values()} == {Verdict.EQUAL}
    assert "probe tokens on cpu, PyTorch" in rows[GIVEN[0]].why
    assert certified_rows(RolloutConfig(name="x", model="x", rl_mode=True), ()) == ()


def test_what_a_host_found_about_a_reduce_function_is_said() -> None:
    fused = found(certify(ROUTER, CPU, function=lambda x: x.sum(-1, keepdim=True)))
    assert fused[GIVEN[1]].verdict is Verdict.EQUAL
    assert "runs as the fused sum: all " in fused[GIVEN[1]].why
    assert "fused" not in fused[GIVEN[0]].why
    itself = found(certify(ROUTER, CPU, function=halves))
    assert "halves runs as it is: the nearest form" in itself[GIVEN[1]].why


def test_what_a_host_found_to_differ_is_impossible_and_named() -> None:
    other = EagerOracle(spec=replace(ROUTER, scale=3.0))
    rows = found(examine(ROUTER, CPU, oracle=other))
    assert rows[GIVEN[0]].verdict is Verdict.EQUAL
    assert rows[GIVEN[1]].verdict is Verdict.IMPOSSIBLE
    assert rows[GIVEN[1]].why.startswith("scale differs")


def test_what_a_host_found_does_not_vouch_for_a_trainer_that_was_not_run() -> None:
    for trainer in ("paddle", ROUTER.to_plain()):
        rows = found(certify(ROUTER, CPU), trainer=trainer)
        assert {row.verdict for row in rows.values()} == {Verdict.UNPROVED}
        assert "probe tokens" in rows[GIVEN[0]].why


def test_a_model_without_routing_has_no_router_to_speak_of() -> None:
    rows = said(qwen3_config(mlp_only_layers=[0, 1]))
    assert not {"gate", "experts", *GIVEN} & set(rows)
