"""Processes and disks fail at every phase of an update; no host ever serves anything but one whole version."""

from collections.abc import Iterator

import pytest
from ordeal.arena import Arena
from ordeal.table import DRIVER_CELLS, PROCESS_CELLS, Cell

pytestmark = pytest.mark.ray

IN_ONE_FLEET = [cell for cell in PROCESS_CELLS if cell not in DRIVER_CELLS]


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        with Arena(tmp_path_factory.mktemp("arena"), "arena") as arena:
            yield arena


@pytest.mark.parametrize("cell", IN_ONE_FLEET, ids=str)
def test_after_a_fault_every_host_is_whole_and_the_next_update_succeeds(arena: Arena, cell: Cell) -> None:
    verdict = arena.run(cell)
    assert cell.allows(verdict.after)
    assert verdict.seconds <= verdict.limit_s
