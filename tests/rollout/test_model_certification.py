"""A model's routers are tried on the device that hosts them before anything is served."""

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import glm4_config, qwen3_config, save, tiny_model
from torch import Tensor

from rollout import RolloutConfig
from rollout.host import Host
from rollout.hosting import hosting_of
from rollout.model import certification
from rollout.model.hosted import HostedModel
from rollout.model.router import Hosting
from rollout.model.spec import MoeSpec
from rollout.statement import first_moe
from routing import ReduceKind, RouterSpec, TopkReduce
from routing.oracle import EagerOracle
from routing.parity import ParityRefused, certify, examine
from routing.verdict import Verdict


def total(scores_TK: Tensor) -> Tensor:
    return scores_TK.sum(dim=-1, keepdim=True) + 1e-20


def odd(scores_TK: Tensor) -> Tensor:
    return scores_TK.sum(dim=-1, keepdim=True).sqrt()


def mixed(scores_TK: Tensor) -> Tensor:
    return scores_TK.sum(dim=-1, keepdim=True) + scores_TK.sum()


@pytest.fixture(scope="module", autouse=True)
def trainers_module() -> Iterator[str]:
    """Where the reduce functions are found."""
    module = ModuleType("trainer_of_the_certification_test")
    for function in (total, odd, mixed):
        setattr(module, function.__name__, function)
    sys.modules[module.__name__] = module
    yield module.__name__
    del sys.modules[module.__name__]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(glm4_config(), 1), tmp_path_factory.mktemp("glm4"))


def load(folder: Path, function: str | None = None, **fields: Any) -> HostedModel:
    path = None if function is None else f"trainer_of_the_certification_test:{function}"
    return HostedModel.load(folder, hosting=Hosting(topk_reduce_func=path, **fields), device="cpu")


def router(model: HostedModel) -> RouterSpec:
    moe = first_moe(model.spec)
    assert moe is not None
    return moe.router


def test_a_reduce_function_that_is_a_form_is_hosted_as_that_form(folder: Path) -> None:
    model = load(folder, "total")
    assert router(model).reduce == TopkReduce(kind=ReduceKind.SUM_EPS, eps=1e-20)
    assert router(model) == router(load(folder))
    assert {layer.mlp.router for layer in model.spec.layers if isinstance(layer.mlp, MoeSpec)} == {router(model)}


def test_a_reduce_function_that_is_no_form_is_hosted_as_it_is(folder: Path) -> None:
    reduce = router(load(folder, "odd")).reduce
    assert reduce.kind is ReduceKind.CALLABLE
    assert reduce.path == "trainer_of_the_certification_test:odd"


@pytest.mark.parametrize("certifies", [True, False])
def test_a_reduce_function_whose_rows_depend_on_one_another_is_refused(folder: Path, certifies: bool) -> None:
    with pytest.raises(ValueError, match=r"cannot run on cpu: .*mixed: a row's result depends on other rows"):
        load(folder, "mixed", certify=certifies)


class Elsewhere:
    """A certification on a machine whose PyTorch scales otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, function in (("certify", certify), ("examine", examine)):
            monkeypatch.setattr(certification, name, partial(self._with_other_oracle, function))

    @staticmethod
    def _with_other_oracle(function: Any, spec: RouterSpec, device: torch.device) -> Any:
        return function(spec, device, oracle=EagerOracle(spec=replace(spec, scale=3.0)))


def test_in_rl_mode_a_router_that_differs_is_not_hosted_and_the_operation_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Elsewhere(monkeypatch)
    with pytest.raises(ParityRefused, match=r"bits here: scale: expected times 1\.5, after the reduce; found"):
        load(folder)


def test_without_rl_mode_a_router_that_differs_is_hosted_and_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Elsewhere(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="rollout"):
        model = load(folder, certify=False)
    assert model.certification.reports[0].mismatches[0].operation == "scale"
    assert any("bits of scale: expected times 1.5" in line for line in caplog.messages)


def test_rl_mode_decides_whether_a_host_refuses() -> None:
    for rl_mode in (True, False):
        config = RolloutConfig(name="x", model="x", rl_mode=rl_mode)
        assert hosting_of(config, torch.device("cpu")).certify is rl_mode


def test_a_model_without_routing_has_nothing_to_certify(tmp_path: Path) -> None:
    folder = save(tiny_model(qwen3_config(mlp_only_layers=[0, 1]), 1), tmp_path)
    assert load(folder).certification.reports == ()


def test_a_host_says_what_it_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(tmp_path / "run"))
    config = RolloutConfig.from_mapping(
        {
            "name": "x",
            "model": str(folder),
            "rl_mode": True,
            "topk_reduce_func": "trainer_of_the_certification_test:total",
            "weights": {"transport": None},
            "engine": {"max_context": 64, "max_running": 2},
        }
    )
    host = Host(config, "host-0")
    try:
        assert [row.verdict for row in host.introduction.bits] == [Verdict.EQUAL, Verdict.EQUAL]
        assert "runs as the fused sum_eps" in host.introduction.bits[1].why
    finally:
        host.stop()
