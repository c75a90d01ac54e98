"""Naming: declared once, read both ways, and every hosted element in exactly one place."""

import pytest
import torch
from fakes.weights_fleet import TIED, hosted_from, layout, learner_state, same_bits, storage
from hypothesis import given
from hypothesis import strategies as st

from weights.catalogue import Catalogue, TensorSpec
from weights.errors import ManifestError
from weights.naming import ExpertRows, HostedLayout, Rows, Rule, Whole, to_wire
from weights.plan import plan


@st.composite
def models(draw: st.DrawFn) -> tuple[list[Rule], dict[str, torch.Tensor]]:
    """Rules and storage of random shapes, dtypes and content."""
    rules: list[Rule] = []
    parameters = {}
    columns = draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    for index in range(draw(st.integers(1, 4))):
        name = f"p{index}"
        rows = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
        shape: tuple[int, ...]
        match draw(st.sampled_from(["whole", "scalar", "rows", "experts"])):
            case "whole":
                rules.append(Whole(parameter=name, name=f"wire.{name}"))
                shape = (sum(rows), columns)
            case "scalar":
                rules.append(Whole(parameter=name, name=f"wire.{name}"))
                shape = ()
            case "rows":
                names = tuple(f"wire.{name}.{part}" for part in range(len(rows)))
                rules.append(Rows(parameter=name, names=names, rows=rows))
                shape = (sum(rows), columns)
            case "experts":
                patterns = tuple(f"wire.{name}.{{expert}}.{part}" for part in range(len(rows)))
                rules.append(ExpertRows(parameter=name, patterns=patterns, rows=rows))
                shape = (draw(st.integers(1, 3)), sum(rows), columns)
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
        parameters[name] = torch.randint(-99, 99, shape, generator=generator).to(dtype)
    return rules, parameters


@given(models())
def test_to_hosted_and_back_is_the_same_bit_for_bit(model: tuple[list[Rule], dict[str, torch.Tensor]]) -> None:
    rules, parameters = model
    mapping = HostedLayout(rules, parameters)
    wire = {name: tensor.clone() for name, tensor in mapping.state_dict(parameters)}
    empty = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    for name, tensor in wire.items():
        mapping[name].view(empty).copy_(tensor)
    assert same_bits(empty, parameters)
    assert same_bits(dict(mapping.state_dict(empty)), wire)


@given(models())
def test_every_view_is_a_contiguous_block_of_the_parameter_itself(
    model: tuple[list[Rule], dict[str, torch.Tensor]],
) -> None:
    rules, parameters = model
    mapping = HostedLayout(rules, parameters)
    for name, view in mapping.state_dict(parameters):
        at = mapping[name]
        assert view.is_contiguous()
        assert (tuple(view.shape), view.dtype) == (at.shape, at.dtype)
        storage_of = view.untyped_storage().data_ptr()
        assert storage_of == parameters[at.parameter].untyped_storage().data_ptr()
    assert sum(view.numel() for _, view in mapping.state_dict(parameters)) == sum(
        tensor.numel() for tensor in parameters.values()
    )


def test_a_layout_needs_only_shapes_and_dtypes() -> None:
    meta = {name: tensor.to("meta") for name, tensor in storage().items()}
    assert layout(meta).digest == layout(storage()).digest


def test_a_layout_digest_shows_names_shapes_dtypes_and_ties() -> None:
    def digest(name: str = "w", rows: int = 2, dtype: torch.dtype = torch.float32, tied: str | None = None) -> str:
        parameters = {"p": torch.zeros(rows, 3, dtype=dtype)}
        return HostedLayout([Whole(parameter="p", name=name)], parameters, tied={tied: name} if tied else None).digest

    assert len({digest(), digest("v"), digest(rows=3), digest(dtype=torch.bfloat16), digest(tied="t")}) == 5


def test_a_layout_that_does_not_fit_names_every_offender() -> None:
    parameters = {
        "qkv": torch.zeros(8, 4),
        "bare": torch.zeros(2),
        "experts": torch.zeros(2, 5, 3),
        "short": torch.zeros(6, 1),
        "twice": torch.zeros(2, 2),
    }
    rules: list[Rule] = [
        Rows(parameter="qkv", names=("q", "k"), rows=(4, 3)),
        ExpertRows(parameter="experts", patterns=("e.{expert}.a", "e.{expert}.b")),
        Whole(parameter="absent", name="x"),
        Whole(parameter="short", name="s"),
        Whole(parameter="twice", name="t"),
        Whole(parameter="twice", name="t2"),
        Whole(parameter="twice", name="s"),
    ]
    with pytest.raises(ValueError, match="do not fit") as caught:
        HostedLayout(rules, parameters, tied={"alias": "nowhere"})
    for offender in (
        "qkv: shape",
        "experts: 5 rows",
        "absent: a rule",
        "bare: no rule",
        "s: given twice",
        "alias: tied",
    ):
        assert offender in str(caught.value)
    assert "twice: elements [0, 4) lie in more than one slice" in str(caught.value)


@pytest.mark.parametrize("patterns", [("e.a",), (), ("e.{expert}", "e.b")])
def test_a_pattern_without_the_expert_is_refused(patterns: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="expert"):
        HostedLayout([ExpertRows(parameter="p", patterns=patterns)], {"p": torch.zeros(2, 2, 2)})


def test_stacked_experts_become_checkpoint_names_without_a_copy() -> None:
    state = learner_state(1)
    wire = dict(to_wire(state.items()))
    assert set(wire) == set(layout(storage()))
    stacked = state["model.layers.0.mlp.experts.gate_up_proj"]
    for expert in range(3):
        prefix = f"model.layers.0.mlp.experts.{expert}"
        assert torch.equal(wire[f"{prefix}.gate_proj.weight"], stacked[expert, :16])
        assert torch.equal(wire[f"{prefix}.up_proj.weight"], stacked[expert, 16:])
        assert wire[f"{prefix}.up_proj.weight"].untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()
    hosted = storage()
    for name, tensor in wire.items():
        layout(hosted)[name].view(hosted).copy_(tensor)
    assert same_bits(hosted, hosted_from(state))


def test_a_tied_duplicate_is_left_out_and_an_equal_copy_is_not() -> None:
    weight = torch.randn(4, 2)
    assert [name for name, _ in to_wire([("a", weight), ("b", weight.detach())])] == ["a"]
    assert [name for name, _ in to_wire([("a", weight), ("b", weight.clone())])] == ["a", "b"]
    assert [name for name, _ in to_wire([("a", weight), ("b", weight[:2])])] == ["a", "b"]
    assert [name for name, _ in to_wire([("a", weight), ("b", weight)], keep_tied=True)] == ["a", "b"]


def test_tensors_that_are_gathered_one_by_one_are_never_taken_for_duplicates() -> None:
    gathered = ((f"layer.{i}", torch.full((1000,), float(i))) for i in range(20))  # each freed before the next
    assert [(name, tensor[0].item()) for name, tensor in to_wire(gathered)] == [(f"layer.{i}", i) for i in range(20)]


def test_parameters_leave_their_graph_behind() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert [tensor.requires_grad for _, tensor in to_wire([("a", parameter)])] == [False]


def test_stacked_experts_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"experts.gate_up_proj: stacked experts are \[E, 2 x rows"):
        list(to_wire([("model.layers.0.mlp.experts.gate_up_proj", torch.zeros(2, 3, 4))]))


def test_a_sharded_tensor_is_refused() -> None:
    class Sharded(torch.Tensor):
        def full_tensor(self) -> torch.Tensor:
            raise AssertionError("nobody may gather on one rank alone")

    with pytest.raises(ValueError, match="w is sharded"):
        list(to_wire([("w", torch.zeros(2).as_subclass(Sharded))]))


def specs_of(state: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name=name, shape=tuple(t.shape), dtype=t.dtype) for name, t in to_wire(state.items())}


def test_a_plan_pairs_every_tensor_with_its_place() -> None:
    entries = specs_of(learner_state(1))
    mapping = layout(storage())
    assert list(plan(Catalogue(entries.values()), mapping)) == [mapping[name] for name in entries]


def test_a_plan_names_every_offender_in_one_error() -> None:
    entries = specs_of(learner_state(1))
    norm = entries.pop("model.norm.weight")
    q, k = (entries[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qk")
    gate = entries["model.layers.0.mlp.gate.weight"]
    changed = [
        TensorSpec(name=q.name, shape=(3, 3), dtype=q.dtype),
        TensorSpec(name=k.name, shape=k.shape, dtype=torch.float32),
        TensorSpec(name="model.layers.7.odd", shape=(1,), dtype=q.dtype),
        TensorSpec(name="lm_head.weight", shape=(1,), dtype=q.dtype),
        gate,
    ]
    kept = [entry for entry in entries.values() if entry.name not in (q.name, k.name)]
    with pytest.raises(ManifestError) as caught:
        plan(Catalogue([*kept, *changed]), layout(storage()))
    assert str(caught.value).splitlines()[1:] == [
        f"  {gate.name}: given 2 times",
        f"  {norm.name}: missing",
        f"  {q.name}: shape [3, 3], hosted [32, 32]",
        f"  {k.name}: float32, hosted bfloat16",
        "  model.layers.7.odd: unknown",
        "  lm_head.weight: unknown; it is tied to model.embed_tokens.weight here, send only that",
    ]
    assert TIED == {"lm_head.weight": "model.embed_tokens.weight"}
