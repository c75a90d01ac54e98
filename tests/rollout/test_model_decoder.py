"""The Decoder gives transformers' logits and experts, however the tokens are cut into steps and the cache into blocks.

T tokens, L MoE layers, K slots of a token, E experts, V vocabulary.
"""

import random
import sys
from copy import deepcopy
from tempfile import TemporaryDirectory
from types import ModuleType

import pytest
import torch
from checkpoints import Routed, glm4_config, perturb_, qwen3_config, routers_watched, save, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import Forward, Paged, run_at_once, run_in_chunks
from strategies import glm4_configs, qwen3_configs
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rollout.model.decoder import Decoder
from rollout.model.hosted import HostedModel
from rollout.model.router import Hosting
from weights.naming import to_wire

TOLERANCE = 1e-5
NEAR_TIE = 1e-5


def transformers_forward(model: PreTrainedModel, sequence: list[int]) -> tuple[Tensor, list[Routed]]:
    """Logits [T, V] and what each MoE layer's router returned."""
    with routers_watched(model) as routed, torch.no_grad():
        logits_TV = model(torch.tensor([sequence])).logits[0].float()
    return logits_TV, routed


def selection_gaps(config: PreTrainedConfig, model: PreTrainedModel, routed: list[Routed]) -> Tensor:
    """[T, L]: how far the least chosen expert is above the best one left out, or a kept group above one that is not."""
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    gaps = []
    for gate, layer in zip(gates, routed, strict=True):
        if config.model_type == "qwen3_moe":
            gaps.append(_gap(layer.logits_TE.float().softmax(-1), config.num_experts_per_tok))
            continue
        choice_TE = layer.logits_TE.sigmoid() + gate.e_score_correction_bias
        in_groups = choice_TE.view(len(choice_TE), config.n_group, -1)
        group_scores = in_groups.topk(2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(group_scores).scatter(1, group_scores.topk(config.topk_group, dim=1).indices, 1)
        masked_TE = in_groups.masked_fill(kept[:, :, None] == 0, float("-inf")).flatten(1)
        gaps.append(torch.minimum(_gap(group_scores, config.topk_group), _gap(masked_TE, config.num_experts_per_tok)))
    return torch.stack(gaps, dim=1)


def _gap(values: Tensor, chosen: int) -> Tensor:
    if chosen == values.shape[1]:
        return torch.full((len(values),), float("inf"))
    ranked = values.sort(dim=1, descending=True).values
    return ranked[:, chosen - 1] - ranked[:, chosen]


def assert_same(ours: Forward, theirs: tuple[Tensor, list[Routed]], gaps_TL: Tensor | None) -> None:
    """Experts equal slot by slot outside near ties; weights and logits close up to the first tie that fell apart."""
    logits_TV, routed = theirs
    compared = len(logits_TV)
    if routed:
        assert ours.expert_ids_TLK is not None
        assert ours.expert_weights_TLK is not None
        assert gaps_TL is not None
        assert ours.expert_ids_TLK.dtype == torch.int32
        ids_TLK = torch.stack([layer.expert_ids_TK for layer in routed], dim=1)
        assert ours.expert_ids_TLK.shape == ids_TLK.shape
        differs_TL = (ours.expert_ids_TLK != ids_TLK).any(-1)
        assert not (differs_TL & (gaps_TL > NEAR_TIE)).any(), "experts differ where the learner's choice is clear"
        if differs_TL.any():
            compared = int(differs_TL.any(1).nonzero()[0])
        weights_TLK = torch.stack([layer.weights_TK for layer in routed], dim=1)
        torch.testing.assert_close(ours.expert_weights_TLK[:compared], weights_TLK[:compared], atol=TOLERANCE, rtol=0)
    else:
        assert ours.expert_ids_TLK is None
        assert ours.expert_weights_TLK is None
    assert ours.logits_TV.dtype == torch.float32
    torch.testing.assert_close(ours.logits_TV[:compared], logits_TV[:compared], atol=TOLERANCE, rtol=0)


def check_against_transformers(config: PreTrainedConfig, seed: int, *, sharded: bool) -> None:
    """Writes the checkpoint, hosts it, and compares a whole pass, a chunked one, and transformers' two attentions."""
    dice = random.Random(seed)
    sequences = [[dice.randrange(config.vocab_size) for _ in range(dice.randint(1, 17))] for _ in range(4)]
    learner = tiny_model(config, seed)
    with TemporaryDirectory() as folder:
        model = HostedModel.load(save(learner, folder, sharded=sharded), device="cpu")
    whole, chunked = run_at_once(model, sequences), run_in_chunks(model, sequences, seed)
    for sequence, ours, ours_chunked in zip(sequences, whole, chunked, strict=True):
        theirs = transformers_forward(learner, sequence)
        gaps_TL = selection_gaps(config, learner, theirs[1]) if theirs[1] else None
        assert theirs[0].std() > 0.3, "degenerate logits would hide an error"
        assert_same(ours, theirs, gaps_TL)
        assert_same(ours_chunked, theirs, gaps_TL)
    learner.set_attn_implementation("sdpa")
    theirs = transformers_forward(learner, sequences[0])
    assert_same(whole[0], theirs, selection_gaps(config, learner, theirs[1]) if theirs[1] else None)


def check_reloads_against_transformers(config: PreTrainedConfig, seed: int) -> None:
    """Three times every tensor changes in place, and each time the one Decoder gives what transformers gives."""
    dice = random.Random(seed)
    learner = tiny_model(config, seed)
    model = hosted(learner)
    decoder = Decoder(model.spec, model.parameters)
    for step in (0, 1, 2, 3):
        if step:
            reload_everything(model, learner, seed + step)
        sequences = [[dice.randrange(config.vocab_size) for _ in range(dice.randint(1, 8))] for _ in range(2)]
        chunked = run_in_chunks(model, sequences, seed + step, decoder)
        for sequence, ours in zip(sequences, chunked, strict=True):
            theirs = transformers_forward(learner, sequence)
            assert_same(ours, theirs, selection_gaps(config, learner, theirs[1]) if theirs[1] else None)


def reload_everything(model: HostedModel, learner: PreTrainedModel, seed: int) -> None:
    """New weights for the learner, copied in place as a commit does; every tensor changes."""
    perturb_(learner, seed)
    wire = dict(to_wire(learner.state_dict().items()))
    assert set(wire) == set(model.layout)
    for name, block in model.layout.state_dict(model.parameters):
        assert not torch.equal(block, wire[name]), f"{name} is the same under both seeds"
        block.copy_(wire[name])


def hosted(learner: PreTrainedModel, hosting: Hosting | None = None) -> HostedModel:
    """The learner's checkpoint, written and hosted."""
    with TemporaryDirectory() as folder:
        return HostedModel.load(save(learner, folder), hosting=hosting, device="cpu")


@settings(max_examples=80)
@given(config=qwen3_configs(), seed=st.integers(0, 2**16), sharded=st.booleans())
def test_qwen3_logits_and_experts_are_those_of_transformers(config, seed, sharded):
    check_against_transformers(config, seed, sharded=sharded)


@settings(max_examples=80)
@given(config=glm4_configs(), seed=st.integers(0, 2**16), sharded=st.booleans())
def test_glm4_logits_and_experts_are_those_of_transformers(config, seed, sharded):
    check_against_transformers(config, seed, sharded=sharded)


@settings(max_examples=50)
@given(config=qwen3_configs(), seed=st.integers(0, 2**16))
def test_qwen3_logits_and_experts_are_those_of_transformers_after_each_of_three_reloads(config, seed):
    check_reloads_against_transformers(config, seed)


@settings(max_examples=50)
@given(config=glm4_configs(), seed=st.integers(0, 2**16))
def test_glm4_logits_and_experts_are_those_of_transformers_after_each_of_three_reloads(config, seed):
    check_reloads_against_transformers(config, seed)


CONFIGS = {"qwen3": qwen3_config, "glm4": glm4_config}
SEQUENCES = [[3, 1, 4, 1, 5, 9, 2, 6], [53, 58], [27, 18, 28, 18, 28, 45, 9]]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_written_in_place_take_effect_at_the_next_step(family, tied):
    learner = tiny_model(CONFIGS[family](tie_word_embeddings=tied), seed=1)
    model = hosted(learner)
    before = run_at_once(model, SEQUENCES)
    addresses = {name: tensor.data_ptr() for name, tensor in model.parameters.items()}
    reload_everything(model, learner, seed=2)
    after = run_at_once(model, SEQUENCES)
    for sequence, new, old in zip(SEQUENCES, after, before, strict=True):
        theirs = transformers_forward(learner, sequence)
        assert_same(new, theirs, selection_gaps(learner.config, learner, theirs[1]))
        assert (new.logits_TV - old.logits_TV).abs().max() > 0.1
    assert addresses == {name: tensor.data_ptr() for name, tensor in model.parameters.items()}


@pytest.mark.parametrize("family", CONFIGS)
def test_a_bf16_model_with_the_trainers_gate_is_closer_to_the_trainer_than_bf16_is_to_fp32(family):
    # every expert is chosen, so that no near tie turns a rounding into another expert
    qwen3 = {"num_experts": 3, "num_experts_per_tok": 3}
    glm4 = {"n_routed_experts": 4, "n_group": 1, "num_experts_per_tok": 4}
    learner = tiny_model(CONFIGS[family](**(qwen3 if family == "qwen3" else glm4)), seed=3, dtype=torch.bfloat16)
    exact = deepcopy(learner).float()
    model = hosted(learner, Hosting(gate="trainer"))
    for sequence, ours in zip(SEQUENCES, run_at_once(model, SEQUENCES), strict=True):
        logits_TV, routed = transformers_forward(learner, sequence)
        rounding = (logits_TV - transformers_forward(exact, sequence)[0]).abs()
        off = (ours.logits_TV - logits_TV).abs()
        assert ours.logits_TV.dtype == torch.float32
        assert ours.expert_weights_TLK is not None
        assert ours.expert_weights_TLK.dtype == routed[0].weights_TK.dtype
        assert off.mean() < rounding.mean()
        assert off.max() < 2 * rounding.max()


@pytest.mark.parametrize("family", CONFIGS)
def test_rl_mode_widens_a_bf16_gate_exactly_and_routes_in_fp32(family):
    learner = tiny_model(CONFIGS[family](), seed=4, dtype=torch.bfloat16)
    model = hosted(learner)
    gate = model.parameters["layers.1.gate.weight"]
    assert gate.dtype == torch.float32
    assert torch.equal(gate, learner.get_parameter("model.layers.1.mlp.gate.weight").float())
    weights_TLK = run_at_once(model, SEQUENCES)[0].expert_weights_TLK
    assert weights_TLK is not None
    assert weights_TLK.dtype == torch.float32
    assert not torch.equal(weights_TLK, weights_TLK.bfloat16().float())


def test_the_trainers_qwen3_gate_is_hosted_and_weighted_in_the_models_dtype():
    model = hosted(tiny_model(qwen3_config(), seed=4, dtype=torch.bfloat16), Hosting(gate="trainer"))
    weights_TLK = run_at_once(model, SEQUENCES)[0].expert_weights_TLK
    assert model.parameters["layers.0.gate.weight"].dtype == torch.bfloat16
    assert weights_TLK is not None
    assert weights_TLK.dtype == torch.bfloat16


def test_the_glm4_correction_bias_is_hosted_in_fp32_unrounded():
    learner = tiny_model(glm4_config(), seed=4, dtype=torch.bfloat16)
    bias = learner.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
    model = hosted(learner)
    assert bias.dtype == torch.float32
    assert not torch.equal(bias, bias.bfloat16().float())
    assert torch.equal(model.parameters["layers.1.gate.bias"], bias)


def test_a_named_reduce_function_replaces_the_trainers(monkeypatch):
    module = ModuleType("trainer_of_the_decoders_test")
    module.twice_the_sum = lambda scores_TK: 2 * scores_TK.sum(-1, keepdim=True)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    hosting = Hosting(topk_reduce_func=f"{module.__name__}:twice_the_sum")
    model = hosted(tiny_model(qwen3_config(), seed=5), hosting)
    halved = run_at_once(model, SEQUENCES)[0].expert_weights_TLK
    assert halved is not None
    torch.testing.assert_close(halved.sum(-1), torch.full(halved.shape[:2], 0.5))


def test_a_router_spelled_out_is_followed():
    plain = {
        "num_experts": 5,
        "top_k": 2,
        "score": "softmax",
        "slot_order": "sorted",
        "reduce": "none",
        "scale": 3.0,
        "weight_dtype": "float32",
    }
    learner = tiny_model(qwen3_config(num_hidden_layers=1, norm_topk_prob=False), seed=5)
    spelled = run_at_once(hosted(learner, Hosting(trainer=plain)), SEQUENCES)[0]
    named = run_at_once(hosted(learner), SEQUENCES)[0]
    assert spelled.expert_weights_TLK is not None
    assert named.expert_weights_TLK is not None
    assert torch.equal(spelled.expert_weights_TLK, 3 * named.expert_weights_TLK)


def test_routing_is_recorded_only_when_asked_for_and_logits_are_of_the_rows_asked_for():
    model = hosted(tiny_model(qwen3_config(), seed=6))
    whole = run_at_once(model, SEQUENCES)
    paged = Paged(model, SEQUENCES, block_size=4, seed=0)
    out = paged.forward({0: 8, 1: 2, 2: 7}, logit_rows=[9, 0], record_routing=False)
    assert out.expert_ids_TLK is None
    assert out.expert_weights_TLK is None
    torch.testing.assert_close(out.logits_RV, torch.stack([whole[1].logits_TV[1], whole[0].logits_TV[0]]))
