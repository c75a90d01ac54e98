"""Replay: own routing replayed changes no bit, other experts are used as written, recomputed layers get them again."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoints import glm4_config, qwen3_config, tiny_model
from replay_records import B, S, experts_of, other_ids, own_record, tokens
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from routing import RoutingRecord, observe, replay
from routing.installed_gate import install_gate
from routing.model_routers import model_routers

CONFIGS = {"qwen3_moe": qwen3_config(), "glm4_moe": glm4_config(num_hidden_layers=3)}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(CONFIGS[request.param], 1).requires_grad_(True)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CONFIGS)
def test_its_own_routing_replayed_changes_no_bit(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(CONFIGS[family], 1, dtype).requires_grad_(True)
    record = own_record(model, tokens())
    logits = model(tokens()).logits
    expected = gradients(model, logits.float().log_softmax(-1).square().mean())
    with replay(model, record) as replayed:
        found = model(tokens()).logits
    assert torch.equal(found, logits)
    assert_same_bits(gradients(model, found.float().log_softmax(-1).square().mean()), expected)
    report = replayed.report()
    assert (report.positions, report.unrecorded, report.differing) == (B * S, 0, 0)
    assert report.weight_abs_diff_max == 0
    assert torch.equal(model(tokens()).logits, logits), "something of the replay was left behind"


def test_a_top_k_of_groups_is_not_taken_for_the_choice_of_experts() -> None:
    config = glm4_config(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=2)
    model = tiny_model(config, 1)
    record = own_record(model, tokens())
    logits = model(tokens()).logits
    with replay(model, record):
        assert torch.equal(model(tokens()).logits, logits)


def test_a_model_that_returns_its_routers_logits_may_be_replayed(model: PreTrainedModel) -> None:
    record = own_record(model, tokens())
    expected = model(tokens(), output_router_logits=True)
    with replay(model, record):
        found = model(tokens(), output_router_logits=True)
    assert torch.equal(found.logits, expected.logits)
    pairs = list(zip(found.get("router_logits") or (), expected.get("router_logits") or (), strict=True))
    assert all(torch.equal(*pair) for pair in pairs)
    model(tokens())


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_with_our_gate_replays_its_own_routing_bit_by_bit(family: str) -> None:
    model = tiny_model(CONFIGS[family], 1, torch.bfloat16).requires_grad_(True)
    with install_gate(model):
        record = own_record(model, tokens())
        assert record.weights_BSLK is not None
        assert record.weights_BSLK.dtype == torch.float32
        logits = model(tokens()).logits
        expected = gradients(model, logits.float().square().mean())
        with replay(model, record) as replayed:
            found = model(tokens()).logits
        assert torch.equal(found, logits)
        assert_same_bits(gradients(model, found.float().square().mean()), expected)
        assert replayed.report().differing == 0


def qwen3_by_hand(block: Qwen3MoeSparseMoeBlock, hidden_TD: Tensor, ids_TK: Tensor) -> Tensor:
    scores_TE = (hidden_TD @ block.gate.weight.T).softmax(-1)
    scores_TK = scores_TE.gather(1, ids_TK)
    return mixed(block, hidden_TD, ids_TK, scores_TK / scores_TK.sum(-1, keepdim=True))


def glm4_by_hand(block: Glm4MoeMoE, hidden_TD: Tensor, ids_TK: Tensor) -> Tensor:
    scores_TK = (hidden_TD @ block.gate.weight.T).sigmoid().gather(1, ids_TK)  # the bias is for choosing only
    weights_TK = scores_TK / scores_TK.sum(-1, keepdim=True) * 1.5
    return mixed(block, hidden_TD, ids_TK, weights_TK) + block.shared_experts(hidden_TD)


def mixed(block: Any, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    rows = []
    for hidden_D, ids_K, weights_K in zip(hidden_TD, ids_TK.tolist(), weights_TK, strict=True):
        parts = []
        for expert, weight in zip(ids_K, weights_K, strict=True):
            gate, up = (block.experts.gate_up_proj[expert] @ hidden_D).chunk(2)
            parts.append(weight * (block.experts.down_proj[expert] @ (functional.silu(gate) * up)))
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize(("family", "by_hand"), [("qwen3_moe", qwen3_by_hand), ("glm4_moe", glm4_by_hand)])
def test_other_experts_are_used_as_written_and_their_scores_learn(
    family: str, by_hand: Callable[[Any, Tensor, Tensor], Tensor]
) -> None:
    model = tiny_model(CONFIGS[family], 1).requires_grad_(True)
    block = next(m for m in model.modules() if isinstance(m, (Qwen3MoeSparseMoeBlock, Glm4MoeMoE)))
    hidden = torch.randn(B, S, 32, generator=torch.Generator().manual_seed(5))
    target = torch.randn(B, S, 32, generator=torch.Generator().manual_seed(6))
    record = other_ids(own_record(block, hidden), experts_of(block))
    ids_TK = record.expert_ids_BSLK[:, :, 0].flatten(0, 1)
    with replay(block, record) as replayed:
        found = block(hidden)
    expected = by_hand(block, hidden.flatten(0, 1), ids_TK).view_as(found)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    ours, theirs = (gradients(block, (output * target).sum()) for output in (found, expected))
    assert ours["gate.weight"].abs().max() > 1e-3
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    own = own_record(block, hidden).expert_ids_BSLK.sort(dim=-1).values
    differing = (own != record.expert_ids_BSLK.sort(dim=-1).values).any(-1).sum()
    assert replayed.report().differing == differing > 0


def test_the_slots_are_in_the_records_order(model: PreTrainedModel) -> None:
    record = other_ids(own_record(model, tokens()), experts_of(model))
    router = model_routers(model)[0].module
    seen: list[Tensor] = []
    hook = router.register_forward_hook(lambda _module, _inputs, out: seen.append(out[2]))
    with replay(model, record):
        model(tokens())
    hook.remove()
    assert torch.equal(seen[0], record.expert_ids_BSLK[:, :, 0].flatten(0, 1))


def test_recorded_weights_are_used_where_asked_for_and_the_routers_learn_nothing(model: PreTrainedModel) -> None:
    record = other_ids(own_record(model, tokens()), experts_of(model))
    weights = torch.rand(record.expert_ids_BSLK.shape, generator=torch.Generator().manual_seed(9))
    recorded_BS = torch.ones(B, S, dtype=torch.bool)
    recorded_BS[0, 2] = False
    record = dataclasses.replace(record, weights_BSLK=weights, recorded_BS=recorded_BS)
    routers = model_routers(model)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    hook = routers[-1].module.register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    with replay(model, record, weights="recorded") as replayed:
        found = model(tokens()).logits
    hook.remove()
    assert torch.equal(seen[0][1][recorded_BS.flatten()], weights[:, :, -1][recorded_BS])
    assert not torch.equal(seen[0][1].view(B, S, -1)[0, 2], weights[0, 2, -1])
    assert replayed.report().weight_abs_diff_max > 0.1
    grads = gradients(model, found[1:].square().sum())  # rows whose every position is recorded
    assert all(grads[f"{router.name}.weight"].abs().max() == 0 for router in routers)


def test_the_report_tells_own_decisions_from_recorded_ones(model: PreTrainedModel) -> None:
    own = own_record(model, tokens())
    first = own.expert_ids_BSLK[1, 4, 0]
    absent = next(expert for expert in range(experts_of(model)) if expert not in first)
    ids_BSLK = own.expert_ids_BSLK.clone()
    ids_BSLK[1, 4, 0, 0] = absent
    assert own.weights_BSLK is not None
    weights_BSLK = own.weights_BSLK.clone()
    weights_BSLK[1, 4, 0] += 1
    record = dataclasses.replace(own, expert_ids_BSLK=ids_BSLK, weights_BSLK=weights_BSLK)
    logits = model(tokens()).logits
    with observe(model, record) as observed:
        assert torch.equal(model(tokens()).logits, logits)
    report = observed.report()
    assert (report.decisions, report.differing, report.positions_differing) == (B * S * report.layers, 1, 1)
    assert report.weight_abs_diff_max == report.weight_abs_diff_mean == 0, "of decisions that agree"
    with replay(model, record) as replayed:
        model(tokens())
    assert replayed.report().weight_abs_diff_max > 0.5


def test_slots_in_another_order_differ_in_nothing_but_the_order(model: PreTrainedModel) -> None:
    own = own_record(model, tokens())
    assert own.weights_BSLK is not None
    turned = RoutingRecord(
        expert_ids_BSLK=own.expert_ids_BSLK.flip(-1),
        recorded_BS=own.recorded_BS,
        weights_BSLK=own.weights_BSLK.flip(-1),
    )
    for block in (observe, replay):
        with block(model, turned) as seen:
            model(tokens())
        assert seen.report().differing == 0
        assert seen.report().weight_abs_diff_max < 1e-6


# Padding and positions without a record


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_replay_as_they_would_alone(model: PreTrainedModel, side: str) -> None:
    lengths = (7, 4, 1)
    real_BS = torch.arange(S) < torch.tensor(lengths)[:, None]
    if side == "left":
        real_BS = real_BS.flip(1)
    record = dataclasses.replace(other_ids(own_record(model, tokens()), experts_of(model)), recorded_BS=real_BS)
    positions = (real_BS.cumsum(1) - 1).clamp(min=0)
    with replay(model, record) as replayed:
        together = model(input_ids=tokens(), attention_mask=real_BS.long(), position_ids=positions).logits
    report = replayed.report()
    assert (report.positions, report.unrecorded) == (sum(lengths), B * S - sum(lengths))
    for row in range(B):
        alone = RoutingRecord(
            expert_ids_BSLK=record.expert_ids_BSLK[row][real_BS[row]][None],
            recorded_BS=torch.ones(1, lengths[row], dtype=torch.bool),
        )
        with replay(model, alone):
            expected = model(tokens()[row][real_BS[row]][None]).logits[0]
        torch.testing.assert_close(together[row][real_BS[row]], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("filling", [-1, 1000])
def test_what_stands_where_nothing_is_recorded_is_never_read(model: PreTrainedModel, filling: int) -> None:
    own = own_record(model, tokens())
    logits = model(tokens()).logits
    recorded_BS = torch.rand(B, S, generator=torch.Generator().manual_seed(2)) < 0.5
    rubbish = own.expert_ids_BSLK.masked_fill(~recorded_BS[..., None, None], filling)
    other_tokens = tokens().masked_fill(~recorded_BS, filling)
    record = dataclasses.replace(own, expert_ids_BSLK=rubbish, recorded_BS=recorded_BS, token_ids_BS=other_tokens)
    with replay(model, record) as replayed:
        assert torch.equal(model(tokens()).logits, logits)
    assert replayed.report().positions == int(recorded_BS.sum())


# Gradient checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_layer_gets_the_same_record_again(model: PreTrainedModel, reentrant: bool) -> None:
    record = other_ids(own_record(model, tokens()), experts_of(model))
    with replay(model, record):
        expected = gradients(model, model(tokens()).logits.square().mean())
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with replay(model, record, recompute=True) as replayed:
        found = gradients(model, model(tokens(), use_cache=False).logits.square().mean())
    assert_same_bits(found, expected)
    assert replayed.report().decisions == record.expert_ids_BSLK[..., 0].numel(), "a recomputation was counted"


def test_checkpointing_has_to_be_announced(model: PreTrainedModel) -> None:
    record = own_record(model, tokens())
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match=r"checkpointing is on \(model.*recompute=True"), replay(model, record):
        model(tokens(), use_cache=False)
    with torch.no_grad(), replay(model, record):
        model(tokens(), use_cache=False)


def test_a_backward_pass_after_the_block_is_refused(model: PreTrainedModel) -> None:
    record = own_record(model, tokens())
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="no layer was recomputed"), replay(model, record, recompute=True):
        model(tokens(), use_cache=False)


class Wrapped(nn.Module):
    """Checkpoints by itself, without any switch that could be seen."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = checkpoint(lambda ids: self.model(ids, use_cache=False).logits, input_ids, use_reentrant=False)
        return logits


def test_an_unannounced_recomputation_is_refused_when_it_comes(model: PreTrainedModel) -> None:
    record = own_record(model, tokens())
    wrapped = Wrapped(model)
    refusal = r"layers\.\d\.mlp\.gate is recomputed in a backward pass.*recompute=True"
    with pytest.raises(ValueError, match=refusal), replay(wrapped, record):
        wrapped(tokens()).sum().backward()


def test_a_record_is_for_one_backward_pass(model: PreTrainedModel) -> None:
    record = own_record(model, tokens())
    wrapped = Wrapped(model)
    with replay(wrapped, record, recompute=True):
        loss = wrapped(tokens()).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(ValueError, match="recomputed a second time"):
            loss.backward()
