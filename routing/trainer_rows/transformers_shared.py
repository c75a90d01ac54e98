"""transformers 5.17: routers that several families share. What differs are names and defaults in the config."""

from routing.trainer_row import Demand, Gate, Groups, Row, Setting, setting

MODEL_GATE = Gate(operand="model", output="model")
FP32_GATE = Gate(operand="float32", output="float32")
TOP_K = setting("num_experts_per_tok")
ROUTED = setting("n_routed_experts", "num_local_experts", "num_experts")
LOCAL = setting("num_local_experts", "num_experts")
NO_JITTER = Demand(
    of=setting("router_jitter_noise", default=0.0), values=(0.0,), otherwise="noise on the gate's input in training"
)
SUM = {"kind": "sum"}
SUM_EPS = {"kind": "sum_eps", "eps": 1e-20}


def source(module: str, name: str) -> str:
    """The full name of a class of a family."""
    return f"transformers.models.{module}.modeling_{module}.{name}"


def deepseek_groups(count: int = 1, kept: int = 1, mask_value: str | float = "-inf") -> Groups:
    """Groups scored by their best two, with the config class's numbers."""
    return Groups(
        count=setting("n_group", "num_expert_group", default=count),
        kept=setting("topk_group", default=kept),
        mask_value=mask_value,
    )


def deepseek(
    model_types: tuple[str, ...],
    class_name: str,
    *,
    num_experts: Setting = ROUTED,
    top_k: Setting = TOP_K,
    groups: Groups | None = None,
    normalise: Setting | None = None,
    scale: float,
    rounds_bias: bool = False,
) -> Row:
    """A router of the DeepSeek-V3 kind: an fp32 gate, sigmoid, a biased choice in groups, sum + 1e-20, a scale."""
    return Row(
        model_types=model_types,
        source=class_name,
        num_experts=num_experts,
        top_k=top_k,
        score="sigmoid",
        bias=True,
        rounds_bias=rounds_bias,
        groups=groups if groups is not None else deepseek_groups(),
        slot_order="unsorted",
        normalise=normalise if normalise is not None else setting("norm_topk_prob", default=True),
        reduce=SUM_EPS,
        scale=setting("routed_scaling_factor", default=scale),
        weight="float32",
        gate=FP32_GATE,
        demands=(
            Demand(
                of=setting("scoring_func", "moe_router_activation_func", default="sigmoid"),
                values=("sigmoid",),
                otherwise="another score function",
            ),
            Demand(
                of=setting("topk_method", default="noaux_tc"),
                values=("noaux_tc",),
                otherwise="another choice of experts",
            ),
        ),
    )


def qwen(
    model_types: tuple[str, ...],
    class_name: str,
    *,
    num_experts: Setting = LOCAL,
    normalise: bool | Setting = True,
) -> Row:
    """A router of the Qwen kind: a gate in the model's dtype, softmax in fp32, sorted slots, sum, the logits' dtype."""
    return Row(
        model_types=model_types,
        source=class_name,
        num_experts=num_experts,
        top_k=TOP_K,
        score="softmax",
        slot_order="sorted",
        normalise=normalise,
        reduce=SUM,
        weight="logits",
        gate=MODEL_GATE,
    )


def normalised(default: bool) -> Setting:
    """The switch norm_topk_prob, with the config class's default."""
    return setting("norm_topk_prob", default=default)


def minimax_m2(model_types: tuple[str, ...], class_name: str, *, demands: tuple[Demand, ...] = ()) -> Row:
    """A router of the MiniMax-M2 kind: a gate in the model's dtype, sigmoid in fp32, a biased choice, sum."""
    return Row(
        model_types=model_types,
        source=class_name,
        num_experts=setting("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        top_k=setting("num_experts_per_tok", "moe_top_k"),
        score="sigmoid",
        bias=True,
        rounds_bias=True,
        slot_order="unsorted",
        normalise=True,
        reduce=SUM,
        weight="float32",
        gate=MODEL_GATE,
        demands=demands,
    )


def mixtral(model_types: tuple[str, ...], class_name: str) -> Row:
    """A router of the Mixtral kind: a gate in the model's dtype, softmax in fp32, sum, weights in fp32."""
    return Row(
        model_types=model_types,
        source=class_name,
        num_experts=LOCAL,
        top_k=TOP_K,
        score="softmax",
        slot_order="sorted",
        normalise=True,
        reduce=SUM,
        weight="float32",
        gate=MODEL_GATE,
        demands=(NO_JITTER,),
    )


def softmax_topk(
    model_types: tuple[str, ...],
    class_name: str,
    *,
    num_experts: Setting = LOCAL,
    top_k: Setting = TOP_K,
    chain: str = "float32",
    has_bias: bool = False,
    demands: tuple[Demand, ...] = (),
) -> Row:
    """A gate in the model's dtype and a softmax over the chosen logits: in fp32, or in the logits' dtype throughout."""
    return Row(
        model_types=model_types,
        source=class_name,
        num_experts=num_experts,
        top_k=top_k,
        score="softmax_topk",
        slot_order="sorted",
        normalise=False,
        reduce=SUM,
        chain="float32" if chain == "float32" else "logits",
        weight="model" if chain == "float32" else "logits",
        gate=Gate(operand="model", output="model", has_bias=has_bias),
        demands=demands,
    )


DEEPSEEK_KIND = (
    deepseek(
        ("deepseek_v3", "kimi_k2"),  # Kimi-K2's checkpoints run DeepSeek-V3's code
        source("deepseek_v3", "DeepseekV3TopkRouter"),
        groups=deepseek_groups(8, 4),
        scale=2.5,
    ),
    deepseek(
        ("deepseek_v32",), source("deepseek_v32", "DeepseekV32TopkRouter"), groups=deepseek_groups(8, 4), scale=2.5
    ),
    deepseek(("glm4_moe",), source("glm4_moe", "Glm4MoeTopkRouter"), scale=1.0),
    deepseek(("glm4_moe_lite",), source("glm4_moe_lite", "Glm4MoeLiteTopkRouter"), scale=1.8),
    deepseek(("glm4v_moe_text", "glm4v_moe"), source("glm4v_moe", "Glm4vMoeTextTopkRouter"), scale=1.0),
    deepseek(("glm_moe_dsa",), source("glm_moe_dsa", "GlmMoeDsaTopkRouter"), scale=2.5),
    deepseek(("glm5_next_text", "glm5_next"), source("glm5_next", "Glm5NextTextTopkRouter"), scale=2.5),
    deepseek(
        ("kimi_linear",),
        source("kimi_linear", "KimiLinearTopkRouter"),
        num_experts=LOCAL,
        top_k=setting("num_experts_per_token", "num_experts_per_tok"),
        normalise=setting("moe_renormalize", "norm_topk_prob", default=True),
        scale=2.446,
        rounds_bias=True,
    ),
    deepseek(("dots1",), source("dots1", "Dots1TopkRouter"), normalise=normalised(False), scale=1.0),
    deepseek(
        ("exaone_moe",), source("exaone_moe", "ExaoneMoeTopkRouter"), num_experts=setting("num_experts"), scale=2.5
    ),
    deepseek(("mimo_v2_flash",), source("mimo_v2_flash", "MiMoV2FlashTopkRouter"), scale=1.0),
    deepseek(("solar_open",), source("solar_open", "SolarOpenTopkRouter"), scale=1.0),
    deepseek(("nemotron_h",), source("nemotron_h", "NemotronHTopkRouter"), scale=1.0),
    deepseek(("axk1",), source("axk1", "AXK1TopkRouter"), groups=deepseek_groups(8, 4), scale=2.5),
    deepseek(("axk2",), source("axk2", "AXK2TopkRouter"), groups=deepseek_groups(mask_value=0.0), scale=2.5),
    deepseek(("hy_v4",), source("hy_v4", "HYV4TopkRouter"), scale=2.827),
)

QWEN_KIND = (
    qwen(("qwen2_moe",), source("qwen2_moe", "Qwen2MoeTopKRouter"), normalise=normalised(False)),
    qwen(  # the class's default is false; the released checkpoints say true
        ("qwen3_moe",), source("qwen3_moe", "Qwen3MoeTopKRouter"), normalise=normalised(False)
    ),
    qwen(("qwen3_next",), source("qwen3_next", "Qwen3NextTopKRouter"), normalise=normalised(True)),
    qwen(("qwen3_5_moe_text", "qwen3_5_moe"), source("qwen3_5_moe", "Qwen3_5MoeTopKRouter")),
    qwen(("qwen3_vl_moe_text", "qwen3_vl_moe"), source("qwen3_vl_moe", "Qwen3VLMoeTextTopKRouter")),
    qwen(
        ("qwen3_omni_moe_text", "qwen3_omni_moe_thinker"),
        source("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextTopKRouter"),
        normalise=normalised(True),
    ),
    qwen(
        ("qwen4_exp_text", "qwen4_exp"),
        source("qwen4_exp", "Qwen4ExpTextTopKRouter"),
        normalise=normalised(True),
    ),
    qwen(("olmoe",), source("olmoe", "OlmoeTopKRouter"), normalise=normalised(False)),
    qwen(("flex_olmo",), source("flex_olmo", "FlexOlmoTopKRouter"), normalise=normalised(False)),
    qwen(("mellum",), source("mellum", "MellumTopKRouter"), normalise=normalised(True)),
)

MINIMAX_KIND = (
    minimax_m2(("minimax_m2",), source("minimax_m2", "MiniMaxM2TopKRouter"), demands=(NO_JITTER,)),
    # these two scale the sum of the experts' outputs, not the weights
    minimax_m2(("minimax_m3_vl_text", "minimax_m3_vl"), source("minimax_m3_vl", "MiniMaxM3VLTopKRouter")),
    minimax_m2(("step3p5", "step3p7"), source("step3p7", "Step3p7TopKRouter")),
)

MIXTRAL_KIND = (
    mixtral(("mixtral",), source("mixtral", "MixtralTopKRouter")),
    mixtral(("minimax",), source("minimax", "MiniMaxTopKRouter")),
)

SOFTMAX_TOPK_KIND = (
    softmax_topk(("gpt_oss",), source("gpt_oss", "GptOssTopKRouter"), chain="logits", has_bias=True),
    softmax_topk(
        ("aria_text", "aria"),
        source("aria", "AriaExperts"),
        num_experts=setting("moe_num_experts"),
        top_k=setting("moe_topk"),
        chain="logits",
    ),
    softmax_topk(("granitemoe",), source("granitemoe", "GraniteMoeTopKRouter")),
    softmax_topk(("granitemoe_swa",), source("granitemoe_swa", "GraniteMoeSWATopKRouter")),
    softmax_topk(("granitemoehybrid",), source("granitemoehybrid", "GraniteMoeHybridTopKRouter")),
    softmax_topk(("granitemoeshared",), source("granitemoeshared", "GraniteMoeSharedTopKRouter")),
    softmax_topk(("jetmoe",), source("jetmoe", "JetMoeTopKGating")),
    softmax_topk(
        ("cohere2_moe",),
        source("cohere2_moe", "Cohere2MoeTopKRouter"),
        demands=(
            Demand(
                of=setting("expert_selection_fn", default="softmax"),
                values=("softmax",),
                otherwise="a sigmoid of the chosen logits, with experts chosen by the logits themselves",
            ),
        ),
    ),
)

SHARED = (*DEEPSEEK_KIND, *QWEN_KIND, *MINIMAX_KIND, *MIXTRAL_KIND, *SOFTMAX_TOPK_KIND)
