"""What this process cannot compute on this device is refused when the model is loaded, with the operation named."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import glm4_config, qwen3_config, save, tiny_model
from torch import Tensor

from rollout.model.checkpoint import CheckpointError
from rollout.model.hosted import HostedModel
from rollout.model.router import Hosting

SPELLED_OUT: dict[str, Any] = {
    "num_experts": 5,
    "top_k": 3,
    "score": "softmax",
    "slot_order": "sorted",
    "reduce": "sum",
    "weight_dtype": "float32",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose tokens go to three experts, as many as no probe of a reduce function has."""
    return save(tiny_model(qwen3_config(num_experts_per_tok=3), seed=1), tmp_path)


@pytest.fixture
def precision() -> Iterator[None]:
    """Puts the process-wide precision of fp32 products back."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def load(folder: Path, hosting: Hosting | None = None) -> HostedModel:
    return HostedModel.load(folder, hosting=hosting, device="cpu")


def with_gate(**gate: object) -> Hosting:
    return Hosting(trainer=SPELLED_OUT | {"gate": gate}, gate="trainer")


def test_a_tf32_gate_is_refused_where_the_process_multiplies_in_full(folder: Path, precision: None) -> None:
    says = r"cannot run on cpu: routing\.gate\.\w+: gate: tf32=True.*set_float32_matmul_precision\('high'\)"
    with pytest.raises(ValueError, match=says):
        load(folder, with_gate(tf32=True))
    torch.set_float32_matmul_precision("high")
    load(folder, with_gate(tf32=True))


def test_a_full_gate_is_refused_where_the_process_multiplies_in_tf32(folder: Path, precision: None) -> None:
    torch.set_float32_matmul_precision("high")
    with pytest.raises(ValueError, match=r"routing\.gate\.\w+: gate: tf32=False.*precision 'high'"):
        load(folder)


@pytest.mark.parametrize("output", ["bfloat16", "float32"])
def test_gates_that_can_be_computed_are_loaded(folder: Path, output: str) -> None:
    load(folder, with_gate(operand_dtype="bfloat16", output_dtype=output))


def test_another_platform_than_the_devices_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hosting\.platform='cuda', but the model goes to cpu"):
        load(tmp_path, Hosting(platform="cuda"))


def test_a_bias_that_the_checkpoint_does_not_hold_is_missing(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.gate\.e_score_correction_bias: missing"):
        load(folder, Hosting(trainer=SPELLED_OUT | {"has_bias": True}))


def test_a_bias_that_the_router_does_not_take_is_unknown(tmp_path: Path) -> None:
    folder = save(tiny_model(glm4_config(num_experts_per_tok=3), seed=1), tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.gate\.e_score_correction_bias: unknown"):
        load(folder, Hosting(trainer=SPELLED_OUT | {"num_experts": 6}))


def of_the_wrong_shape(scores_TK: Tensor) -> Tensor:
    return scores_TK.sum(-1)


def of_another_kind(scores_TK: Tensor) -> object:
    return "the sum"


def writing(scores_TK: Tensor) -> Tensor:
    return scores_TK.add_(1)


def raising(scores_TK: Tensor) -> Tensor:
    raise RuntimeError("three slots are one too many")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (of_the_wrong_shape, r"returned shape \(1,\), expected \(1, 1\) or \(1, 3\)"),
        (of_another_kind, "returned str, expected a tensor"),
        (writing, "wrote to its argument, expected a pure function"),
        (raising, "three slots are one too many"),
    ],
)
def test_a_reduce_function_that_fails_with_this_models_slots_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, function: Any, says: str
) -> None:
    module = ModuleType(f"trainer_{function.__name__}")  # a path is resolved once in a process
    module.reduce = lambda s_TK: function(s_TK) if s_TK.shape[1] == 3 else s_TK.sum(-1, keepdim=True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    hosting = Hosting(topk_reduce_func=f"{module.__name__}:reduce")
    with pytest.raises(
        ValueError, match=rf"cannot run on cpu: routing\.reduce_function\.normalise: .*{says}"
    ) as caught:
        load(folder, hosting)
    assert str(caught.value.__cause__) in str(caught.value)
