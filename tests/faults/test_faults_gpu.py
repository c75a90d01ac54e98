"""Learners and hosts are struck at every phase of an update over cuda_ipc and nccl; here between CPUs, over shared
files and gloo, and a few on GPUs. `scripts/gpu_faults.py` takes all of them to GPUs.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ordeal.gpu.campaign import Found, run_cells
from ordeal.gpu.model import ON_CPU, ON_GPU, Model, checksum, same_bits
from ordeal.gpu.shortage import Shortage
from ordeal.gpu.steady import run_steady
from ordeal.gpu.stop import Stop, nth
from ordeal.gpu.table import CELLS, FREEZE, KILL, SPECIAL, Cell, Held, Kind, chosen
from ordeal.gpu.terms import Terms

LANES = 3
FROZEN = {cell for place, cell in enumerate(cell for cell in CELLS if cell.blow == FREEZE) if place % 2}
"""Left out here: each costs seconds of waiting."""
HERE = [cell for cell in CELLS if cell not in FROZEN]
ON_GPUS = [
    Cell(kind=Kind.LEASE, victim="learner", blow=KILL, phase="Vote sent", others=frozenset({Held.OLD}), released=True),
    *(cell for cell in SPECIAL if cell.kind is Kind.LEASE),
]


def terms(workspace: Path, transport: str, device: str, **deadlines: float) -> Terms:
    workspace.chmod(0o700)
    return Terms(
        fleet=transport,
        workspace=str(workspace),
        transport=transport,
        hosts=("host-0", "host-1"),
        host_devices=(device, device),
        learner_device=device,
        bucket_bytes=(ON_CPU if device == "cpu" else ON_GPU).bucket_bytes,
        **deadlines,
    )


def asked_for(request: pytest.FixtureRequest, test: str) -> list[Cell]:
    """The cells of this session's tests of that name, which is fewer where a user chose some."""
    return [
        item.callspec.params["cell"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test and item.path == request.path
    ]


def found_in(workspace: Path, cells: list[Cell], device: str, **deadlines: float) -> dict[Cell, Found]:
    found: dict[Cell, Found] = {}
    for transport in ("cuda_ipc", "nccl"):
        mine = [cell for cell in chosen(transport, 2) if cell in cells]
        if mine:
            lanes = min(LANES, len(mine))
            results, _ = run_cells(terms(workspace, transport, device, **deadlines), mine, lanes=lanes, told=_nobody)
            found |= {result.cell: result for result in results}
    return found


def _nobody(found: Found) -> None:
    """Pytest tells them one by one."""


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        workspace = tmp_path_factory.mktemp("run")
        patch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(workspace))
        yield workspace


@pytest.fixture(scope="module")
def on_cpus(request: pytest.FixtureRequest, runtime: Path) -> dict[Cell, Found]:
    cells = asked_for(request, "test_after_a_fault_nothing_wrong_is_served_and_the_next_update_succeeds")
    return found_in(runtime, cells, "cpu", silence_s=3.0)  # this machine may be busy with other tests


@pytest.fixture(scope="module")
def on_a_gpu(request: pytest.FixtureRequest, runtime: Path) -> dict[Cell, Found]:
    return found_in(runtime, asked_for(request, "test_on_a_gpu_a_fault_leaves_nothing_wrong"), "cuda:0")


@pytest.mark.parametrize("cell", HERE, ids=str)
def test_after_a_fault_nothing_wrong_is_served_and_the_next_update_succeeds(
    on_cpus: dict[Cell, Found], cell: Cell
) -> None:
    assert on_cpus[cell].fault == ""


@pytest.mark.gpu
@pytest.mark.parametrize("cell", ON_GPUS, ids=str)
def test_on_a_gpu_a_fault_leaves_nothing_wrong(on_a_gpu: dict[Cell, Found], cell: Cell) -> None:
    assert on_a_gpu[cell].fault == ""


def test_many_updates_in_a_row_hold_no_more_memory_and_descriptors_than_the_first(runtime: Path) -> None:
    found = run_steady(terms(runtime, "cuda_ipc", "cpu", silence_s=3.0), [Kind.LEASE, Kind.SLOTS], 60)
    assert [set(result.grown) - {"seconds"} for result in found] == [set(), set()]


def test_the_table_strikes_learner_and_host_by_both_signals_at_every_message_of_every_kind() -> None:
    assert max(Counter(CELLS).values()) == 1
    for kind in Kind:
        mine = [cell for cell in CELLS if cell.kind is kind]
        assert {(cell.victim, cell.blow) for cell in mine} >= {
            (victim, blow) for victim in ("learner", "host") for blow in (KILL, FREEZE)
        }
        kinds = {word for cell in mine for word in cell.phase.split()}
        messages = {"Vote", "Commit"} if kind is not Kind.SHADOW else {"Join", "Stage", "Vote", "Commit"}
        assert kinds >= messages | ({"Deliver", "Finish"} if kind in (Kind.SLOTS, Kind.STREAM) else set())
    assert len(chosen("cuda_ipc", 2)) >= 40
    assert len(chosen("nccl", 1)) >= 40


def test_a_single_host_meets_no_cell_of_two() -> None:
    assert not [cell for cell in chosen("nccl", 1) if "host 1" in cell.phase]
    assert [cell for cell in chosen("nccl", 2) if "host 1" in cell.phase]


def test_one_wrong_bit_shows_in_the_comparison_and_in_the_checksum_of_steps() -> None:
    model = Model(torch.device("cpu"))
    right, wrong = model.hosted(1), model.hosted(1)
    assert same_bits(right, wrong)
    assert checksum(right) == checksum(wrong)
    for name, tensor in wrong.items():
        flipped = tensor.reshape(-1).view(torch.int16)
        flipped[-1] ^= 1
        assert not same_bits(right, wrong), name
        assert checksum(right) != checksum(wrong), name
        flipped[-1] ^= 1
    assert same_bits(right, wrong)


def test_two_elements_that_change_places_show_in_the_checksum() -> None:
    model = Model(torch.device("cpu"))
    right, wrong = model.hosted(1), model.hosted(1)
    words = wrong["block"].reshape(-1).view(torch.int16)
    words[[0, 1]] = words[[1, 0]]
    assert words[0] != words[1]
    assert checksum(right) != checksum(wrong)


def test_versions_differ_in_every_tensor() -> None:
    model = Model(torch.device("cpu"))
    first, second = model.content(1), model.content(2)
    assert not [name for name in first if torch.equal(first[name].view(torch.int16), second[name].view(torch.int16))]
    assert not same_bits(model.storage(), model.hosted(1))


def test_a_blow_falls_once_and_only_where_it_is_armed() -> None:
    fallen: list[str] = []
    stop = Stop({"blow": lambda: fallen.append("blow")})
    stop.at("here")
    stop.arm("here", "blow")
    stop.at("there")
    assert fallen == []
    stop.at("here")
    stop.at("here")
    assert fallen == ["blow"]
    assert stop.phase is None


def test_buckets_are_named_by_their_place() -> None:
    assert [nth(part, 5) for part in range(5)] == ["first", "", "middle", "", "last"]
    assert nth(0, 1) == "first"


@pytest.mark.gpu
def test_a_shortage_leaves_no_byte_until_it_ends() -> None:
    shortage = Shortage(torch.device("cuda:0"))
    shortage.begin()
    try:
        for size in (1, 1 << 12, 1 << 21):
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(size, dtype=torch.uint8, device="cuda:0")
    finally:
        shortage.end()
    assert torch.ones(1 << 21, device="cuda:0").sum() == 1 << 21
