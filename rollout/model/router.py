"""Whose routing a hosted model follows, and how its gate is computed."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from rollout.model.hf_config import ConfigReader, DtypeChoice
from rollout.model.spec import MoeSpec
from routing import GateSpec, Platform, RouterSpec, TopkReduce


@dataclass(frozen=True, kw_only=True, slots=True)
class Hosting:
    """What the host chooses about a checkpoint; the rest stands in its config."""

    trainer: str | Mapping[str, Any] = "transformers"
    """Whose routing to match, or the router spelled out as a RouterSpec's fields."""
    topk_reduce_func: str | None = None
    """`package.module:function` in place of the trainer's own reduce; see routing.reduce_function."""
    gate: Literal["fp32", "trainer"] = "fp32"
    """fp32: weight hosted in fp32, product and logits in fp32, whatever the dtype. trainer: as the trainer does it."""
    dtype: DtypeChoice = "checkpoint"
    """Of activations and parameters: "checkpoint", torch.float32 or torch.bfloat16."""
    platform: Platform = "cpu"
    """Whose order of summation the router follows: that of the device that hosts the model, which a router spelled out
    cannot change."""
    certify: bool = True
    """Refuse a router that has not the trainer's bits on the hosting device, as RL mode does, or only say so."""


def moe_spec(
    reader: ConfigReader, hosting: Hosting, dtype: torch.dtype, *, experts: int, shared_intermediate: int | None
) -> MoeSpec | None:
    """The routed MLP of a config; None, and noted with the reader, where its router cannot be had.

    Args:
        reader: of the config.
        hosting: trainer, gate and platform.
        dtype: of the hosted model.
        experts: as many as the config says.
        shared_intermediate: of the shared expert, None where the family has none.
    """
    intermediate = reader.whole("moe_intermediate_size")
    top_k = reader.whole("num_experts_per_tok")
    try:
        router = _router_spec(reader.config, hosting, dtype)
    except ValueError as error:
        reader.offenders.append(str(error))
        return None
    if (router.num_experts, router.top_k) != (experts, top_k):
        reader.offenders.append(
            f"the router takes {router.top_k} of {router.num_experts} experts, config.json says {top_k} of {experts}"
        )
    return MoeSpec(
        router=router,
        gate_dtype=torch.float32 if hosting.gate == "fp32" else dtype,
        intermediate=intermediate,
        shared_intermediate=shared_intermediate,
    )


def _router_spec(config: Mapping[str, Any], hosting: Hosting, dtype: torch.dtype) -> RouterSpec:
    if isinstance(hosting.trainer, str):
        router = RouterSpec.from_trainer(
            hosting.trainer, config, dtype=dtype, platform=hosting.platform, gate=hosting.gate
        )
    else:
        router = _spelled_out(hosting.trainer, hosting.platform)
        router = router if hosting.gate == "trainer" else replace(router, gate=GateSpec())
    if hosting.topk_reduce_func is not None:
        router = replace(router, reduce=TopkReduce.of(hosting.topk_reduce_func))
    return router


def _spelled_out(fields: Mapping[str, Any], platform: Platform) -> RouterSpec:
    """The router of these fields. ValueError for what no checkpoint of the hosted families could feed."""
    said = fields.get("platform", platform)
    if said != platform:
        raise ValueError(f"RouterSpec: platform={said!r}, but the model is hosted on {platform!r}; leave platform out")
    router = RouterSpec.from_plain({**fields, "platform": platform})
    if router.expert_scale:
        raise ValueError(
            "RouterSpec: expert_scale=True, but checkpoints of this architecture hold no such factors; leave it out"
        )
    if router.gate.has_bias:
        raise ValueError("GateSpec: has_bias=True, but gates of this architecture have no bias; leave it out")
    return router
