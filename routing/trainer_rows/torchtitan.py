"""torchtitan: `TokenChoiceTopKRouter`, eager, with the settings of its model registry.

Its load balancing keeps a bias per expert for every family, Qwen3 included; a Qwen3 checkpoint has none, and what is
stated here is the router without it.
"""

from routing.trainer_row import Gate, Groups, Row, Setting, Trainer, setting

ROUTER = "torchtitan.models.common.moe.TokenChoiceTopKRouter"


def row(
    model_types: tuple[str, ...],
    score: str,
    *,
    normalise: bool | Setting = True,
    scale: Setting | None = None,
    groups: Groups | None = None,
) -> Row:
    """The gate and all that follows in fp32; slots unsorted; sum + 1e-20; the scale always."""
    return Row(
        model_types=model_types,
        source=ROUTER,
        num_experts=setting("n_routed_experts", "num_local_experts", "num_experts"),
        top_k=setting("num_experts_per_tok"),
        score=score,
        bias=score == "sigmoid",
        groups=groups,
        slot_order="unsorted",
        normalise=normalise,
        reduce={"kind": "sum_eps", "eps": 1e-20},
        scale=scale,
        weight="float32",
        gate=Gate(operand="float32", output="float32"),
    )


def deepseek(model_types: tuple[str, ...], *, scale: float, count: int = 1, kept: int = 1) -> Row:
    """Sigmoid with a bias, in groups where the config has several."""
    return row(
        model_types,
        "sigmoid",
        normalise=setting("norm_topk_prob", default=True),
        scale=setting("routed_scaling_factor", default=scale),
        groups=Groups(count=setting("n_group", default=count), kept=setting("topk_group", default=kept)),
    )


TORCHTITAN = Trainer(
    name="torchtitan",
    description="torchtitan 0.3's token-choice router, eager: fp32 throughout, without TF32",
    rows=(
        row(("qwen3_moe",), "softmax", normalise=setting("norm_topk_prob", default=False)),
        row(("qwen3_5_moe_text", "qwen3_5_moe"), "softmax"),
        deepseek(("deepseek_v3", "kimi_k2"), scale=2.5, count=8, kept=4),
        deepseek(("glm4_moe",), scale=1.0),
    ),
)
