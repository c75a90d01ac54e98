"""The decoder's parts give the very bits of transformers' modules, and attention is softmax whatever the step's shape.

T tokens, E experts, K slots of a token, D hidden, I intermediate, H heads, d head size, N keys.
"""

import random

import pytest
import torch
from checkpoints import glm4_config, qwen3_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.glm4_moe import modeling_glm4_moe as glm4
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

from rollout.model import attention as attention_module
from rollout.model.attention import attend, plan_attention
from rollout.model.batch import ForwardBatch, KvCache
from rollout.model.experts import gated_mlp, routed_experts
from rollout.model.norm import rms_norm
from rollout.model.rope import rotate, rotation
from rollout.model.spec import RopeSpec
from routing import Assignment

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_has_the_bits_of_transformers(dtype):
    generator = torch.Generator().manual_seed(0)
    norm = qwen3.Qwen3MoeRMSNorm(48, eps=1e-5).to(dtype)
    norm.weight.data.normal_(generator=generator)
    hidden_TD = torch.randn(33, 48, generator=generator).to(dtype)
    with torch.no_grad():
        assert torch.equal(rms_norm(hidden_TD, norm.weight, 1e-5), norm(hidden_TD))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fraction", "rotary_dim"), [(0.5, 8), (1.0, 16)])
def test_rotation_has_the_bits_of_transformers(dtype, fraction, rotary_dim):
    rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": fraction}
    config = glm4_config(head_dim=16, rope_parameters=rope_parameters)
    heads = torch.randn(40, 6, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    positions_T = torch.arange(3000, 3040)
    cos, sin = glm4.Glm4MoeRotaryEmbedding(config)(heads, positions_T[None])
    theirs, _ = glm4.apply_rotary_pos_emb(heads.transpose(0, 1)[None], heads.transpose(0, 1)[None], cos, sin)
    ours = rotate(heads, *rotation(positions_T, RopeSpec(theta=1e6, rotary_dim=rotary_dim), dtype))
    assert torch.equal(ours, theirs[0].transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
@given(seed=st.integers(0, 2**16), tokens=st.integers(1, 20), slots=st.integers(1, 7))
def test_experts_have_the_bits_of_transformers_loop(dtype, weight_dtype, seed, tokens, slots):
    generator = torch.Generator().manual_seed(seed)
    model = tiny_model(qwen3_config(num_experts=7, num_hidden_layers=1), seed, dtype)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    hidden_TD = torch.randn(tokens, 32, generator=generator).to(dtype)
    scores_TE = torch.rand(tokens, 7, generator=generator)
    weights_TK, ids_TK = scores_TE.topk(slots, dim=1)
    weights_TK = weights_TK.to(weight_dtype)
    theirs = experts(hidden_TD, ids_TK, weights_TK)
    assignment = Assignment(expert_ids_TK=ids_TK.int(), weights_TK=weights_TK)
    ours = routed_experts(hidden_TD, assignment, experts.gate_up_proj, experts.down_proj)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)


def test_a_gated_mlp_has_the_values_of_transformers():
    model = tiny_model(glm4_config(), seed=2)
    mlp = model.get_submodule("model.layers.0.mlp")
    hidden_TD = torch.randn(9, 32, generator=torch.Generator().manual_seed(2))
    ours = gated_mlp(hidden_TD, torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)), mlp.down_proj.weight)
    torch.testing.assert_close(ours, mlp(hidden_TD), atol=1e-6, rtol=0)


def paged_batch(lengths: list[int], contexts: list[int], block_size: int, dice: random.Random) -> ForwardBatch:
    """Sequences with these rows and contexts; the block tables are dealt out at random."""
    counts = [-(-context // block_size) for context in contexts]
    blocks = list(range(sum(counts)))
    dice.shuffle(blocks)
    tables = [[blocks.pop() for _ in range(count)] for count in counts]
    positions = [p for q, c in zip(lengths, contexts, strict=True) for p in range(c - q, c)]
    return ForwardBatch(
        token_ids_T=torch.zeros(sum(lengths), dtype=torch.int64),
        positions_T=torch.tensor(positions),
        slots_T=torch.zeros(sum(lengths), dtype=torch.int64),
        query_lengths=tuple(lengths),
        context_lengths=tuple(contexts),
        block_tables_SB=torch.tensor([table + [0] * (max(counts) - len(table)) for table in tables]),
        logit_rows_R=torch.zeros(0, dtype=torch.int64),
    )


@pytest.mark.parametrize("pairs", [1, 60, 1 << 20])
@given(data=st.data())
def test_attention_over_any_mixture_of_chunks_is_softmax_over_the_sequences_own_keys(pairs, data):
    sequences = data.draw(st.lists(st.tuples(st.sampled_from([1, 1, 2, 5]), st.integers(0, 9)), min_size=1, max_size=6))
    lengths, contexts = [q for q, _ in sequences], [q + earlier for q, earlier in sequences]
    block_size, kv_heads, shared = (
        data.draw(st.integers(1, 4)),
        data.draw(st.integers(1, 2)),
        data.draw(st.integers(1, 3)),
    )
    dice = random.Random(data.draw(st.integers(0, 99)))
    generator = torch.Generator().manual_seed(dice.randrange(1000))
    batch = paged_batch(lengths, contexts, block_size, dice)
    kv = KvCache(
        layers=2,
        blocks=64,
        block_size=block_size,
        kv_heads=kv_heads,
        head_dim=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    kv.keys.fill_(float("nan"))
    kv.values.fill_(float("nan"))
    queries_THd = torch.randn(sum(lengths), kv_heads * shared, 4, generator=generator)
    expected, start = [], 0
    for sequence, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
        keys_NGd, values_NGd = torch.randn(2, context, kv_heads, 4, generator=generator)
        for position in range(context):
            block = batch.block_tables_SB[sequence, position // block_size]
            kv.keys[1, block, position % block_size] = keys_NGd[position]
            kv.values[1, block, position % block_size] = values_NGd[position]
        for row in range(length):
            seen = context - length + row + 1
            for head in range(kv_heads * shared):
                scores_N = keys_NGd[:seen, head // shared] @ queries_THd[start + row, head] / 2
                expected.append(scores_N.softmax(0) @ values_NGd[:seen, head // shared])
        start += length
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "MAX_GROUP_PAIRS", pairs)
        groups = plan_attention(batch, block_size)
    attended_THd = attend(queries_THd, kv, 1, groups)
    torch.testing.assert_close(attended_THd.flatten(0, 1), torch.stack(expected), atol=1e-5, rtol=0)


def test_sequences_with_equally_many_rows_attend_together():
    batch = paged_batch([1, 4, 1, 4, 1], [9, 4, 3, 6, 5], 2, random.Random(0))
    groups = plan_attention(batch, 2)
    assert [(group.spans, group.queries) for group in groups] == [(3, 1), (2, 4)]


@given(
    sequences=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 90)), min_size=1, max_size=5),
    pairs=st.sampled_from([1, 30, 100, 1000]),
)
def test_the_scores_of_a_group_are_bounded_however_long_one_sequence_is(sequences, pairs):
    lengths, contexts = [q for q, _ in sequences], [q + earlier for q, earlier in sequences]
    batch = paged_batch(lengths, contexts, 4, random.Random(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "MAX_GROUP_PAIRS", pairs)
        groups = plan_attention(batch, 4)
    for group in groups:
        scores = group.spans * group.queries * group.slots_SN.shape[1]
        assert scores <= pairs or (group.spans, group.queries) == (1, 1)
    rows = [torch.arange(sum(lengths)) if group.rows_SQ is None else group.rows_SQ.flatten() for group in groups]
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(sum(lengths)))
