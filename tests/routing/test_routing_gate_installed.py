"""Our gate inside transformers' models: the logits are ours, the rest stays theirs, and nothing is left behind."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.dbrx.modeling_dbrx import DbrxRouter
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.hunyuan_v1_moe.modeling_hunyuan_v1_moe import HunYuanMoEV1Gate
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from routing import GateSpec, gate_logits
from routing.installed_gate import install_gate

BF16 = torch.bfloat16
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 16}
GROUPED = {**MOE, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
ROUTERS: dict[type[nn.Module], tuple[str, dict[str, Any]]] = {
    Qwen3MoeTopKRouter: ("Qwen3MoeConfig", MOE),
    Glm4MoeTopkRouter: ("Glm4MoeConfig", GROUPED),
    DeepseekV2TopkRouter: ("DeepseekV2Config", GROUPED),
    DeepseekV3TopkRouter: ("DeepseekV3Config", GROUPED),
    MixtralTopKRouter: ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    OlmoeTopKRouter: ("OlmoeConfig", MOE),
    GptOssTopKRouter: ("GptOssConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    Ernie4_5_MoeTopKRouter: ("Ernie4_5_MoeConfig", {"moe_num_experts": 8, "moe_k": 2}),
    HunYuanMoEV1Gate: ("HunYuanMoEV1Config", {"num_experts": 8, "moe_topk": 2}),
    DbrxRouter: ("DbrxConfig", {"moe_num_experts": 8, "moe_jitter_eps": None}),
    Llama4Router: ("Llama4TextConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}),
}


def config(name: str, **more: Any) -> PretrainedConfig:
    kind = getattr(transformers, name, None)
    if kind is None:
        kind = getattr(transformers.models.dbrx.configuration_dbrx, "DbrxFFNConfig")  # noqa: B009
    return kind(**{**SMALL, **more})


def router_of(kind: type[nn.Module]) -> nn.Module:
    """With random parameters, in bf16 as far as its own code takes that."""
    name, more = ROUTERS[kind]
    router = kind(config(name, **more))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.3)
    return router


def qwen3(dtype: torch.dtype = BF16) -> PreTrainedModel:
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(config("Qwen3MoeConfig", **MOE, norm_topk_prob=True)).to(dtype)


TOKEN_IDS = torch.randint(0, 64, (3, 11), generator=torch.Generator().manual_seed(1))


def watched(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Router name -> the hidden states that it got and the logits that it gave, at the last forward pass."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda _, inputs, output: seen.update({name: (inputs[0].detach(), output[0])})

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(watch(name))
    return seen


@pytest.mark.parametrize("kind", ROUTERS, ids=lambda kind: kind.__name__)
def test_every_familys_router_takes_the_gate_and_stays_itself(kind: type[nn.Module]) -> None:
    """In fp32 on a CPU the gate is the model's own product, so every output is the same in every bit; that it was the
    gate's, once, the forward pass itself makes sure of."""
    router = router_of(kind)
    has_bias = getattr(router, "bias", None) is not None
    holder = nn.ModuleDict({"router": router})
    names = set(holder.state_dict())
    hidden_TD = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = router(hidden_TD)
        with install_gate(holder, GateSpec(has_bias=has_bias)) as installed:
            assert installed.routers == ("router",)
            assert isinstance(router, kind)
            assert set(holder.state_dict()) == names
            found = router(hidden_TD)
        assert type(router) is kind
        for one, other in zip(flat(found), flat(expected), strict=True):
            assert torch.equal(one, other)


def flat(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def test_the_logits_are_gate_logits_and_the_model_still_gives_its_own_afterwards() -> None:
    model = qwen3()
    seen = watched(model)
    with torch.no_grad():
        before = model(TOKEN_IDS).logits
        plain = {name: logits for name, (_, logits) in seen.items()}
        with install_gate(model) as installed:
            assert installed.routers == ("model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
            changed = model(TOKEN_IDS, output_router_logits=True)
            for index, name in enumerate(installed.routers):
                hidden, logits_TE = seen[name]
                weight_ED = model.get_parameter(f"{name}.weight")
                assert logits_TE.dtype == torch.float32
                assert torch.equal(logits_TE, gate_logits(hidden.reshape(-1, 32), weight_ED, GateSpec()))
                assert torch.equal(changed.router_logits[index], logits_TE)
        assert not torch.equal(changed.logits, before)
        assert torch.equal(model(TOKEN_IDS).logits, before)
    assert all(torch.equal(seen[name][1], logits) for name, logits in plain.items())
    assert all(logits.dtype == BF16 for logits in plain.values())


def parameter_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    model(TOKEN_IDS).logits.double().sin().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradients_are_the_models_own() -> None:
    """In fp32, where the forward pass is the same."""
    model = qwen3(torch.float32)
    expected = parameter_gradients(model)
    with install_gate(model):
        found = parameter_gradients(model)
    assert set(found) == set(expected)
    assert any("mlp.gate" in name for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = qwen3().train()
    model.config.use_cache = False
    with install_gate(model):
        expected = parameter_gradients(model)
        for is_reentrant in (False, True):
            model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
            found = parameter_gradients(model)
            assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    assert expected["model.layers.0.mlp.gate.weight"].dtype == BF16


def test_autocast_and_no_grad_give_the_same_logits() -> None:
    model = qwen3(torch.float32)
    seen = watched(model)
    with install_gate(model), torch.autocast(device_type="cpu", dtype=BF16):
        model(TOKEN_IDS)
        trained = {name: logits.detach() for name, (_, logits) in seen.items()}
        with torch.no_grad():
            model(TOKEN_IDS)
        for name, (hidden, logits_TE) in seen.items():
            assert torch.equal(logits_TE, trained[name])
            weight_ED = model.get_parameter(f"{name}.weight")
            assert torch.equal(logits_TE, gate_logits(hidden.reshape(-1, 32), weight_ED, GateSpec()))


def test_a_copy_of_the_model_runs_on_its_own_weights() -> None:
    model = qwen3()
    with install_gate(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.get_parameter("model.layers.0.mlp.gate.weight").mul_(-2)
            seen = watched(twin)
            twin(TOKEN_IDS)
    hidden, logits_TE = seen["model.layers.0.mlp.gate"]
    weight_ED = twin.get_parameter("model.layers.0.mlp.gate.weight")
    assert torch.equal(logits_TE, gate_logits(hidden.reshape(-1, 32), weight_ED, GateSpec()))


def test_other_layers_of_the_same_shape_are_left_alone() -> None:
    """The gate is installed in routers only, and only while one of them runs."""
    model = qwen3()
    model.model.layers[0].mlp.shared_expert_gate = nn.Linear(32, 8, bias=False).to(BF16)
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(BF16)
    with install_gate(model), torch.no_grad():
        layer = model.model.layers[0].mlp.shared_expert_gate
        assert torch.equal(layer(rows), linear(rows, layer.weight))
        assert layer(rows).dtype == BF16


class TwiceRouter(nn.Module):
    """Multiplies as often as it is told."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 32))
        self.times = times

    def forward(self, hidden_TD: Tensor) -> list[Tensor]:
        return [linear(hidden_TD, self.weight) for _ in range(self.times)]


class DeepRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(32, 16)
        self.up = nn.Linear(16, 8)


def test_what_does_not_fit_is_refused_and_nothing_is_changed() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no router.*Its classes: Linear, Sequential"):
        install_gate(nn.Sequential(nn.Linear(2, 2)))
    mixed = nn.ModuleDict({"first": router_of(Qwen3MoeTopKRouter), "second": DeepRouter()})
    with pytest.raises(ValueError, match=r"second: DeepRouter has 2 matrices \(down\.weight, up\.weight\), one"):
        install_gate(mixed)
    assert type(mixed["first"]) is Qwen3MoeTopKRouter
    biased = nn.ModuleDict({"router": router_of(GptOssTopKRouter)})
    with pytest.raises(ValueError, match=r"router: its linear layer has a bias: use GateSpec\(has_bias=True\)"):
        install_gate(biased)
    hooked = router_of(Qwen3MoeTopKRouter)
    hooked.forward = hooked.forward
    with pytest.raises(ValueError, match="its forward was replaced on the instance"):
        install_gate(nn.ModuleDict({"router": hooked}))


def test_a_gate_is_installed_once_and_removed_once() -> None:
    model = qwen3()
    installed = install_gate(model, GateSpec(operand_dtype=BF16))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate: has a gate installed already.*layers\.1"):
        install_gate(model)
    installed.remove()
    installed.remove()
    assert type(model.model.layers[0].mlp.gate) is Qwen3MoeTopKRouter


@pytest.mark.parametrize("times", [0, 2])
def test_a_router_that_does_not_multiply_once_says_so_when_it_runs(times: int) -> None:
    model = nn.ModuleDict({"router": TwiceRouter(times)})
    with install_gate(model), pytest.raises(RuntimeError, match=f"multiplied by its weight {times} times, once"):
        model["router"](torch.zeros(3, 32))
