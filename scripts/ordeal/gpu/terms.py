"""Terms: what all processes of one fleet agree on."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from weights.delivery import Delivery
from weights.rendezvous import Roster, RosterHost, socket_path

SIBLING_S = 1.0
"""How long a host waits for a sibling's answer; it asks again until its silence is over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """Plain data: it crosses to the processes."""

    fleet: str
    workspace: str
    transport: str
    hosts: tuple[str, ...]
    host_devices: tuple[str, ...]
    learner_device: str
    bucket_bytes: int
    message_s: float = 1.5
    silence_s: float = 2.0

    @property
    def on_cpu(self) -> bool:
        return self.learner_device == "cpu"

    def device_of(self, host: str) -> torch.device:
        return torch.device(self.host_devices[self.hosts.index(host)])

    def roster(self, delivery: Delivery) -> Roster:
        """For updates that are delivered so."""
        self.enter()
        return Roster(
            name=self.fleet,
            transport=self.transport,
            backend="gloo" if self.on_cpu else "nccl",
            shadow=delivery is Delivery.SHADOW,
            hosts=tuple(RosterHost(id=host, address=socket_path(self.fleet, host)) for host in self.hosts),
            bucket_bytes=self.bucket_bytes,
            deadline_s=self.message_s,
            silence_s=self.silence_s,
        )

    def enter(self) -> None:
        """From here on this process finds the fleet."""
        os.environ["MOE_ROLLOUT_RUNTIME_DIR"] = self.workspace

    def patient(self, seconds: float) -> "Terms":
        """The same with longer deadlines."""
        return replace(self, message_s=seconds, silence_s=2 * seconds)

    @property
    def folder(self) -> Path:
        return Path(self.workspace)
