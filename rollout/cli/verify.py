"""moe-rollout verify: recomputes the digest of what every host holds, and compares it with the version it serves."""

import argparse
from collections.abc import Mapping

from rollout.cli.connect import connect
from rollout.cli.terminal import show_json, show_table
from rollout.errors import RolloutError
from rollout.status import FleetStatus
from weights.digest import Digest
from weights.version import WeightVersion

COLUMNS = ("host", "version", "digest", "verdict")
NAME = "verify"
SUMMARY = "recompute the digest of what every host of a fleet holds"
DESCRIPTION = """\
Every host hashes its parameters as they are, and the result is held against the digest in the version that it serves.
Requests run on meanwhile; an update waits until it is done.

Exit status 1 where one differs, where a host serves nothing, or where hosts serve different versions."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument("name", metavar="NAME", help="of the fleet")
    parser.add_argument("--json", action="store_true", help="one line of JSON in place of a table")


def run(arguments: argparse.Namespace) -> int:
    """Shows a line per host; raises for those that are not what they should be."""
    with connect(arguments.name) as fleet:
        status, found = fleet.status(), fleet.verify()
    rows, wrong = judged(status, found)
    if arguments.json:
        show_json({"fleet": status.name, "hosts": [dict(zip(COLUMNS, row, strict=True)) for row in rows]})
    else:
        show_table(f"fleet {status.name}", COLUMNS, rows)
    if wrong:
        raise RolloutError(
            f"fleet {status.name} is not whole: {'; '.join(wrong)}. Publish again: a complete update heals every host"
        )
    return 0


def judged(
    status: FleetStatus, found: Mapping[str, tuple[WeightVersion | None, Digest]]
) -> tuple[list[tuple[str, str, str, str]], list[str]]:
    """A row of COLUMNS for each host, and what is wrong.

    Args:
        status: of the fleet.
        found: host -> the version that it serves, and the digest of what it holds.
    """
    rows, wrong = [], []
    for host in status.hosts:
        version, digest = found.get(host.host_id, (None, None))
        if version is None:
            verdict = f"serves nothing ({host.state})"
        elif version.digest != digest:
            verdict = f"DIFFERS: holds {digest}, its version says {version.digest}"
        else:
            verdict = "holds what it says"
        if version is None or version.digest != digest:
            wrong.append(f"{host.host_id} {verdict}")
        rows.append((host.host_id, "-" if version is None else str(version), str(digest or "-"), verdict))
    versions = sorted({row[1] for row in rows})
    if len(versions) > 1 and not wrong:
        wrong.append(f"hosts serve different versions: {', '.join(versions)}")
    return rows, wrong
