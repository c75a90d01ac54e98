"""Two minutes of updates, kills and requests at once: each token accounted for, nothing leaked."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.timeout(300)
def test_two_minutes_of_everything_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/soak.py", "--seconds", "120"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    account = json.loads(done.stdout.splitlines()[-1])
    assert account["kills"] >= 3
    assert account["completions over several versions"] > 0
    assert all(account[f"completions {mode}"] > 0 for mode in ("keep", "recompute", "abort"))
