"""The process that launched a fleet is killed or frozen; nothing is left behind and nobody is blamed."""

from pathlib import Path

import pytest
from ordeal.driver_faults import strike_driver
from ordeal.table import DRIVER_CELLS, Cell

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("cell", DRIVER_CELLS, ids=str)
def test_hosts_end_with_their_driver_and_outlast_its_naps(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(tmp_path / "run"))
    verdict = strike_driver(cell, tmp_path)
    assert cell.allows(verdict.after)
    assert verdict.seconds <= verdict.limit_s
