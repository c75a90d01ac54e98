"""What replay refuses: records that do not fit, that nobody consumes, or that are asked for twice."""

import dataclasses
from typing import Any

import pytest
import torch
from checkpoints import glm4_config, qwen3_config, tiny_model
from replay_records import experts_of, other_ids, own_record, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from routing import RoutingRecord, observe, replay
from routing.model_routers import model_routers

CONFIGS = {"qwen3_moe": qwen3_config(), "glm4_moe": glm4_config(num_hidden_layers=3)}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(CONFIGS[request.param], 1).requires_grad_(True)


def test_a_block_without_a_forward_is_an_error(model: PreTrainedModel) -> None:
    record = own_record(model, tokens())
    with pytest.raises(ValueError, match="was not run inside the block"), replay(model, record):
        pass


def test_a_second_forward_is_an_error(model: PreTrainedModel) -> None:
    record = own_record(model, tokens())
    with replay(model, record):
        model(tokens())
        with pytest.raises(ValueError, match="a second forward"):
            model(tokens())


def test_a_forward_of_a_part_of_the_model_is_an_error(model: PreTrainedModel) -> None:
    record = own_record(model, tokens())
    with pytest.raises(ValueError, match=r"visited outside of a forward of .*ForCausalLM"), replay(model, record):
        model.model(tokens())


def test_so_is_one_after_the_forward(model: PreTrainedModel) -> None:
    record = own_record(model, tokens())
    with replay(model, record):
        model(tokens())
        with pytest.raises(ValueError, match=r"visited outside of a forward of .*ForCausalLM"):
            model.model(tokens())


class Looped(nn.Module):
    """Runs its model twice in one forward, or leaves out the last layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.twice = False

    def forward(self, input_ids: Tensor) -> None:
        self.model(input_ids)
        if self.twice:
            self.model(input_ids)


def test_a_layer_visited_twice_is_named(model: PreTrainedModel) -> None:
    looped = Looped(model)
    record = own_record(looped, tokens())
    looped.twice = True
    with pytest.raises(ValueError, match=r"layers\.\d\.mlp\.gate is visited a second time"), replay(looped, record):
        looped(tokens())


def test_a_layer_never_visited_is_named(model: PreTrainedModel) -> None:
    looped = Looped(model)
    record = own_record(looped, tokens())
    model.model.config.num_hidden_layers -= 1
    last = model_routers(model)[-1].name
    with pytest.raises(ValueError, match=rf"never visited in the forward: model\.{last}$"), replay(looped, record):
        looped(tokens())


def test_there_is_no_report_before_the_forward(model: PreTrainedModel) -> None:
    record = own_record(model, tokens())
    with replay(model, record) as replayed:
        with pytest.raises(ValueError, match="no report yet"):
            replayed.report()
        model(tokens())


def test_an_error_inside_leaves_the_model_as_it_was(model: PreTrainedModel) -> None:
    record = own_record(model, tokens())
    logits = model(tokens()).logits
    with pytest.raises(ZeroDivisionError), replay(model, other_ids(record, experts_of(model))):
        raise ZeroDivisionError
    assert torch.equal(model(tokens()).logits, logits)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_block_in_a_block_is_an_error(model: PreTrainedModel) -> None:
    record = own_record(model, tokens())
    with replay(model, record):
        with pytest.raises(ValueError, match="inside another block already"), replay(model, record):
            pass
        model(tokens())


def test_a_compiled_model_is_refused(model: PreTrainedModel) -> None:
    record = own_record(model, tokens())
    model.model.layers[0].compile(backend="eager")
    with pytest.raises(ValueError, match=r"compiled \(model\.layers\.0\)"), replay(model, record):
        pass


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (tokens()[:2], r"shape \[2, 7\], the record is of a batch \[3, 7\]"),
        (tokens()[:, :-1], r"shape \[3, 6\], the record is of a batch \[3, 7\]"),
        (tokens().flip(0), r"other tokens than the record in row 0 \(a\), row 2 \(c\)$"),
    ],
)
def test_another_batch_is_refused(model: PreTrainedModel, batch: Tensor, message: str) -> None:
    record = dataclasses.replace(own_record(model, tokens()), token_ids_BS=tokens(), names=("a", "b", "c"))
    with pytest.raises(ValueError, match=message), replay(model, record):
        model(input_ids=batch)


@pytest.mark.parametrize("block", [replay, observe])
def test_embeddings_of_another_batch_are_refused_by_their_number(model: PreTrainedModel, block: Any) -> None:
    record = own_record(model, tokens())
    refusal = r"mlp.gate routes 14 tokens, the record is of a batch \[3, 7\]"
    with pytest.raises(ValueError, match=refusal), block(model, record):
        model(inputs_embeds=model.model.embed_tokens(tokens()[:2]))


def test_everything_that_does_not_fit_the_model_is_named_on_entry() -> None:
    model = tiny_model(qwen3_config(), 1)
    own = own_record(model, tokens())
    ids_BSLK = own.expert_ids_BSLK.clone()
    ids_BSLK[0, 3, 0, 1], ids_BSLK[2, 6, 1, 0] = 5, 17
    with (
        pytest.raises(ValueError, match="beyond") as caught,
        replay(model, dataclasses.replace(own, expert_ids_BSLK=ids_BSLK)),
    ):
        pass
    for part in (r"layers.0.mlp.gate has 5 experts; beyond: row 0 position 3", "layers.1.mlp.gate", "row 2 position 6"):
        assert part in str(caught.value)
    layers = dataclasses.replace(own, expert_ids_BSLK=own.expert_ids_BSLK[:, :, :1], weights_BSLK=None)
    with (
        pytest.raises(ValueError, match=r"1 MoE layers, the model 2 \(model.layers.0.mlp.gate, "),
        replay(model, layers),
    ):
        pass
    slots = dataclasses.replace(own, expert_ids_BSLK=own.expert_ids_BSLK[..., :1], weights_BSLK=None)
    with (
        pytest.raises(ValueError, match=r"1 experts per token, the model: .*layers.1.mlp.gate 2"),
        replay(model, slots),
    ):
        pass
    bare = dataclasses.replace(own, weights_BSLK=None)
    with pytest.raises(ValueError, match="holds no weights"), replay(model, bare, weights="recorded"):
        pass


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_ids_BSLK": torch.zeros(1, 2, 3)}, r"integers \[B, S, L, K\]"),
        ({"expert_ids_BSLK": torch.zeros(1, 2, 3, 1)}, r"integers \[B, S, L, K\] expected, got torch.float32"),
        ({"recorded_BS": torch.ones(1, 2)}, r"recorded: bool \[1, 2\]"),
        ({"recorded_BS": torch.ones(1, 3, dtype=torch.bool)}, r"recorded: bool \[1, 2\]"),
        ({"weights_BSLK": torch.ones(1, 2, 3, 1)}, r"weights: floats \[1, 2, 3, 2\]"),
        ({"token_ids_BS": torch.ones(1, 1)}, r"token ids: \[1, 2\] expected"),
        ({"names": ("a", "b")}, "1 rows and 2 names"),
        ({"weights_BSLK": torch.ones(1, 2, 3, 2, device="meta")}, "one device"),
    ],
)
def test_an_ill_formed_record_is_refused(fields: dict[str, Any], message: str) -> None:
    good = {
        "expert_ids_BSLK": torch.tensor([0, 1]).expand(1, 2, 3, 2),
        "recorded_BS": torch.ones(1, 2, dtype=torch.bool),
    }
    RoutingRecord(**good)
    with pytest.raises(ValueError, match=message):
        RoutingRecord(**{**good, **fields})


def test_negative_and_repeated_ids_are_named_where_something_is_recorded() -> None:
    ids_BSLK = torch.tensor([0, 1]).repeat(2, 3, 4, 1)
    ids_BSLK[0, 1, 3] = torch.tensor([7, 7])
    ids_BSLK[1, 2, 0] = torch.tensor([3, -1])
    recorded_BS = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="row 1 position 2 MoE layer 0: ") as caught:
        RoutingRecord(expert_ids_BSLK=ids_BSLK, recorded_BS=recorded_BS)
    assert "row 0 position 1 MoE layer 3: [7, 7]" in str(caught.value)
    recorded_BS[0, 1] = recorded_BS[1, 2] = False
    RoutingRecord(expert_ids_BSLK=ids_BSLK, recorded_BS=recorded_BS)
