"""Replay on a GPU, where the backward pass runs in a thread of its own."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from checkpoints import perturb_, qwen3_config
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Qwen3MoeForCausalLM

from routing import RoutingRecord, observe, replay

pytestmark = pytest.mark.gpu
B, S, E, K = 4, 32, 16, 4


@pytest.fixture
def model(cuda: torch.device) -> PreTrainedModel:
    """In bf16, with experts as transformers runs them by default on a GPU."""
    config = qwen3_config(hidden_size=64, moe_intermediate_size=32, num_experts=E, num_experts_per_tok=K)
    config._experts_implementation = "grouped_mm"
    model = Qwen3MoeForCausalLM(config)
    perturb_(model, 1)
    return model.to(cuda, torch.bfloat16)


def tokens() -> Tensor:
    return torch.randint(61, (B, S), generator=torch.Generator().manual_seed(0)).cuda()


def record_of(ids_BSLK: Tensor) -> RoutingRecord:
    return RoutingRecord(
        expert_ids_BSLK=ids_BSLK, recorded_BS=torch.ones(B, S, dtype=torch.bool, device=ids_BSLK.device)
    )


def random_record() -> RoutingRecord:
    """On the CPU, as completions come."""
    keys = torch.rand((B, S, 2, E), generator=torch.Generator().manual_seed(3))
    return record_of(keys.argsort(dim=-1)[..., :K].to(torch.uint8))


@contextmanager
def ids_seen(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [gate.register_forward_hook(lambda _module, _inputs, out: seen.append(out[2])) for gate in gates]
    yield seen
    for hook in hooks:
        hook.remove()


def test_its_own_routing_replayed_changes_no_bit(model: PreTrainedModel) -> None:
    with torch.no_grad(), ids_seen(model) as seen:
        logits = model(tokens()).logits
    record = record_of(torch.stack(seen, dim=1).view(B, S, 2, K))
    with torch.no_grad(), replay(model, record) as replayed:
        assert torch.equal(model(tokens()).logits, logits)
    assert replayed.report().differing == 0


def test_a_record_on_the_cpu_is_used_on_the_gpu(model: PreTrainedModel) -> None:
    record = random_record()
    with torch.no_grad(), replay(model, record) as replayed, ids_seen(model) as seen:
        model(tokens())
    assert torch.equal(torch.stack(seen, dim=1).view(B, S, 2, K).cpu(), record.expert_ids_BSLK.long())
    with torch.no_grad(), observe(model, record) as observed:
        model(tokens())
    assert observed.report().differing > 0.9 * observed.report().decisions
    assert replayed.report().positions == B * S


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_layer_gets_the_same_record_again(model: PreTrainedModel, reentrant: bool) -> None:
    record = random_record()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(tokens(), use_cache=False).logits.float().square().mean().backward()
        return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}

    with replay(model, record):
        expected = gradients()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with replay(model, record, recompute=True), ids_seen(model) as seen:
        found = gradients()
    assert len(seen) == 2 * 2, "two layers, once forward and once backward"
    for forward, backward in zip(seen[:2], reversed(seen[2:]), strict=True):
        assert torch.equal(forward, backward)
    for name, gradient in expected.items():  # atomic additions: no bits are promised
        torch.testing.assert_close(found[name], gradient, atol=1e-2 * float(gradient.abs().max()), rtol=0, msg=name)


def test_an_unannounced_recomputation_is_refused(model: PreTrainedModel) -> None:
    layer = model.model.layers[1]
    plain = layer.forward

    def checkpointed(hidden: Tensor, **options: object) -> Tensor:
        output: Tensor = checkpoint(plain, hidden, use_reentrant=False, **options)
        return output

    layer.forward = checkpointed
    refusal = r"layers\.1\.mlp\.gate is recomputed in a backward pass.*recompute=True"
    with pytest.raises(ValueError, match=refusal), replay(model, random_record()):
        model(tokens(), use_cache=False).logits.sum().backward()


def test_recorded_weights_are_used_in_the_models_dtype(model: PreTrainedModel) -> None:
    record = random_record()
    weights = torch.rand(record.expert_ids_BSLK.shape, generator=torch.Generator().manual_seed(5))
    seen: list[Tensor] = []
    gate = model.model.layers[0].mlp.gate
    hook = gate.register_forward_hook(lambda _module, _inputs, out: seen.append(out[1]))
    with torch.no_grad(), replay(model, dataclasses.replace(record, weights_BSLK=weights), weights="recorded"):
        model(tokens())
    hook.remove()
    assert torch.equal(seen[0].view(B, S, K).cpu(), weights[:, :, 0].bfloat16())
