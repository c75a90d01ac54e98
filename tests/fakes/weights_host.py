"""A host in a process of its own: `python -m fakes.weights_host FLEET HOST SILENCE_S TRANSPORT`, spoken to in JSON."""

import json
import os
import re
import sys
import time
from typing import Any

import torch
from fakes.weights_fleet import FakeHost, learner_state

from weights.rendezvous import socket_path
from weights.transports.nccl import WireReach
from weights.transports.server import HostServer
from weights.transports.shared_memory import siblings

WIRE_DEADLINE_S = 3.0


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def described(host: FakeHost, seeds: list[int]) -> dict[str, Any]:
    with open("/proc/self/maps") as maps, open("/proc/self/status") as status:
        return {
            "state": host.receiver.state,
            "serves": str(host.serving.serves),
            "holds": [seed for seed in seeds if host.holds(learner_state(seed))],
            "mapped": sum("moe-rollout-weights" in line for line in maps),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "resident_kib": int(re.findall(r"VmRSS:\s+(\d+)", status.read())[0]),
        }


def main(fleet: str, name: str, silence_s: str, transport: str) -> None:
    reach = WireReach(torch.device("cpu"), WIRE_DEADLINE_S) if transport == "nccl" else None
    host = FakeHost(name, silence_s=float(silence_s), clock=time.monotonic, reach=reach)
    with HostServer(
        host.receiver, socket_path(fleet, name), lambda: siblings(fleet, name, deadline_s=5.0), deadline_s=10.0
    ):
        say(event="ready")
        for line in sys.stdin:
            command = json.loads(line)
            say(event="described", **described(host, command["seeds"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
