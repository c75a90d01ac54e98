"""README.md and NUMERICS.md say what the results say, name what exists, and hold snippets that run."""

import ast
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from readme_tables import DOCUMENTS, ROOT, TABLES, gate, main, placed, routing_speed, short, tables
from torch import Tensor
from torch.nn.functional import linear

from routing import Assignment, GroupSpec, ReduceKind, RouterSpec, SumOrder, TopkReduce, reference, reference_chosen
from routing.cuda_order import halving_sum
from routing.oracle import EagerOracle
from routing.orders import sequential_sum
from routing.trainers import TRAINERS

NUMERICS = (ROOT / "routing" / "NUMERICS.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")
TABLE = "a\n<!-- table: one -->\nold\n<!-- end of table -->\nz\n"
FP32, BF16 = torch.float32, torch.bfloat16
T, E, K = 4000, 128, 8
NEAR = 0.02
"""Another CPU's exponentials have other last bits."""


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_tables_in_the_documents_are_made_of_the_results(document: str) -> None:
    text = (ROOT / document).read_text("utf-8")
    assert text == placed(text, tables(ROOT / "results")), "run: python scripts/readme_tables.py --write"


def test_every_table_has_a_place() -> None:
    places = re.findall(r"<!-- table: (.*) -->", README + NUMERICS)
    assert sorted(places) == sorted(TABLES)


def test_writing_replaces_what_stands_between_the_markers_and_nothing_else(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "results", tmp_path / "results")
    (tmp_path / "routing").mkdir()
    for document in DOCUMENTS:
        text = (ROOT / document).read_text("utf-8")
        emptied = re.sub(r"(<!-- table: .*? -->\n).*?(<!-- end)", r"\1other\n\2", text, flags=re.DOTALL)
        assert emptied != text
        (tmp_path / document).write_text(emptied, "utf-8")
    assert main(["--write"], tmp_path) == 0
    for document in DOCUMENTS:
        assert (tmp_path / document).read_text("utf-8") == (ROOT / document).read_text("utf-8")


def test_without_write_the_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(made in printed for made in tables(ROOT / "results").values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TABLE.replace("one", "won"), "no table is called 'won'; known: one"),
        (TABLE.replace("<!-- end of table -->", ""), "1 tables begin and 0 end"),
    ],
)
def test_a_marker_that_fits_nothing_is_refused(text: str, message: str) -> None:
    assert placed(TABLE, {"one": "new\n"}) == TABLE.replace("old\n", "\nnew\n\n")
    with pytest.raises(ValueError, match=message):
        placed(text, {"one": "new\n"})


def test_a_cell_in_which_the_rival_is_not_slower_is_bold_and_one_without_a_rival_is_ours_alone() -> None:
    def column(name: str, **more: Any) -> dict[str, Any]:
        times = {"ours": {"1": 2.0, "64": 30.0}, "eager": {"1": 9.0, "64": 1234.0}}
        return {"name": name, **times, **more}

    others = {"rows": 64, "other_experts": 0, "other_weights": 16}
    raced = column("raced", rival={"1": 2.0, "64": 31.0}, rival_rows_otherwise=others)
    lines = routing_speed({"speed": {"columns": [raced, column("alone")]}}).splitlines()
    assert lines[0] == "| router | 1 | 64 | eager, 64 | vLLM's other rows |"
    assert lines[2:] == [
        "| raced | 2.00 / **2.00** | 30.0 / 31.0 | 1,234 | 25.00% |",
        "| alone | 2.00 | 30.0 | 1,234 |  |",
    ]


def test_a_gate_has_the_smallest_and_the_largest_shape_and_says_from_when_on_it_is_equal() -> None:
    def row(E: int, D: int, least: int | None, **us: float) -> dict[str, Any]:
        return {
            "variant": "bf16", "experts": E, "hidden": D, "us": us,
            "torch_us": {T: 2 * time for T, time in us.items()}, "equal_from_tokens": least,
        }  # fmt: skip

    rows = [row(8, 64, 1, **{"1": 1.0, "64": 3.0}), row(8, 128, 1, **{"1": 9.0}), row(16, 128, None, **{"1": 2.0})]
    lines = gate({"device": "D", "torch": "2", "triton": "3", "commit": "abc", "rows": rows}).splitlines()
    assert lines[0] == "| gate | E x D | 1 | 64 | PyTorch's bits |"
    assert lines[2:] == [
        "| bf16 | 8 x 64 | 1.00 / 2.00 | 3.00 / 6.00 | from 1 tokens on |",
        "| bf16 | 16 x 128 | 2.00 / 4.00 |  | not in batches of any size |",
        "",
        "D, PyTorch 2, Triton 3; commit `abc`.",
    ]


def test_what_is_not_measured_yet_is_said(tmp_path: Path) -> None:
    assert tables(tmp_path)["gate"] == "`results/gate.json` is not there yet.\n"


def test_numbers_have_three_digits() -> None:
    assert [short(number) for number in (0.5, 9.994, 9.996, 99.94, 99.96, 1234.4)] == [
        "0.50", "9.99", "10.0", "99.9", "100", "1,234",
    ]  # fmt: skip


def test_the_readme_and_the_page_name_every_trainer_and_no_other() -> None:
    sections = (README.partition("## Name your trainer")[2], NUMERICS.partition("## 8. Trainers")[2])
    for section in sections:
        rows = re.findall(r"^\| (`[^|]*) \|", section.partition("\n## ")[0], flags=re.MULTILINE)
        names = {name for row in rows for name in re.findall(r"`(\w+)`", row)} - {"trainer"}
        assert names == set(TRAINERS)


def test_the_tests_and_files_that_the_page_names_exist() -> None:
    tests = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    named = set(re.findall(r"`(test_\w+)`", NUMERICS))
    assert len(named) > 20
    assert named <= tests
    files = set(re.findall(r"`([\w/]+\.(?:py|json))`", NUMERICS)) - {f"results/{file}" for file, _ in TABLES.values()}
    assert [file for file in files if not ((ROOT / "routing" / file).exists() or (ROOT / file).exists())] == []


def test_the_tree_in_the_readme_names_what_is_there() -> None:
    tree = README.partition("## The house")[2].partition("```")[2].partition("```")[0]
    folder = Path()
    for line in filter(None, tree.splitlines()):
        names = re.split(r" {2,}", line.strip(), maxsplit=1)[0].split(", ")
        folder = Path(names[0]) if not line.startswith(" ") else folder
        for name in names:
            place = ROOT / folder / name if line.startswith(" ") else ROOT / name
            pattern = place.name if place.suffix or name.endswith(("/", "*")) else f"{place.name}.py"
            assert list(place.parent.glob(pattern)), line


@pytest.mark.parametrize("text", [README, NUMERICS], ids=["README", "NUMERICS"])
def test_every_snippet_is_python(text: str) -> None:
    found = list(snippets(text, "python"))
    assert found
    for snippet in found:
        ast.parse(snippet)


def test_the_snippet_that_holds_a_router_against_ours_counts_wrong_rows() -> None:
    names: dict[str, Any] = {}
    exec(next(snippets(NUMERICS, "python")), names)
    config = {"model_type": "glm4_moe", "n_routed_experts": 32, "num_experts_per_tok": 4, "routed_scaling_factor": 2.5}
    spec = RouterSpec.from_trainer("transformers", config, platform="cpu")

    def trainers(logits_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        stages = EagerOracle(spec=spec)(logits_TE, bias_E=bias_E, expert_scale_E=None)
        return stages.ids_TK, stages.weights_TK

    def scaled(logits_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        ids_TK, weights_TK = trainers(logits_TE, bias_E)
        return ids_TK, weights_TK * 1.5

    assert names["wrong_rows"](trainers, spec, tokens=500) == (0, 0)
    ids, weights = names["wrong_rows"](scaled, spec, tokens=500)
    assert ids == 0 < weights


def test_the_router_that_the_page_spells_out_is_a_router() -> None:
    fields = yaml.safe_load(next(snippets(NUMERICS, "yaml")))["trainer"]
    spec = RouterSpec.from_plain({**fields, "platform": "cuda"})
    assert spec.reduce == TopkReduce(kind=ReduceKind.SUM_EPS, eps=1e-20)
    assert (spec.gate.operand_dtype, spec.gate.output_dtype) == (BF16, FP32)


def test_the_shares_of_numerics_are_those_of_the_written_out_orders() -> None:
    rows = NUMERICS.partition("## 4. ")[2].partition("\n## ")[0].splitlines()
    written = [line.strip("| ").split(" | ") for line in rows if line.startswith("|")][2:]
    found = list(shares())
    assert [row[0] for row in written] == [name for name, _ in found]
    for (name, *texts), (_, numbers) in zip(written, found, strict=True):
        assert [float(text.rstrip("% |")) / 100 for text in texts] == pytest.approx(numbers, abs=NEAR), name


def shares() -> Iterator[tuple[str, list[float]]]:
    """What is compared -> the parts of rows with other experts, and with the same and other weights."""
    random = torch.Generator().manual_seed(0)
    logits_TE, bias_E = torch.randn(T, E, generator=random) * 1.5, torch.randn(E, generator=random) * 0.05
    hidden_TD, weight_ED = torch.randn(T, 2048, generator=random), torch.randn(E, 2048, generator=random) * 0.02
    size = {"num_experts": E, "n_routed_experts": E, "num_experts_per_tok": K, "norm_topk_prob": True}
    glm_config = {**size, "model_type": "glm4_moe", "routed_scaling_factor": 2.5}
    qwen_config = {**size, "model_type": "qwen3_moe"}

    def of(trainer: str, config: dict[str, object], dtype: torch.dtype = FP32) -> RouterSpec:
        return RouterSpec.from_trainer(trainer, config, dtype=dtype, platform="cuda", gate="trainer")

    def routed(spec: RouterSpec, logits_TE: Tensor = logits_TE, bias_E: Tensor = bias_E) -> Assignment:
        return reference(logits_TE.to(spec.gate.output_dtype), spec, bias_E=bias_E if spec.has_bias else None)

    def in_bf16(spec: RouterSpec) -> Assignment:
        return routed(replace(spec, weight_dtype=BF16))

    def weighed(weights_TK: Tensor) -> Assignment:
        return Assignment(expert_ids_TK=chosen.expert_ids_TK, weights_TK=weights_TK)

    def masked(value: float) -> Assignment:
        return routed(replace(glm, groups=GroupSpec(count=8, kept=4, mask_value=value)), bias_E=bias_E - 1)

    def product(dtype: torch.dtype) -> Assignment:
        return routed(qwen, linear(hidden_TD.to(BF16).to(dtype), weight_ED.to(BF16).to(dtype)))

    glm, qwen, qwen_in_megatron = (
        of("transformers", glm_config),
        of("transformers", qwen_config),
        of("megatron_router_fp32", qwen_config),
    )
    adjacent = replace(glm, sum_order=SumOrder.ADJACENT)
    large_eps = replace(glm, reduce=TopkReduce(kind=ReduceKind.SUM_EPS, eps=1e-6))
    rounding = [routed(of(name, glm_config, BF16)) for name in ("megatron_fp32_chain", "megatron")]
    wide = [routed(of(name, glm_config)) for name in ("megatron_router_fp32", "megatron_router_fp64")]
    chosen = reference_chosen(logits_TE, glm, bias_E=bias_E)
    s, b = chosen.scores_TK, bias_E[chosen.expert_ids_TK.long()]
    total, back = halving_sum(s) + 1e-20, (s + b) - b
    same, in_a_row = "the same two, weights rounded to bf16", s / (sequential_sum(s) + 1e-20) * 2.5
    had_back = back / (halving_sum(back) + 1e-20) * 2.5
    for name, one, other in (
        (
            "Qwen in transformers; in Megatron with fp32 logits: softmax over the chosen",
            routed(qwen),
            routed(qwen_in_megatron),
        ),
        (same, in_bf16(qwen), in_bf16(qwen_in_megatron)),
        ("Qwen in transformers; in torchtitan: unsorted slots", routed(qwen), routed(of("torchtitan", qwen_config))),
        ("Qwen in transformers; in prime-rl: + 1e-20", routed(qwen), routed(of("prime_rl", qwen_config))),
        ("GLM in transformers; in prime-rl: sorted slots", routed(glm), routed(of("prime_rl", glm_config))),
        ("GLM in Megatron, bf16 logits, fp32 chain; as released, bf16 chain", *rounding),
        ("GLM in Megatron, router in fp32; in fp64", *wide),
        ("slots added by halving; adjacent ones first", routed(glm), routed(adjacent)),
        (same, in_bf16(glm), in_bf16(adjacent)),
        ("slots added by halving; one after another", routed(glm), weighed(in_a_row)),
        ("divided; multiplied by the reciprocal", routed(glm), weighed(s * (1 / total) * 2.5)),
        ("scaled after the division; before it", routed(glm), weighed(s * 2.5 / total)),
        ("scores gathered; had back as (s + b) - b", routed(glm), weighed(had_back)),
        ("eps 1e-20; 1e-6", routed(glm), routed(large_eps)),
        ("bias in fp32; rounded to bf16", routed(glm), routed(glm, bias_E=bias_E.to(BF16).float())),
        ("8 groups, 4 kept, biases near -1: masked with -inf; with 0", masked(-torch.inf), masked(0.0)),
        ("Qwen, D = 2,048: fp32 product; bf16 product", product(FP32), product(BF16)),
    ):
        yield name, compared(one, other)
    best = logits_TE.to(BF16).topk(K + 1).values
    tied = float((best[:, K - 1] == best[:, K]).double().mean())
    yield "bf16 logits: which of two equal ones is chosen (most it can be)", [tied]


def compared(one: Assignment, other: Assignment) -> list[float]:
    (ids, w), (other_ids, other_w) = (
        [x.gather(1, found.expert_ids_TK.long().argsort(dim=1)) for x in (found.expert_ids_TK, found.weights_TK)]
        for found in (one, other)
    )
    moved = (ids != other_ids).any(dim=1)
    weighed_otherwise = ~moved & (w != other_w.to(w.dtype)).any(dim=1)
    return [float(part.double().mean()) for part in (moved, weighed_otherwise)]


def snippets(text: str, language: str) -> Iterator[str]:
    return iter(re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))


def test_results_are_json_of_a_device_and_a_commit() -> None:
    for path in (ROOT / "results").glob("*.json"):
        found = json.loads(path.read_text("utf-8"))
        assert found["device"], path
        assert found["commit"], path
