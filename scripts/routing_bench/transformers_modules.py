"""Are ids and weights those of transformers' own router modules? T tokens, E experts."""

import torch
from transformers_routers import HIDDEN, config_of, own_bias, router_of, run

from routing import Platform, RouterSpec, route
from routing_bench.models import TRAINER, Model
from routing_bench.rows import families, mixed
from routing_bench.tally import Count, Tally, poisoned_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Of the module."""


def spec_of(model: Model, dtype: torch.dtype, platform: Platform) -> RouterSpec:
    """What the module computes in that dtype."""
    return RouterSpec.from_trainer(TRAINER, model.config, dtype=dtype, platform=platform, gate="trainer")


def compared(model: Model, dtype: torch.dtype, device: torch.device, *, batches: int, tokens: int) -> Count:
    """The families and random rows, put in the place of what the module's linear layer makes of its input.

    Whatever surrounds that layer (widening, softmax, the choice, the division, the casts) is the module's own.
    """
    platform: Platform = "cuda" if device.type == "cuda" else "cpu"
    spec = spec_of(model, dtype, platform)
    router = router_of(
        model.row, config_of(model.row, spec.num_experts, spec.top_k, **beside_its_size(model)), dtype, device
    )
    random = torch.Generator(device=device).manual_seed(1)
    passed_bias_E = None
    if spec.has_bias and own_bias(router) is None:
        passed_bias_E = torch.randn(spec.num_experts, generator=random, device=device) * 0.05
        passed_bias_E = passed_bias_E.to(dtype) if model.row.rounds_bias else passed_bias_E
    bias_E = own_bias(router) if passed_bias_E is None else passed_bias_E
    operands = {} if bias_E is None or not spec.has_bias else {"bias_E": bias_E.float()}
    tally = Tally(device)
    for _ in range(batches):
        logits_TE = torch.cat([families(spec).to(device), mixed(spec, tokens, random)])
        hidden_TD = torch.zeros(len(logits_TE), HIDDEN, dtype=dtype, device=device)
        expected = run(router, hidden_TD, passed_bias_E=passed_bias_E, logits_TE=logits_TE)
        assert expected.logits_TE.dtype == spec.gate.output_dtype, (expected.logits_TE.dtype, spec.gate)
        with poisoned_memory():
            found = route(expected.logits_TE, spec, **operands)
        tally.add(found, expected.ids_TK, expected.weights_TK)
    return tally.count()


def beside_its_size(model: Model) -> dict[str, object]:
    """What the model's config says besides, except in parts of it, whose classes have these values by default."""
    size = {"model_type", *model.row.num_experts.names, *model.row.top_k.names}
    return {name: value for name, value in model.config.items() if name not in size and not isinstance(value, dict)}
