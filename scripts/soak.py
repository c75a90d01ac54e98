"""Random updates, kills and requests for as long as you like; every completion is replayed, every leak is found.

python scripts/soak.py --minutes 30; the last line of output is JSON, and the exit status is 0 only without a fault.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the replay that judges is the tests' own

import torch  # noqa: E402
from ordeal.soak import Soak  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long to run (default 30)")
    parser.add_argument("--seconds", type=float, help="the same in seconds; at least 60")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random here")
    arguments = parser.parse_args()
    seconds = arguments.seconds if arguments.seconds is not None else 60 * arguments.minutes
    if not seconds >= 60:
        parser.error(f"a run takes at least 60 s, got {seconds:g}: its tenths are compared")
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(message)s")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with tempfile.TemporaryDirectory(prefix="soak-") as workspace:
        os.environ["MOE_ROLLOUT_RUNTIME_DIR"] = f"{workspace}/run"
        account = Soak(Path(workspace), seconds, arguments.seed).run()
    print(json.dumps(account))
    sys.exit(1 if account["faults"] else 0)


if __name__ == "__main__":
    main()
