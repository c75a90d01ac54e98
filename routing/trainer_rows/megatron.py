"""Megatron-Core: `topk_routing_with_score_function`, unfused, in the settings that change a bit.

Two chains exist. In every released package to 0.16.1 scores are rounded to the logits' dtype as soon as they are
computed, and the rest happens in it; in the repository after that it happens in fp32 and the weights are rounded last.
With fp32 logits both are one. In the newer code torch.topk sorts its slots only while gradients are enabled.

The logits' dtype is Megatron's own setting, --moe-router-dtype; a checkpoint's config does not know it, so it is part
of the trainer's name. How a family's config becomes Megatron's flags is the converters' choice (verl, slime,
Megatron-Bridge): Qwen3 takes the softmax after the choice, Qwen2-MoE and Mixtral before it. On the latter path Megatron
has no normalisation at all, so its Mixtral is not transformers'. One group is no groups. Transformer Engine's fused
router (--moe-router-fusion) is another trainer, and not among these.
"""

from routing.trainer_row import Demand, Gate, Groups, Refusal, Rounding, Row, Setting, Trainer, setting

FUNCTION = "megatron.core.transformer.moe.moe_utils.topk_routing_with_score_function"
TOP_K = setting("num_experts_per_tok", "num_experts_per_token")
EXPERTS = setting("n_routed_experts", "num_local_experts", "num_experts")
SUM_EPS = {"kind": "sum_eps", "eps": 1e-20}

MODEL_DTYPE = Gate(operand="model", output="model")
FP32 = Gate(operand="model", output="float32")
FP64 = Gate(operand="float64", output="float64")


def is_normalised(default: bool) -> Demand:
    """The softmax after the choice, and the sigmoid, always normalise."""
    return Demand(
        of=setting("norm_topk_prob", "moe_renormalize", default=default),
        values=(True,),
        otherwise="weights that are not normalised, which Megatron has on its pre-softmax path only",
    )


IS_NOT_NORMALISED = Demand(
    of=setting("norm_topk_prob", default=False),
    values=(False,),
    otherwise="normalised weights, which Megatron does not have on its pre-softmax path",
)


def rows(gate: Gate, chain: Rounding, slot_order: str) -> tuple[Row, ...]:
    """Every family, with that gate, chain and order of slots (of groups: always sorted)."""

    def softmax(model_types: tuple[str, ...], score: str, *demands: Demand, has_bias: bool = False) -> Row:
        return Row(
            model_types=model_types,
            source=FUNCTION,
            num_experts=EXPERTS,
            top_k=TOP_K,
            score=score,
            slot_order=slot_order,
            normalise=False,
            reduce={"kind": "none"},
            chain=chain,
            weight="logits",
            gate=Gate(operand=gate.operand, output=gate.output, has_bias=has_bias),
            demands=demands,
        )

    def sigmoid(
        model_types: tuple[str, ...],
        *demands: Demand,
        scale: Setting | None = None,
        groups: Groups | None = None,
    ) -> Row:
        return Row(
            model_types=model_types,
            source=FUNCTION,
            num_experts=EXPERTS,
            top_k=TOP_K,
            score="sigmoid",
            bias=True,
            groups=groups,
            slot_order=slot_order,
            normalise=True,
            normalises_one=False,
            reduce=SUM_EPS,
            scale=scale,
            chain=chain,
            weight="logits",
            gate=gate,
            demands=demands,
        )

    def scale(default: float) -> Setting:
        return setting("routed_scaling_factor", default=default)

    def groups(count: int = 1, kept: int = 1) -> Groups:
        return Groups(
            count=setting("n_group", "num_expert_group", default=count),
            kept=setting("topk_group", default=kept),
            top=None,
            slot_order="sorted",
        )

    return (
        softmax(("qwen2_moe",), "softmax", IS_NOT_NORMALISED),
        softmax(("mixtral",), "softmax"),
        softmax(("qwen3_moe",), "softmax_topk", is_normalised(False)),
        softmax(("qwen3_next",), "softmax_topk", is_normalised(True)),
        softmax(("qwen3_5_moe_text", "qwen3_5_moe", "qwen3_vl_moe_text", "qwen3_vl_moe"), "softmax_topk"),
        softmax(("gpt_oss",), "softmax_topk", has_bias=True),
        sigmoid(("deepseek_v3", "kimi_k2"), is_normalised(True), scale=scale(2.5), groups=groups(8, 4)),
        sigmoid(("glm4_moe",), is_normalised(True), scale=scale(1.0), groups=groups()),
        sigmoid(("glm4_moe_lite",), is_normalised(True), scale=scale(1.8), groups=groups()),
        sigmoid(("glm_moe_dsa",), is_normalised(True), scale=scale(2.5), groups=groups()),
        sigmoid(("kimi_linear",), is_normalised(True), scale=scale(2.446), groups=groups()),
        sigmoid(("minimax_m2",)),
    )


REFUSED = (
    Refusal(
        model_types=("deepseek_v2",),
        source=FUNCTION,
        why="a group's score is the sum of its best there, and the largest of them in the model",
    ),
)


def trainer(name: str, description: str, table: tuple[Row, ...]) -> Trainer:
    """One setting of Megatron-Core."""
    return Trainer(name=name, description=description, rows=table, refusals=REFUSED)


MEGATRON = (
    trainer(
        "megatron",
        "Megatron-Core as released (0.12 to 0.16.1), unfused, --moe-router-dtype unset: logits in the model's dtype,"
        " and everything after the score rounded to it",
        rows(MODEL_DTYPE, "logits", "sorted"),
    ),
    trainer(
        "megatron_router_fp32",
        "Megatron-Core, released or newer, unfused, --moe-router-dtype fp32: operands in the model's dtype, fp32 logits"
        " (with Transformer Engine; without it the operands are widened first); slots sorted",
        rows(FP32, "float32", "sorted"),
    ),
    trainer(
        "megatron_router_fp64",
        "Megatron-Core as released, unfused, --moe-router-dtype fp64 (verl's DeepSeek-V3): fp64 logits, fp32 scores,"
        " everything after them in fp64",
        rows(FP64, "float64", "sorted"),
    ),
    trainer(
        "megatron_fp32_chain",
        "Megatron-Core after 0.16.1, unfused, --moe-router-dtype unset, while gradients are enabled: logits in the"
        " model's dtype, everything after them in fp32, weights rounded last; slots sorted",
        rows(MODEL_DTYPE, "float32", "sorted"),
    ),
    trainer(
        "megatron_fp32_chain_no_grad",
        "the same under torch.no_grad, as a pass for log-probabilities runs it: slots unsorted, unless in groups",
        rows(MODEL_DTYPE, "float32", "unsorted"),
    ),
)
