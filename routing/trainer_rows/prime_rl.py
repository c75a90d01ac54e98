"""prime-rl: its own routers, eager. The default matmul precision is "high", so that its fp32 gate runs in TF32.

Like torchtitan it keeps a load-balancing bias for every family; a checkpoint without one is stated without it.
"""

from routing.trainer_row import Gate, Groups, Row, Setting, Trainer, setting

LAYERS = "prime_rl.trainer.models.layers.moe"
TF32_GATE = Gate(operand="float32", output="float32", tf32=True)
EXPERTS = setting("n_routed_experts", "num_local_experts", "num_experts")
TOP_K = setting("num_experts_per_tok")
SUM_EPS = {"kind": "sum_eps", "eps": 1e-20}


def token_choice(
    model_types: tuple[str, ...], score: str, *, normalise: bool | Setting = True, scale: Setting | None = None
) -> Row:
    """TokenChoiceTopKRouter: scores in fp32, no groups, slots sorted, sum + 1e-20, the scale always."""
    return Row(
        model_types=model_types,
        source=f"{LAYERS}.TokenChoiceTopKRouter",
        num_experts=EXPERTS,
        top_k=TOP_K,
        score=score,
        bias=score == "sigmoid",
        slot_order="sorted",
        normalise=normalise,
        reduce=SUM_EPS,
        scale=scale,
        weight="float32",
        gate=TF32_GATE,
    )


def normalised(default: bool) -> Setting:
    """The switch norm_topk_prob, with the config class's default."""
    return setting("norm_topk_prob", default=default)


def scaled(name: str, default: float) -> Setting:
    """The scale under the config's name for it."""
    return setting(name, default=default)


PRIME_RL = Trainer(
    name="prime_rl",
    description="prime-rl's own routers, eager, with its defaults: an fp32 gate in TF32, fp32 scores, slots sorted",
    rows=(
        token_choice(("qwen3_moe",), "softmax", normalise=normalised(False)),
        token_choice(("qwen3_5_moe_text", "qwen3_5_moe"), "softmax"),
        token_choice(("glm4_moe",), "sigmoid", normalise=normalised(True), scale=scaled("routed_scaling_factor", 1.0)),
        token_choice(
            ("glm_moe_dsa",), "sigmoid", normalise=normalised(True), scale=scaled("routed_scaling_factor", 2.5)
        ),
        token_choice(("laguna",), "sigmoid", scale=scaled("moe_routed_scaling_factor", 1.0)),
        token_choice(("afmoe",), "sigmoid", scale=scaled("route_scale", 1.0)),
        token_choice(("minimax_m2",), "sigmoid"),
        Row(  # the sum of the experts' outputs is scaled, not the weights
            model_types=("nemotron_h",),
            source=f"{LAYERS}.NemotronHRouter",
            num_experts=EXPERTS,
            top_k=TOP_K,
            score="sigmoid",
            bias=True,
            groups=Groups(count=setting("n_group", default=1), kept=setting("topk_group", default=1), mask_value=0.0),
            slot_order="unsorted",
            normalise=normalised(True),
            reduce=SUM_EPS,
            weight="float32",
            gate=TF32_GATE,
        ),
        Row(
            model_types=("gpt_oss",),
            source="prime_rl.trainer.models.gpt_oss.modeling_gpt_oss",
            num_experts=EXPERTS,
            top_k=TOP_K,
            score="softmax_topk",
            slot_order="sorted",
            normalise=False,
            reduce=SUM_EPS,
            chain="logits",
            weight="logits",
            gate=Gate(operand="model", output="model", has_bias=True),
        ),
    ),
)
