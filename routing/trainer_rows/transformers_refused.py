"""transformers 5.17: families whose routers a RouterSpec cannot describe, and which operation stands in the way."""

from routing.trainer_row import Refusal

REFUSED = (
    Refusal(
        model_types=("phimoe",),
        source="transformers.models.phimoe.modeling_phimoe.sparsemixer",
        why="sparsemixer takes each of two experts from a softmax of its own, over logits masked by a threshold",
    ),
    Refusal(
        model_types=("inkling_text", "inkling_mm_model"),
        source="transformers.models.inkling.modeling_inkling.InklingTopkRouter",
        why="its weights are normalised in log space, together with those of the shared experts",
    ),
    Refusal(
        model_types=("llama4_text", "llama4"),
        source="transformers.models.llama4.modeling_llama4.Llama4Router",
        why="it takes a sigmoid of the chosen logits, chooses by the logits themselves, and scales the experts' inputs",
    ),
    Refusal(
        model_types=("nllb-moe",),
        source="transformers.models.nllb_moe.modeling_nllb_moe.NllbMoeTop2Router",
        why="two experts are chosen by two maxima, the second over masked logits, within a capacity",
    ),
    Refusal(
        model_types=("openai_privacy_filter",),
        source="transformers.models.openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterTopKRouter",
        why="its weights are divided by the number of chosen experts",
    ),
    Refusal(
        model_types=("zaya",),
        source="transformers.models.zaya.modeling_zaya.ZayaRouter",
        why="its logits come from a network with a state that layers hand on, and one expert means no expert",
    ),
    Refusal(
        model_types=("doge",),
        source="transformers.models.doge.modeling_doge.DogeCDMoE",
        why="experts are chosen by sums of two logits, from a product of two sets of keys",
    ),
    Refusal(
        model_types=("ernie4_5_vl_moe_text", "ernie4_5_vl_moe"),
        source="transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe.Ernie4_5_VLMoeSparseMoeBlock",
        why="text and images go through two routers, token by token",
    ),
)
