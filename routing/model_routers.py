"""Where transformers' MoE models route, as data: one row per router class, and the routers of a model by that.

A class is found by its name, its own or that of a class it derives from, so transformers itself is never imported.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter

from torch import nn


@dataclass(frozen=True, kw_only=True)
class RouterClass:
    """How to read one router class: it chooses with one torch.topk over all experts, and returns a tuple."""

    method: str = "forward"
    """That routes."""
    num_experts: str = "num_experts"
    """The attribute that says over how many experts."""
    top_k: str = "top_k"
    """The attribute that says how many of them a token gets."""
    weights: int = 1
    """The place of the combine weights [T, K] in what it returns."""
    expert_ids: int = 2
    """The place of the expert ids [T, K]."""
    only: Mapping[str, object] = field(default_factory=dict)
    """Attributes with the one value under which the weights are a function of the scores and the ids alone."""


_LOGITS_WEIGHTS_IDS = RouterClass()
_IDS_WEIGHTS_LOGITS = RouterClass(expert_ids=0)

ROUTERS: Mapping[str, RouterClass] = {
    **dict.fromkeys(
        (
            "AXK1TopkRouter",
            "AXK2TopkRouter",
            "AfmoeTokenChoiceRouter",
            "Cohere2MoeTopKRouter",
            "DeepseekV32TopkRouter",
            "DeepseekV3TopkRouter",
            "DeepseekV4TopKRouter",
            "Dots1TopkRouter",
            "Ernie4_5_MoeTopKRouter",
            "Ernie4_5_VLMoeMoeTopKRouter",
            "ExaoneMoeTopkRouter",
            "FlexOlmoTopKRouter",
            "Glm4MoeLiteTopkRouter",
            "Glm4MoeTopkRouter",
            "Glm4vMoeTextTopkRouter",
            "Glm5NextTextTopkRouter",
            "GlmMoeDsaTopkRouter",
            "GptOssTopKRouter",
            "HYV3TopKRouter",
            "HYV4TopkRouter",
            "HunYuanMoEV1Gate",
            "KimiLinearTopkRouter",
            "LagunaTopKRouter",
            "Lfm2MoeTopKRouter",
            "MellumTopKRouter",
            "MiMoV2FlashTopkRouter",
            "MiniMaxM2TopKRouter",
            "MiniMaxM3VLTopKRouter",
            "MiniMaxTopKRouter",
            "Mistral4TopkRouter",
            "MixtralTopKRouter",
            "NemotronHTopkRouter",
            "OlmoeTopKRouter",
            "Qwen2MoeTopKRouter",
            "Qwen3MoeTopKRouter",
            "Qwen3NextTopKRouter",
            "Qwen3VLMoeTextTopKRouter",
            "Qwen3_5MoeTopKRouter",
            "SolarOpenTopkRouter",
            "Step3p7TopKRouter",
        ),
        _LOGITS_WEIGHTS_IDS,
    ),
    **dict.fromkeys(
        ("GraniteMoeHybridTopKRouter", "GraniteMoeSharedTopKRouter", "GraniteMoeTopKRouter"), _IDS_WEIGHTS_LOGITS
    ),
    # With groups its weights are taken from scores that are 0 in the groups that the learner itself would not keep.
    "DeepseekV2TopkRouter": RouterClass(only={"topk_method": "greedy"}),
    "LongcatFlashTopkRouter": RouterClass(num_experts="n_routed_experts", weights=0, expert_ids=1),
    "DbrxFFN": RouterClass(
        method="route_tokens_to_experts", num_experts="experts.num_experts", weights=0, expert_ids=1
    ),
}
"""By class name: transformers 5.17."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelRouter:
    """One MoE layer's router in a model."""

    name: str
    """As named_modules has it."""
    module: nn.Module
    row: RouterClass

    @property
    def num_experts(self) -> int:
        found: int = attrgetter(self.row.num_experts)(self.module)
        return found

    @property
    def top_k(self) -> int:
        found: int = attrgetter(self.row.top_k)(self.module)
        return found


def model_routers(model: nn.Module, known: Mapping[str, RouterClass] = ROUTERS) -> list[ModelRouter]:
    """The routers of all MoE layers, in the order of the layers.

    ValueError naming every block of experts whose router is not known, and where a router's settings, or the model,
    leave nothing that could be replayed.
    """
    routers = []
    for name, module in model.named_modules():
        row = next((known[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in known), None)
        if row is not None:
            routers.append(ModelRouter(name=name, module=module, row=row))
    faults = [*_unknown(model, routers), *_unsuited(routers)]
    if faults:
        raise ValueError(
            f"{type(model).__name__}: {'; '.join(faults)}. Known router classes: {', '.join(sorted(known))}"
        )
    if not routers:
        raise ValueError(
            f"{type(model).__name__} has no router that is known. Known router classes: {', '.join(sorted(known))}"
        )
    return routers


def _unknown(model: nn.Module, routers: list[ModelRouter]) -> Iterator[str]:
    names = [router.name for router in routers]
    for name, module in model.named_modules():
        children = dict(module.named_children())
        inside = name + "." if name else ""
        if "experts" in children and not any(found == name or found.startswith(inside) for found in names):
            parts = ", ".join(f"{child}: {type(part).__name__}" for child, part in children.items())
            yield f"{name or 'the model'} ({type(module).__name__} of {parts}) has experts and no router that is known"


def _unsuited(routers: list[ModelRouter]) -> Iterator[str]:
    for router in routers:
        for attribute, value in router.row.only.items():
            found = getattr(router.module, attribute)
            if found != value:
                kind = type(router.module).__name__
                yield f"{router.name} ({kind}) has {attribute}={found!r}; it can be replayed with {value!r} only"
