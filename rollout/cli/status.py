"""moe-rollout status: hosts, versions, states, and the last update of a running fleet."""

import argparse
import time

from rollout.cli.connect import connect
from rollout.cli.terminal import show, show_json, show_table
from rollout.errors import FleetNotFound
from rollout.status import FleetStatus, HostStatus
from rollout.updates import UpdateRecord
from rollout.whereabouts import fleets_here

NAME = "status"
SUMMARY = "show the hosts, versions and states of running fleets"
DESCRIPTION = """\
Shows what every host of a fleet is doing. Without a name: all fleets that were launched on this machine.

Exit status 1 where a host serves nothing or hosts serve different versions."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="of the fleet; all of this machine unless said")
    parser.add_argument("--json", action="store_true", help="one line of JSON per fleet in place of tables")


def run(arguments: argparse.Namespace) -> int:
    """Shows one fleet after the other."""
    names = fleets_here() if arguments.name is None else (arguments.name,)
    if not names:
        raise FleetNotFound("no fleet runs on this machine; start one with moe-rollout launch CONFIG")
    healthy = True
    for name in names:
        with connect(name) as fleet:
            found = fleet.status()
        if arguments.json:
            show_json(plain(found))
        else:
            show_fleet(found)
        healthy &= found.version is not None
    return 0 if healthy else 1


def show_fleet(status: FleetStatus) -> None:
    """A table of its hosts, and a line each for what stands out."""
    serving = sum(host.version is not None for host in status.hosts)
    whole = "hosts serve different versions" if serving == len(status.hosts) else f"{serving} of them serve"
    state = f"all serve {status.version}" if status.version is not None else whole
    columns = ("host", "state", "version", "running", "waiting", "KV blocks in use", "process")
    show_table(f"fleet {status.name}: {len(status.hosts)} hosts, {state}", columns, [_cells(h) for h in status.hosts])
    for host in status.hosts:
        if host.last_update is not None:
            show(f"{host.host_id}: last update {_update(host.last_update)}")
        if host.detail:
            show(f"{host.host_id}: {host.detail.strip().splitlines()[-1]}")


def plain(status: FleetStatus) -> dict[str, object]:
    """For JSON."""
    return {
        "fleet": status.name,
        "version": None if status.version is None else str(status.version),
        "hosts": [
            {
                "host": host.host_id,
                "state": host.state,
                "version": None if host.version is None else str(host.version),
                "running": host.running,
                "waiting": host.waiting,
                "blocks": host.blocks,
                "blocks_free": host.blocks_free,
                "process": host.process,
                "detail": host.detail,
                "last_update": None if host.last_update is None else host.last_update.plain,
            }
            for host in status.hosts
        ],
    }


def _cells(host: HostStatus) -> tuple[str, ...]:
    version = "-" if host.version is None else str(host.version)
    in_use = f"{host.blocks - host.blocks_free} of {host.blocks}"
    return host.host_id, host.state, version, str(host.running), str(host.waiting), in_use, str(host.process or "-")


def _update(update: UpdateRecord) -> str:
    ago_s = max(0.0, time.time() - update.at_s)
    ago = f"{ago_s:.0f} s" if ago_s < 120 else f"{ago_s / 60:.0f} min" if ago_s < 7200 else f"{ago_s / 3600:.0f} h"
    phases = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in update.phases.items())
    return (
        f"{ago} ago, {update.version}: {sum(update.phases.values()):.3f} s ({phases}), "
        f"requests paused for {update.pause_s:.3f} s"
    )
