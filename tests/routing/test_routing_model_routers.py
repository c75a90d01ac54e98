"""Which routers replay knows: transformers' own, each replayed bit by bit; strangers are refused by name."""

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from routing import RouterClass, RoutingRecord, replay
from routing.model_routers import ROUTERS, model_routers

T, D, E, K = 12, 16, 8, 3
FAMILIES = {
    "AXK1TopkRouter": "axk1",
    "AXK2TopkRouter": "axk2",
    "AfmoeTokenChoiceRouter": "afmoe",
    "Cohere2MoeTopKRouter": "cohere2_moe",
    "DbrxFFN": "dbrx",
    "DeepseekV2TopkRouter": "deepseek_v2",
    "DeepseekV32TopkRouter": "deepseek_v32",
    "DeepseekV3TopkRouter": "deepseek_v3",
    "DeepseekV4TopKRouter": "deepseek_v4",
    "Dots1TopkRouter": "dots1",
    "Ernie4_5_MoeTopKRouter": "ernie4_5_moe",
    "Ernie4_5_VLMoeMoeTopKRouter": "ernie4_5_vl_moe",
    "ExaoneMoeTopkRouter": "exaone_moe",
    "FlexOlmoTopKRouter": "flex_olmo",
    "Glm4MoeLiteTopkRouter": "glm4_moe_lite",
    "Glm4MoeTopkRouter": "glm4_moe",
    "Glm4vMoeTextTopkRouter": "glm4v_moe",
    "Glm5NextTextTopkRouter": "glm5_next",
    "GlmMoeDsaTopkRouter": "glm_moe_dsa",
    "GptOssTopKRouter": "gpt_oss",
    "GraniteMoeHybridTopKRouter": "granitemoehybrid",
    "GraniteMoeSharedTopKRouter": "granitemoeshared",
    "GraniteMoeTopKRouter": "granitemoe",
    "HYV3TopKRouter": "hy_v3",
    "HYV4TopkRouter": "hy_v4",
    "HunYuanMoEV1Gate": "hunyuan_v1_moe",
    "KimiLinearTopkRouter": "kimi_linear",
    "LagunaTopKRouter": "laguna",
    "Lfm2MoeTopKRouter": "lfm2_moe",
    "LongcatFlashTopkRouter": "longcat_flash",
    "MellumTopKRouter": "mellum",
    "MiMoV2FlashTopkRouter": "mimo_v2_flash",
    "MiniMaxM2TopKRouter": "minimax_m2",
    "MiniMaxM3VLTopKRouter": "minimax_m3_vl",
    "MiniMaxTopKRouter": "minimax",
    "Mistral4TopkRouter": "mistral4",
    "MixtralTopKRouter": "mixtral",
    "NemotronHTopkRouter": "nemotron_h",
    "OlmoeTopKRouter": "olmoe",
    "Qwen2MoeTopKRouter": "qwen2_moe",
    "Qwen3MoeTopKRouter": "qwen3_moe",
    "Qwen3NextTopKRouter": "qwen3_next",
    "Qwen3VLMoeTextTopKRouter": "qwen3_vl_moe",
    "Qwen3_5MoeTopKRouter": "qwen3_5_moe",
    "SolarOpenTopkRouter": "solar_open",
    "Step3p7TopKRouter": "step3p7",
}
"""Which family of transformers defines the class."""


class AnyConfig(SimpleNamespace):
    """Stands for every family's config: a router reads a handful of these names."""

    def __init__(self, **fields: Any) -> None:
        names = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
        super().__init__(
            **dict.fromkeys(names, E),
            **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k"), K),
            **dict.fromkeys(("hidden_size", "ffn_hidden_size"), D),
            **dict.fromkeys(("routed_scaling_factor", "router_scaling_factor", "route_scale"), 1.5),
            **dict.fromkeys(("norm_topk_prob", "route_norm", "use_expert_bias", "moe_router_use_sigmoid"), True),
            n_group=2,
            topk_group=2,
            topk_method="greedy",
            scoring_func="sigmoid",
            score_func="sigmoid",
            moe_norm_min=1e-12,
            moe_normalize_expert_weights=1,
            moe_jitter_eps=None,
            moe_router_logit_softcapping=0.0,
            zero_expert_num=4,
            router_bias=False,
            expert_selection_fn="softmax",
            ffn_act_fn={"name": "silu"},
        )
        self.__dict__.update(fields)
        self.ffn_config = self


class Layer(nn.Module):
    """A router with what its layer would hand it."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.gate = router

    def forward(self, hidden: Tensor) -> Any:
        row = ROUTERS[type(self.gate).__name__]
        if row.method != "forward":
            return getattr(self.gate, row.method)(self.gate.router(hidden))
        biased = [name for name in inspect.signature(self.gate.forward).parameters if "bias" in name]
        bias = torch.linspace(0.2, -0.2, E)
        # every family's router takes a batch, or its rows
        return self.gate(
            hidden.view(1, T, D) if "Afmoe" in type(self.gate).__name__ else hidden, *([bias] if biased else [])
        )


def layer_of(name: str, **fields: Any) -> Layer:
    module = importlib.import_module(f"transformers.models.{FAMILIES[name]}.modeling_{FAMILIES[name]}")
    torch.manual_seed(0)
    router = getattr(module, name)(AnyConfig(**fields))
    for tensor in (*router.parameters(), *router.buffers()):
        tensor.data.normal_()
    return Layer(router)


def parts(layer: Layer, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, weights, and the gradient that the weights give the hidden states."""
    row = ROUTERS[type(layer.gate).__name__]
    hidden = hidden.clone().requires_grad_()
    out = layer(hidden)
    weights = out[row.weights]
    (gradient,) = torch.autograd.grad((weights * torch.linspace(1, 2, weights.shape[-1])).sum(), hidden)
    return out[row.expert_ids], weights.detach(), gradient


def record_of(ids_TK: Tensor) -> RoutingRecord:
    return RoutingRecord(expert_ids_BSLK=ids_TK.view(1, T, 1, -1), recorded_BS=torch.ones(1, T, dtype=torch.bool))


def test_the_table_here_and_the_table_there_have_the_same_rows() -> None:
    assert FAMILIES.keys() == ROUTERS.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_known_router_replays_its_own_choice_bit_by_bit_and_any_other(name: str) -> None:
    layer = layer_of(name)
    hidden = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    expected = parts(layer, hidden)
    with replay(layer, record_of(expected[0])) as replayed:
        found = parts(layer, hidden)
    assert [torch.equal(*pair) for pair in zip(found, expected, strict=True)] == [True, True, True]
    assert replayed.report().differing == 0
    experts = model_routers(layer)[0].num_experts
    other = torch.rand(T, experts, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :K]
    with replay(layer, record_of(other)) as replayed:
        ids, weights, gradient = parts(layer, hidden)
    assert torch.equal(ids, other)
    assert weights.abs().min() > 0
    assert gradient.abs().max() > 0
    assert replayed.report().differing > 0


def test_weights_masked_by_the_learners_own_groups_are_refused() -> None:
    layer = layer_of("DeepseekV2TopkRouter", topk_method="group_limited_greedy", n_group=2, topk_group=1)
    refusal = r"gate \(DeepseekV2TopkRouter\) has topk_method='group_limited_greedy'; it can be replayed with 'greedy'"
    with pytest.raises(ValueError, match=refusal):
        model_routers(layer)


class StrangeRouter(nn.Module):
    """Chooses by sorting."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = E, K

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores_TE = hidden_TD[:, :E].softmax(-1)
        order_TE = scores_TE.argsort(dim=-1, descending=True)
        return hidden_TD, scores_TE.gather(1, order_TE)[:, :K], order_TE[:, :K]


class ReorderingRouter(StrangeRouter):
    """Chooses with a top-k, and returns the ids in another order."""

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights_TK, ids_TK = hidden_TD[:, :E].softmax(-1).topk(K)
        return hidden_TD, weights_TK.flip(1), ids_TK.flip(1)


class StrangeMoe(nn.Module):
    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router
        self.experts = nn.Identity()

    def forward(self, hidden_TD: Tensor) -> Any:
        return self.router(hidden_TD)


def test_a_block_of_experts_with_an_unknown_router_is_refused_by_name() -> None:
    model = nn.ModuleList([StrangeMoe(layer_of("OlmoeTopKRouter").gate), StrangeMoe(StrangeRouter())])
    with pytest.raises(
        ValueError, match=r"1 \(StrangeMoe of router: StrangeRouter, experts: Identity\) has exp"
    ) as caught:
        model_routers(model)
    assert "0 (StrangeMoe" not in str(caught.value)
    assert "Known router classes: AXK1TopkRouter, " in str(caught.value)


def test_a_model_without_routers_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no router that is known"):
        model_routers(nn.Linear(2, 2))


@pytest.mark.parametrize(("router", "calls"), [(StrangeRouter(), 0), (ReorderingRouter(), 1)])
def test_a_router_that_chooses_in_another_way_is_refused_though_it_was_given_a_row(
    router: nn.Module, calls: int
) -> None:
    model = StrangeMoe(router)
    hidden = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    record = record_of(torch.arange(K).expand(T, K))
    rows = {type(router).__name__: RouterClass()}
    refusal = rf"router \({type(router).__name__}\) has to take the ids .*; it called {calls} such"
    with pytest.raises(ValueError, match=refusal), replay(model, record, extra_routers=rows):
        model(hidden)


class OwnRouter(StrangeRouter):
    """A caller's own class, as RouterClass wants it."""

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights_TK, ids_TK = hidden_TD[:, :E].softmax(-1).topk(K)
        return hidden_TD, weights_TK, ids_TK


def test_a_callers_own_router_class_and_what_derives_from_it_are_replayed() -> None:
    derived = type("Derived", (OwnRouter,), {})
    model = StrangeMoe(derived())
    hidden = torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    ids_TK = torch.arange(K).expand(T, K)
    with replay(model, record_of(ids_TK), extra_routers={"OwnRouter": RouterClass()}):
        _, weights_TK, found_TK = model(hidden)
    assert torch.equal(found_TK, ids_TK)
    assert torch.equal(weights_TK, hidden[:, :E].softmax(-1)[:, :K])
