"""Upkeep: what the launcher of a fleet keeps running beside its hosts, from the launch to the end.

The supervisor that starts lost hosts again, the watch of a folder of steps, the metrics, and the file that says where
the fleet is.
"""

import logging
import os

from rollout.balance import Rotation
from rollout.config import RolloutConfig
from rollout.errors import StepNotTaken
from rollout.metrics import FleetMetrics, Observation
from rollout.placing import Placing
from rollout.supervisor import Supervisor
from rollout.watch import FolderWatch
from rollout.whereabouts import Whereabouts
from weights.report import PublishReport

logger = logging.getLogger("rollout")


class Upkeep:
    """Of one fleet.

    Args:
        config: the fleet's.
        placing: starts, calls and ends actors.
        rotation: who takes prompts; the supervisor keeps it right.
    """

    def __init__(self, config: RolloutConfig, placing: Placing, rotation: Rotation) -> None:
        self._config = config
        self.supervisor = Supervisor(config, placing, rotation, nobody_shares=self._publish_again)
        """Not watching before `begin`."""
        self._watch: FolderWatch | None = None
        self._observation: Observation | None = None
        self._whereabouts: Whereabouts | None = None

    def begin(self, ray_address: str, ray_auth_mode: str) -> None:
        """Looks after hosts that are up; others may find the fleet from now on, in this Ray cluster.

        Args:
            ray_address: of the cluster's head.
            ray_auth_mode: what RAY_AUTH_MODE is here.
        """
        supervisor, config = self.supervisor, self._config
        supervisor.watch()
        self._whereabouts = Whereabouts(
            name=config.name, ray_address=ray_address, ray_auth_mode=ray_auth_mode, launcher=os.getpid()
        )
        self._whereabouts.write()
        metrics = FleetMetrics(config.name)
        self._observation = Observation(
            lambda: metrics.observe({member.host_id: member.incarnation for member in supervisor.members.values()})
        )
        if config.weights.folder is not None:
            self._watch = FolderWatch(
                config.name,
                config.weights.folder,
                poll_s=config.weights.poll_s,
                on_update=_log_update,
                on_error=_log_error,
            ).start()

    def stop(self) -> None:
        """Ends all of it, and leaves the hosts as they are. Once more does nothing."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self.supervisor.stop()
        if self._observation is not None:
            self._observation.stop()
        if self._whereabouts is not None:
            self._whereabouts.remove()

    def _publish_again(self) -> None:
        """A host has no sibling to take its weights from: a watched folder has them still."""
        if self._watch is not None:
            self._watch.take_up_again()


def _log_update(report: PublishReport) -> None:
    logger.info("took up %s in %.1f s", report.version, report.seconds)


def _log_error(error: StepNotTaken) -> None:
    logger.warning("%s", error)
