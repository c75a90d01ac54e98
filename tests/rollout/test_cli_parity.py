"""moe-rollout parity as one types it: the table, the exit status, and every mistake on one line."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from checkpoints import glm4_config, save, tiny_model

from rollout.cli import main, parity
from routing import RouterSpec
from routing.oracle import EagerOracle
from routing.parity import examine
from routing.stages import Operation

QWEN3 = {
    "model_type": "qwen3_moe",
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "hidden_size": 64,
    "dtype": "bfloat16",
}
OPERATIONS = [str(operation) for operation in Operation if operation is not Operation.EXPERT_SCALE]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def functions() -> Iterator[None]:
    """Reduce functions that a trainer may have."""
    module = ModuleType("trainer_of_the_parity_test")
    module.total = lambda x: x.sum(-1, keepdim=True)  # type: ignore[attr-defined]
    module.odd = lambda x: x.sum(-1, keepdim=True) * 1.5  # type: ignore[attr-defined]
    module.mixed = lambda x: x.sum(-1, keepdim=True) + x.sum()  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    yield
    del sys.modules[module.__name__]


def run(folder: Path, *argv: str, trainer: str = "transformers") -> int:
    return main(["parity", "--trainer", trainer, "--model", str(folder), "--device", "cpu", *argv])


def rows(capsys: pytest.CaptureFixture[str], folder: Path, *argv: str, **more: str) -> dict[str, dict[str, str]]:
    """What --plain prints, by operation."""
    assert run(folder, "--plain", *argv, **more) == 0
    heads, *lines = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    return {line[0]: dict(zip(heads, line, strict=True)) for line in lines}


def test_the_table_has_a_row_for_every_operation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, folder)
    assert list(found) == OPERATIONS
    assert {name: row["bits"] for name, row in found.items() if name != "gate product"} == dict.fromkeys(
        OPERATIONS[1:], "equal"
    )
    assert found["score function"]["expected"] == "softmax over 16 experts, float32"
    assert found["reduce"]["expected"] == "s / sum(s)"
    assert found["slot order"]["expected"] == "torch.topk(sorted=True)"
    assert found["whole router"]["found"].startswith("ids of 0 and weights of 0 of ")


def test_a_table_for_people_says_why_below(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder) == 0
    said = capsys.readouterr()
    assert "transformers, " in said.out
    assert "with PyTorch" in said.out
    assert "note: gate product: the trainer computes another product" in said.out
    assert "CUDA was not asked" in said.err


def test_an_fp32_gate_is_impossible_for_a_bf16_trainer_and_no_mismatch(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = rows(capsys, folder)["gate product"]
    assert row["expected"] == "bfloat16 operands, bfloat16 logits"
    assert row["found"] == "float32 operands, float32 logits here"
    assert row["bits"] == "impossible"


def test_the_trainers_own_gate_is_measured_with_random_weights_or_the_checkpoints(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "(16 x 64, random weights)" in rows(capsys, folder, "--gate", "trainer")["gate product"]["found"]
    checkpoint = save(tiny_model(glm4_config(), 1), tmp_path / "glm4")
    found = rows(capsys, checkpoint, "--gate", "trainer", "--dtype", "float32")["gate product"]
    assert "(6 x 32, model.layers.1.mlp.gate.weight)" in found["found"]
    assert found["bits"] in ("impossible", "unproved")


def test_the_dtype_of_the_trainer_may_be_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = rows(capsys, folder, "--gate", "trainer")["weight dtype"]
    other = rows(capsys, folder, "--gate", "trainer", "--dtype", "float16")["weight dtype"]
    assert (own["expected"], other["expected"]) == ("bfloat16", "float16")


def test_what_does_not_run_here_is_unproved_and_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, trainer, why in (
        ((), "paddle", "Paddle's operators do not run beside PyTorch"),
        (("--compiled",), "transformers", "torch.compile"),
    ):
        found = rows(capsys, folder, *argv, trainer=trainer)
        del found["gate product"]
        assert {row["bits"] for row in found.values()} == {"unproved"}
        assert all(why in row["why"] for row in found.values())


def test_a_reduce_function_is_fused_or_runs_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fused = rows(capsys, folder, "--reduce", "trainer_of_the_parity_test:total")["reduce"]
    assert fused["found"].startswith("sum; 0 of ")
    assert "fused: all " in fused["why"]
    itself = rows(capsys, folder, "--reduce", "trainer_of_the_parity_test:odd")["reduce"]
    assert itself["found"].startswith("itself; 0 of ")
    assert "runs as it is: the nearest form" in itself["why"]


def test_a_mismatch_ends_with_status_1_and_names_the_operation(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(spec: RouterSpec, device: torch.device, **more: bool):  # type: ignore[no-untyped-def]
        return examine(spec, device, oracle=EagerOracle(spec=replace(spec, scale=2.0)), **more)

    scaled = partial(elsewhere)
    monkeypatch.setattr(parity, "examine", scaled)
    (folder / "config.json").write_text(json.dumps(glm4_config().to_dict() | {"dtype": "float32"}))
    assert run(folder, "--plain") == 1
    said = capsys.readouterr()
    row = next(line for line in said.out.splitlines() if line.startswith("scale\t")).split("\t")
    assert row[3] == "impossible"
    error = said.err.splitlines()[-1]
    assert error.startswith("moe-rollout parity: routing has not the trainer's bits here: scale: expected times 1.5")


@pytest.mark.parametrize(
    ("argv", "status", "says"),
    [
        (("--trainer", "transfomers"), 1, "unknown trainer 'transfomers'; did you mean 'transformers'?"),
        (("--model", "/no/where"), 1, "--model: there is no folder /no/where; give one that holds a config.json"),
        (("--reduce", "nowhere:total"), 1, "No module named 'nowhere'; is its folder on PYTHONPATH?"),
        (("--reduce", "trainer_of_the_parity_test:none"), 1, "none does not exist in trainer_of_the_parity_test"),
        (("--reduce", "trainer_of_the_parity_test:mixed"), 1, "a row's result depends on other rows"),
        (("--dtype", "int8"), 2, "invalid choice: 'int8'"),
        (("--gate", "bf16"), 2, "invalid choice: 'bf16'"),
        (("--nonsense",), 2, "unrecognized arguments: --nonsense"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, argv: tuple[str, ...], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        answer = run(folder, *argv)
    except SystemExit as ended:
        answer = int(str(ended.code))
    lines = capsys.readouterr().err.splitlines()
    assert answer == status
    assert len(lines) == 1, lines
    assert says in lines[0]


def test_a_folder_without_a_config_and_a_family_without_a_router_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path) == 1
    assert "config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert run(tmp_path) == 1
    assert "no routing known for model_type 'llama' under trainer 'transformers'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_no_silent_cpu(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--device", "cuda") == 1
    assert "--device cuda, but PyTorch sees no GPU here" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["fp32", "trainer"])
def test_on_a_gpu_every_router_row_is_equal(folder: Path, gate: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, folder, "--device", "cuda", "--gate", gate)
    assert {row["bits"] for name, row in found.items() if name != "gate product"} == {"equal"}
    assert found["sum order"]["found"].startswith(("halving", "adjacent"))
