"""All hosts of a run: places actors, balances prompts over them, tells a learner where they are.

A trainer launches it; another process of the same Ray cluster connects to it by name. Only the launcher owns it: it
starts lost hosts again, and its shutdown (or its end) ends them all.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray

from rollout.actor import NAMESPACE, Placement, ask
from rollout.balance import Rotation
from rollout.config import RolloutConfig
from rollout.discovery import Discovery, introduction_of
from rollout.errors import FleetNotFound
from rollout.hosting import uses_gpu
from rollout.member import Stage
from rollout.prospect import prospect_of
from rollout.reaper import Reaper
from rollout.request import Prompt, SamplingParams, Score
from rollout.roll_call import roll_call
from rollout.scoring import score_over
from rollout.statement import statement
from rollout.status import FleetStatus
from rollout.stream import CompletionStream
from rollout.supervisor import Supervisor
from rollout.upkeep import Upkeep
from rollout.whereabouts import Whereabouts, sweep_whereabouts
from weights.digest import Digest
from weights.rendezvous import remove_roster, socket_path, sweep
from weights.version import WeightVersion

RAY_AUTH_MODE = "RAY_AUTH_MODE"
"""Ray's variable; a cluster that asks for its token turns everybody else away."""
CONNECT_S = 30.0
logger = logging.getLogger("rollout")


class Fleet:
    """The hosts of a run, from the trainer's side.

    Example:
        with Fleet.launch(RolloutConfig.from_yaml("rollout.yaml")) as fleet:
            for completion in fleet.generate(prompts, SamplingParams(n=8, max_tokens=512)):
                ...
    """

    def __init__(self, config: RolloutConfig, *, owns_ray: bool) -> None:
        self.config = config
        self.name = config.name
        self._owns_ray = owns_ray
        self._rotation = Rotation()
        self._upkeep: Upkeep | None = None
        """The launcher's; None in every other process."""
        self._placement = Placement(config, {})
        self._detached = False
        self._reaper: Reaper | None = None
        """Where this process started its own Ray."""
        self._discovery = Discovery(config.name, self._rotation, self._placement)
        """How a process that only connected knows the hosts; the launcher has its supervisor."""
        self._closed = False

    @classmethod
    def launch(cls, config: RolloutConfig, *, detached: bool = False) -> Self:
        """Starts the hosts, waits until every one has loaded the checkpoint, and looks after them from then on.

        Uses the Ray that this process is connected to or RAY_ADDRESS names, else starts a local one and owns it.

        Args:
            config: the fleet.
            detached: the hosts outlive this process and its `shutdown`, until `end`; nobody starts a lost one again
                once this process is gone. Needs a Ray that outlives it too.

        Raises:
            ConfigError: the configuration and the environment contradict each other, or there is no such checkpoint.
            ValueError: the checkpoint cannot be hosted, or its routing cannot be matched; the message names what is
            in the way.
            CheckpointError: the checkpoint's files are missing, broken, or not what its config.json says.
            DeadlineExceeded: a host did not report in time.
        """
        prospect = prospect_of(config, os.environ)
        config = prospect.config
        for hint in prospect.hints:
            logger.warning(hint)
        for row in statement(config, prospect.spec, prospect.trainers, prospect.platform):
            logger.info("bits of %s: %s: %s", row.operation, row.verdict, row.why)
        swept = (*sweep(), *sweep_whereabouts())
        if swept:
            logger.info("removed what fleets that died had left: %s", ", ".join(swept))
        owns_ray = not ray.is_initialized()
        if owns_ray:
            address = os.environ.get("RAY_ADDRESS")
            extra: dict[str, Any] = {}
            if not address:
                extra = {"include_dashboard": False, "_metrics_export_port": config.metrics_port}
            ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR, **extra)
        fleet = cls(config, owns_ray=owns_ray)
        fleet._detached = detached
        if owns_ray and not os.environ.get("RAY_ADDRESS"):
            fleet._reaper = Reaper()
            fleet._reaper.watch_descendants()
        options: dict[str, Any] = {"num_gpus": config.gpus_per_host} if uses_gpu(config.device) else {"num_cpus": 0}
        if detached:
            options["lifetime"] = "detached"
        fleet._placement = Placement(config, options)
        fleet._upkeep = Upkeep(config, fleet._placement, fleet._rotation)
        supervisor = fleet._upkeep.supervisor
        try:
            supervisor.start_all()
            supervisor.await_all()
            introduced = [m.introduction for m in supervisor.members.values() if m.introduction is not None]
            for found in dict.fromkeys(row for introduction in introduced for row in introduction.bits):
                logger.info("bits of %s, as the hosts found them: %s: %s", found.operation, found.verdict, found.why)
            if fleet._reaper is not None:
                fleet._reaper.watch_descendants()  # again: Ray's agents come after it
            fleet._upkeep.begin(ray.get_runtime_context().gcs_address, os.environ.get(RAY_AUTH_MODE, ""))
        except BaseException:
            fleet.end()
            raise
        return fleet

    @classmethod
    def connect(cls, name: str) -> Self:
        """Finds a fleet that another process launched.

        Raises:
            FleetNotFound: no Ray cluster is running here, or none of its actors belongs to a fleet of this name.
            DeadlineExceeded: its hosts do not answer.
        """
        owns_ray = not ray.is_initialized()
        if owns_ray:
            try:
                ray.init(
                    address=_ray_address(name), namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR
                )
            except ConnectionError as error:
                raise FleetNotFound(
                    f"fleet {name!r}: no running Ray cluster found; launch the fleet first, or set RAY_ADDRESS"
                ) from error
        try:
            fleet = cls(introduction_of(name, CONNECT_S).config, owns_ray=owns_ray)
            fleet._discovery.await_host(CONNECT_S)
        except BaseException:
            if owns_ray:
                ray.shutdown()
            raise
        return fleet

    def generate(self, prompts: Iterable[Prompt], sampling: SamplingParams) -> CompletionStream:
        """Submits every prompt at once and returns the completions in the order in which they finish, n for each
        prompt.

        Raises:
            ValueError: two prompts share an id, or one can never run (too long, unknown tokens). Nothing runs then.
            QueueFull, VersionTooOld: a host does not take them now. Nothing runs then.
            DeadlineExceeded: no host takes work, and none came back in time; says where they are.
        """
        prompts = tuple(prompts)
        twice = sorted(name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1)
        if twice:
            raise ValueError(f"prompt ids must differ within one call; these come twice: {', '.join(twice[:10])}")
        stream = CompletionStream(self._rotation, self.config.deadlines, self._place)
        stream.submit([(prompt, sampling.seeded(int.from_bytes(os.urandom(8), "big") >> 1)) for prompt in prompts])
        return stream

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Score]:
        """Log-probabilities of given tokens under the present weights, in the order of `sequences`.

        A host that dies meanwhile is passed over: another one scores its share.

        Raises:
            ValueError: a sequence can never run.
            DeadlineExceeded: a host did not answer, or none takes work.
        """
        return score_over(self._rotation, self._place, sequences, self.config.deadlines.progress_s)

    def status(self) -> FleetStatus:
        """What every host is doing; one that is lost is listed with the reason."""
        members = {} if self._supervisor is None else self._supervisor.members
        hosts = roll_call(self._all_hosts(), members, self.config.deadlines.message_s)
        incidents = () if self._supervisor is None else tuple(self._supervisor.incidents)
        return FleetStatus(name=self.name, hosts=hosts, incidents=incidents)

    def verify(self) -> dict[str, tuple[WeightVersion | None, Digest]]:
        """For every host that serves: its version, and the digest of what it holds, recomputed.

        Raises:
            HostGone, DeadlineExceeded: a host does not answer.
        """
        if self._supervisor is None:
            self._discovery.look()
        refs = {host: actor.verify.remote() for host, actor in self._rotation.hosts().items()}
        deadline_s = self.config.deadlines.progress_s
        return {host: ask(ref, f"{host} to recompute its digest", deadline_s) for host, ref in refs.items()}

    def shutdown(self) -> None:
        """Ends the hosts (the launcher's fleet, unless detached) or the connection (everybody else's).

        Once more does nothing.
        """
        if self._supervisor is not None and not self._detached:
            self.end()
        self._leave()

    def end(self) -> None:
        """Ends the hosts, whoever launched them, and leaves."""
        if self._closed:
            return
        if self._upkeep is not None:
            self._upkeep.stop()
        if self.config.weights.transport is not None:
            remove_roster(self.name)
        actors = {host: actor for host, actor in self._all_hosts().items() if actor is not None}
        members = {} if self._supervisor is None else self._supervisor.members
        absent = {host for host, member in members.items() if member.stage is not Stage.SERVING}
        self._placement.stop(
            [actor for host, actor in actors.items() if host not in absent], self.config.deadlines.stop_s
        )
        for host, actor in actors.items():
            self._placement.end(actor, members[host].introduction if host in members else None)
        if self.config.weights.transport is not None:
            for host in actors:
                Path(socket_path(self.name, host)).unlink(missing_ok=True)
        self._leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _place(self, weights: Sequence[int]) -> list[tuple[str, Any]]:
        """A host that takes work, and its actor, for each item."""
        deadlines = self.config.deadlines
        if self._supervisor is None:
            self._discovery.await_host(deadlines.start_s)
            return self._rotation.place(weights, 0, self._absence)
        return self._rotation.place(weights, deadlines.start_s, self._absence)

    def _absence(self) -> str:
        return "its hosts are being started again" if self._supervisor is None else self._supervisor.absence()

    @property
    def _supervisor(self) -> Supervisor | None:
        return None if self._upkeep is None else self._upkeep.supervisor

    def _all_hosts(self) -> dict[str, Any]:
        """Every host that the configuration names -> its actor, None where it has none now."""
        if self._supervisor is not None:
            return {member.host_id: member.actor for member in self._supervisor.members.values()}
        self._discovery.look()
        return {f"host-{index}": self._discovery.actors.get(f"host-{index}") for index in range(self.config.hosts)}

    def _leave(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._upkeep is not None:
            self._upkeep.stop()
        for host in self._rotation.hosts():
            self._rotation.take_out(host)
        if self._owns_ray:
            ray.shutdown()
        if self._reaper is not None:
            self._reaper.dismiss()


def _ray_address(name: str) -> str:
    """Of the cluster that a fleet is in; Ray looks for one itself where that is not known."""
    known = Whereabouts.read(name)
    if known is None:
        return "auto"
    if known.ray_auth_mode and RAY_AUTH_MODE not in os.environ:
        # Ray follows a cluster that it finds itself, and not one that is named to it. It read the variable on import.
        os.environ[RAY_AUTH_MODE] = known.ray_auth_mode
        ray._raylet.Config.initialize("")
    return known.ray_address
