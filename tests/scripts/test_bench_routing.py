"""bench_routing.py: its routers are the checkpoints', its comparisons can fail, its clock is given what it says."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_routing
import pytest
import torch
from bench_routing import main, parse
from routing_bench import bits, kernel_floor, megatron_function, models, tables, transformers_modules
from routing_bench.columns import COLUMNS, MORE_COLUMNS, Column, Way, sigmoid, softmax
from routing_bench.compilation import Kind, jobs_of, launch
from routing_bench.models import MODELS, REFUSED, Logits, Model
from routing_bench.report import WIDTH, text
from routing_bench.rows import bulk, corpus, families, odd_strides, strided
from routing_bench.speed import Race, operands
from routing_bench.tally import Count, Tally, poisoned_memory
from torch import Tensor
from transformers_routers import config_of

from routing import Assignment, GroupSpec, RouterSpec, SlotOrder, route
from routing.oracle import EagerOracle

CPU = torch.device("cpu")
GLM = next(model for model in MODELS if model.name.startswith("GLM-4.7-Flash"))
TINY = ["--bits", "--device", "cpu", "--models", "Qwen3-30B", "Moonlight", "--sizes", "1", "33", "257"]
TINY += ["--batches", "2", "--batch-tokens", "40", "--commit", "abc"]


def test_bits_on_a_cpu_compares_the_reference_and_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "results" / "routing.json"), *TINY]) == 0
    found = json.loads((tmp_path / "results" / "routing.json").read_text())
    assert (found["commit"], found["device"].split(",")[0], found["versions"]["torch"]) == (
        "abc",
        "CPU",
        torch.__version__,
    )
    assert "speed" not in found
    rows = found["bits"]["beside"]
    assert [(row["model"][:9], row["logits"]) for row in rows["eager PyTorch"]] == [
        ("Qwen3-30B", "fp32"),
        ("Qwen3-30B", "bf16"),
        ("Moonlight", "fp32"),
        ("Moonlight", "bf16"),
    ]
    assert {row["router"] for row in rows["transformers"]} == {"Qwen3MoeTopKRouter", "DeepseekV3TopkRouter"}
    every = [row for part in rows.values() for row in part]
    assert all(row["ids_rows_wrong"] == row["weights_rows_wrong"] == 0 < row["tokens"] for row in every)
    assert found["bits"]["tokens"] == sum(row["tokens"] for row in every)
    assert f"{found['bits']['tokens']:,}" in capsys.readouterr().out


def test_a_wrong_bit_is_in_the_table_and_in_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Scaled(EagerOracle):
        def __call__(self, logits_TE: Tensor, **given: Any) -> Any:
            stages = super().__call__(logits_TE, **given)
            wrong_TK = stages.weights_TK.clone()
            wrong_TK[0, -1] *= 1.01
            return dataclasses.replace(stages, weights_TK=wrong_TK)

    monkeypatch.setattr(bits, "EagerOracle", Scaled)
    assert main([str(tmp_path / "routing.json"), *TINY]) == 1
    found = json.loads((tmp_path / "routing.json").read_text())["bits"]
    assert found["ids_rows_wrong"] == 0 < found["weights_rows_wrong"]
    assert f"{found['weights_rows_wrong']:,}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--device", "cpu"], "with --device cpu say --bits"),
        (["x", "--bits", "--device", "cpu", "--models", "Qwen9"], "no model is called Qwen9; known: GLM-4.5"),
        (["x", "--bits", "--device", "cpu", "--sizes", "0"], "at least 1 expected"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert message in capsys.readouterr().err


def test_outside_of_a_checkout_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_routing, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert bench_routing.commit() == "unknown"


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_model_is_the_router_that_its_trainers_config_class_makes_of_these_numbers(model: Model) -> None:
    for logits, dtype in ((Logits.FP32, torch.float32), (Logits.BF16, torch.bfloat16)):
        spec = model.spec(logits, "cuda")
        assert spec.gate.output_dtype == dtype
        config = config_of(model.row, spec.num_experts, spec.top_k, **transformers_modules.beside_its_size(model))
        theirs = RouterSpec.from_trainer("transformers", config, dtype=dtype, platform="cuda", gate="trainer")
        assert dataclasses.replace(spec, gate=theirs.gate) == theirs
        assert transformers_modules.spec_of(model, dtype, "cuda") == theirs


def test_the_models_have_names_of_their_own_and_the_refused_one_is_refused() -> None:
    assert len({model.name for model in MODELS}) == len(MODELS) == 28
    assert models.named(["GLM-4.5"]) == MODELS[:2]
    for model in REFUSED:
        with pytest.raises(ValueError, match="sparsemixer"):
            model.spec(Logits.FP32, "cuda")


def test_the_corpus_has_every_family_at_every_size_and_under_every_bias() -> None:
    spec = GLM.spec(Logits.FP32, "cpu")
    special = {tuple(row) for row in families(spec).view(torch.int32).tolist()}
    for size, biases in ((7, 1), (33, 1), (257, 8)):
        batches = list(corpus(spec, CPU, [size]))
        assert all(len(batch.logits_TE) <= size for batch in batches)
        rows = [tuple(row) for batch in batches for row in batch.logits_TE.view(torch.int32).tolist()]
        assert special <= set(rows)
        assert len({tuple(batch.operands["bias_E"].tolist()) for batch in batches}) == biases


def test_strided_rows_are_the_same_rows_with_nan_between_them() -> None:
    (batch,) = bulk(GLM.spec(Logits.BF16, "cpu"), CPU, batches=1, tokens=5)
    for view in (strided(batch.logits_TE), *odd_strides(batch.logits_TE).values()):
        assert view.equal(batch.logits_TE)
        assert view.stride() != batch.logits_TE.stride()
    assert strided(batch.logits_TE)._base[:, batch.logits_TE.shape[1] :].isnan().all()  # type: ignore[index]


def test_bulk_takes_every_distribution_under_several_biases() -> None:
    spec = GLM.spec(Logits.FP32, "cpu")
    batches = list(bulk(spec, CPU, batches=8, tokens=64))
    spreads = [round(batch.logits_TE.std().item(), 2) for batch in batches]
    assert spreads[:4] == pytest.approx([1.5, 0.02, 8, 1.5], rel=0.1)
    assert batches[3].logits_TE.equal(batches[3].logits_TE.bfloat16().float())
    assert len({round(batch.operands["bias_E"].abs().mean().item(), 4) for batch in batches}) > 4


@pytest.mark.parametrize(
    "change",
    [{"scale": 1.9}, {"slot_order": SlotOrder.SORTED}, {"has_bias": False}],
    ids=lambda change: next(iter(change)),
)
def test_another_router_is_counted_as_wrong(change: dict[str, Any]) -> None:
    spec = GLM.spec(Logits.FP32, "cpu")
    other, tally = dataclasses.replace(spec, **change), Tally(CPU)
    for batch in bulk(spec, CPU, batches=2, tokens=50):
        expected = EagerOracle(spec=spec)(batch.logits_TE, bias_E=batch.bias_E, expert_scale_E=None)
        found = route(batch.logits_TE, other, **(batch.operands if other.has_bias else {}))
        tally.add(found, expected.ids_TK, expected.weights_TK)
    count = tally.count()
    assert count.tokens == 100
    assert count.weights_rows_wrong > 40
    assert (count.ids_rows_wrong > 10) is ("scale" not in change)


def test_ids_and_weights_are_counted_apart() -> None:
    ids_TK, weights_TK = torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.rand(3, 2)
    wrong_TK = weights_TK.clone()
    wrong_TK[1, 0] = torch.nextafter(wrong_TK[1, 0], torch.tensor(2.0))
    tally = Tally(CPU)
    tally.add(Assignment(expert_ids_TK=ids_TK.flip(1).int(), weights_TK=weights_TK), ids_TK, weights_TK)
    assert tally.count() == Count(tokens=3, ids_rows_wrong=3)
    tally.add(Assignment(expert_ids_TK=ids_TK.int(), weights_TK=wrong_TK), ids_TK, weights_TK)
    tally.add(Assignment(expert_ids_TK=ids_TK.int(), weights_TK=weights_TK.double()), ids_TK, weights_TK)
    assert tally.count() == Count(tokens=9, ids_rows_wrong=3, weights_rows_wrong=4)
    assert not tally.count().is_clean
    assert not Count().is_clean


def test_memory_that_nobody_wrote_shows() -> None:
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.empty(3, dtype=torch.int32).eq(torch.iinfo(torch.int32).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_functions_counts_and_padding_are_compared_as_well() -> None:
    spec = GLM.spec(Logits.FP32, "cpu")
    assert all(count == Count(tokens=60) for count in bits.with_functions(spec, CPU, tokens=60).values())
    assert bits.counts_and_padding(spec, CPU, tokens=60) == Count(tokens=60)
    assert bits.at_odd_strides(spec, CPU, sizes=(33,)).is_clean


def released(logits: Tensor, topk: int, **flags: Any) -> tuple[Tensor, Tensor]:
    """Stands for Megatron-Core's function: its sigmoid without groups."""
    assert (flags["score_function"], flags["num_groups"], flags["use_pre_softmax"]) == ("sigmoid", None, True)
    scores = torch.sigmoid(logits.float()).type_as(logits)
    ids = torch.topk(scores + flags["expert_bias"], k=topk, dim=1)[1]
    scores = scores.gather(1, ids).type_as(logits)
    weights = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20) * flags["scaling_factor"]
    chosen = torch.zeros_like(logits).int().scatter(1, ids, 1).bool()
    return torch.zeros_like(logits).scatter(1, ids, weights), chosen


@pytest.mark.parametrize("setting", megatron_function.SETTINGS)
def test_megatrons_function_is_asked_with_the_flags_of_the_router(setting: str) -> None:
    (moonlight,) = models.named(["Moonlight"])
    assert moonlight in megatron_function.known(MODELS)
    spec = megatron_function.spec_of(moonlight, setting, "cpu")
    assert spec.gate.output_dtype == megatron_function.SETTINGS[setting]
    count = megatron_function.compared(released, spec, CPU, batches=2, tokens=30)
    assert count == Count(tokens=2 * (30 + len(families(spec))))
    other = dataclasses.replace(spec, scale=1.0)
    assert not megatron_function.compared(
        lambda *given, **flags: released(*given, **{**flags, "scaling_factor": 2.446}), other, CPU, batches=1, tokens=9
    ).is_clean


def counting_clock(seen: list[int]) -> Callable[[Callable[[int], object], int], float]:
    """Runs what it is to time, once or twice, and makes the times up."""

    def clock(call: Callable[[int], object], calls: int) -> float:
        for index in {0, calls - 1}:
            call(index)
        seen.append(calls)
        return float(len(seen))

    return clock


class Rival:
    """Routes as eager PyTorch does, in other slots, and weighs as it is told."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def call(
        self, spec: RouterSpec, logits_TE: Tensor, bias_E: Tensor | None
    ) -> Callable[[], tuple[Tensor, Tensor]] | None:
        if bias_E is None:
            return None

        def answer() -> tuple[Tensor, Tensor]:
            found = EagerOracle(spec=spec)(logits_TE, bias_E=bias_E, expert_scale_E=None)
            return found.ids_TK.int().flip(1), found.weights_TK.flip(1) * self.factor

        return answer


@pytest.mark.parametrize(("factor", "wrong"), [(1.0, 0), (1.5, 6)])
def test_the_race_times_every_path_and_says_what_the_rival_weighs_otherwise(factor: float, wrong: int) -> None:
    seen: list[int] = []
    race = Race(device=CPU, rival=Rival(factor), clock=counting_clock(seen), tokens=(2, 6), rotated_tokens=(6,))
    column = Column(name="groups", spec=sigmoid(64, GroupSpec(count=2, kept=1)))
    times = race.times(column)
    assert list(times.ours) == list(times.rival) == list(times.eager) == [2, 6]
    assert list(times.ours_rotated) == list(times.rival_rotated) == [6]
    assert len(seen) == 2 * 3 * 3 + 2
    assert times.rival_rows_otherwise == {"rows": 6, "other_experts": 0, "other_weights": wrong}
    alone = race.times(Column(name="softmax", spec=softmax(64)))
    assert (alone.rival, alone.rival_rows_otherwise) == ({}, {})
    table = tables.speed_table([times, alone])
    assert [line.split()[0] for line in table.splitlines()] == ["us", "groups", "softmax", "ours/rival/eager"]
    assert f"{wrong:,} other" in tables.rival_table([times, alone])


def test_slower_than_the_rival_is_marked() -> None:
    times = Race(device=CPU, rival=Rival(1.0), clock=lambda call, calls: 3.0, tokens=(1,), rotated_tokens=()).times(
        Column(name="sigmoid", spec=sigmoid(32))
    )
    assert "3.00/3.00/3.00*" in tables.speed_table([times])
    times.rival[1] = 3.5
    assert "3.00/3.50/3.00" in tables.speed_table([times])
    assert "*" not in tables.speed_table([times]).splitlines()[1]


@pytest.mark.parametrize("way", Way)
def test_every_way_of_calling_runs_and_none_but_the_fused_one_has_a_rival(way: Way) -> None:
    spec = dataclasses.replace(sigmoid(16), top_k=4)
    logits_TE, bias_E = operands(spec, 3, 0, CPU)
    column = Column(name=str(way), spec=spec, way=way)
    if way is not Way.FUNCTION:  # which goes by the device, and there is no GPU
        found = column.call(logits_TE, bias_E)()
        assert isinstance(found, Assignment)
        assert found.weights_TK.sum(dim=1).tolist() == pytest.approx([2.5] * 3)
        race = Race(device=CPU, rival=Rival(1.0), clock=lambda call, calls: 1.0, tokens=(1,), rotated_tokens=())
        assert bool(race.times(column).rival) is (way is Way.FUSED)


def test_the_table_has_each_kind_of_router_at_each_size() -> None:
    assert [(c.spec.num_experts, str(c.spec.score), c.spec.groups is not None) for c in COLUMNS] == [
        (128, "softmax", False),
        (128, "sigmoid", False),
        (160, "softmax", False),
        (160, "sigmoid", False),
        (256, "softmax", False),
        (256, "sigmoid", False),
        (256, "sigmoid", True),
    ]
    assert {column.spec.top_k for column in COLUMNS} == {8}
    assert len({column.name for column in (*COLUMNS, *MORE_COLUMNS)}) == len(COLUMNS) + len(MORE_COLUMNS)


def test_the_floor_reads_every_logit_and_writes_every_slot() -> None:
    race = Race(device=CPU, rival=None, clock=counting_clock([]), tokens=(64,), rotated_tokens=(64,), floor_tokens=64)
    floors = race.floors()
    table = tables.floor_table([race.times(Column(name="softmax", spec=softmax(128)))], floors).splitlines()
    assert [line.split()[0] for line in table] == ["empty", "E=128:", "softmax", "E=160:", "E=256:"]
    assert floors.tokens == 64
    assert list(floors.moving) == list(floors.moving_rotated) == [128, 160, 256]
    logits_TE = torch.randn(64, 160, generator=torch.Generator().manual_seed(0))
    largest_TK = logits_TE.amax(dim=1, keepdim=True).expand(64, 8)
    for shape in kernel_floor.SHAPES:
        ids_TK, weights_TK = torch.zeros(64, 8, dtype=torch.int32), torch.zeros(64, 8)
        kernel_floor.move_bytes(logits_TE, ids_TK, weights_TK, shape)
        assert weights_TK.equal(largest_TK.clamp(min=0))
        assert ids_TK.equal(weights_TK.view(torch.int32))


@pytest.mark.parametrize("kind", [Kind.FEW, Kind.ODD_FEW, Kind.CHOSEN_FEW, Kind.COUNTED_FEW])
def test_what_is_compiled_runs(kind: Kind) -> None:
    launch(GLM.spec(Logits.FP32, "cuda"), kind, CPU)


def test_kernels_that_the_compiler_cannot_tell_apart_are_compiled_once() -> None:
    (mixtral,) = models.named(["Mixtral"])
    (job,) = jobs_of(mixtral.spec(Logits.FP32, "cuda"), [Kind.MANY])
    same = dataclasses.replace(job, spec=transformers_modules.spec_of(mixtral, torch.float32, "cuda"))
    assert job.kernel == same.kernel
    others = [*jobs_of(mixtral.spec(Logits.BF16, "cuda"), [Kind.MANY]), dataclasses.replace(job, kind=Kind.PADDED)]
    assert job.kernel not in {other.kernel for other in others}


def test_the_report_is_json_in_lines_of_a_readable_length() -> None:
    report = {"a": [{"model": "m" * 30, "tokens": n, "share": None} for n in range(9)], "b": {1: 2.5}, "c": "x" * 200}
    lines = text(report).splitlines()
    assert json.loads("\n".join(lines)) == {**report, "b": {"1": 2.5}}
    assert all(len(line) <= WIDTH + 2 or "x" * 200 in line for line in lines)
    assert len(lines) == 9 + 6
