"""PaddleFormers and PaddleFleet as FastDeploy's rollout computes their routers, with its PHI switch off and on.

Off, one CUDA operator chooses, adds, divides and scales; on, it chooses, and Paddle's own operators do the rest, with
the trainer's `topk_reduce_func`. The formulas are the same. Neither operator's order of summation, nor its order of
equal values (FastDeploy: the lower expert first; paddle.topk: unspecified), can be run beside PyTorch: bits are
unproved in both settings. PaddleFormers' own gate gives masked groups a 0 and not -inf, which shows where a kept
expert's biased score is negative.
"""

from routing.trainer_row import Gate, Groups, Row, Trainer, setting

EXPERTS = setting("n_routed_experts", "num_local_experts", "num_experts")
TOP_K = setting("num_experts_per_tok")
FP32_GATE = Gate(operand="float32", output="float32")
SUM_EPS = {"kind": "sum_eps", "eps": 1e-20}


def noaux_tc(model_types: tuple[str, ...], *, scale: float, count: int = 1, kept: int = 1) -> Row:
    """Sigmoid, a biased choice in groups, sum + 1e-20, and the scale whether or not there is a reduce."""
    return Row(
        model_types=model_types,
        source="fastdeploy.model_executor.layers.moe.moe.get_moe_scores",
        num_experts=EXPERTS,
        top_k=TOP_K,
        score="sigmoid",
        bias=True,
        groups=Groups(count=setting("n_group", default=count), kept=setting("topk_group", default=kept)),
        slot_order="sorted",
        normalise=setting("norm_topk_prob", default=True),
        reduce=SUM_EPS,
        scale=setting("routed_scaling_factor", default=scale),
        weight="float32",
        gate=FP32_GATE,
    )


ROWS = (
    noaux_tc(("glm4_moe",), scale=1.0),
    noaux_tc(("deepseek_v3", "kimi_k2"), scale=2.5, count=8, kept=4),
    Row(
        model_types=("qwen3_moe",),
        source="fastdeploy.model_executor.ops.gpu.moe_topk_select",
        num_experts=EXPERTS,
        top_k=TOP_K,
        score="softmax",
        slot_order="sorted",
        normalise=True,  # whatever the config says
        reduce=SUM_EPS,
        weight="float32",
        gate=FP32_GATE,
    ),
    Row(
        model_types=("ernie4_5_moe",),
        source="paddleformers.transformers.moe_gate",
        num_experts=setting("moe_num_experts", "num_experts"),
        top_k=setting("moe_k", "num_experts_per_tok"),
        score="softmax",
        bias=True,
        slot_order="sorted",
        normalise=True,
        reduce={"kind": "clamped_sum", "eps": setting("moe_norm_min", default=1e-12)},
        weight="model",
        gate=FP32_GATE,
    ),
)

UNPROVED = "Paddle's operators do not run beside PyTorch: their orders of summation and of ties are not known here"

PADDLE = (
    Trainer(
        name="paddle",
        description="PaddleFormers or PaddleFleet, as FastDeploy computes it with FD_USE_PHI_MOE_TOPK=0: one operator"
        " chooses, adds, divides and scales",
        rows=ROWS,
        unproved=UNPROVED,
    ),
    Trainer(
        name="paddle_phi",
        description="PaddleFormers or PaddleFleet, as FastDeploy computes it with FD_USE_PHI_MOE_TOPK=1: chosen by one"
        " operator, added, divided and scaled by Paddle's own",
        rows=ROWS,
        unproved=UNPROVED,
    ),
)
