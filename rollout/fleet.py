"""All hosts of a run: places actors, balances prompts over them, tells a learner where they are.

A trainer launches it; another process of the same Ray cluster connects to it by name. Only the launcher owns it: its
shutdown (or its end) ends the hosts.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import ray

from rollout.actor import RemoteHost, ask
from rollout.balance import spread
from rollout.config import RolloutConfig, resolve_rl_mode
from rollout.errors import DeadlineExceeded, FleetNotFound, HostGone
from rollout.host import Introduction, uses_gpu
from rollout.request import Prompt, SamplingParams, Score
from rollout.status import FleetStatus, HostStatus
from rollout.stream import CompletionStream
from weights.rendezvous import Roster, RosterHost

NAMESPACE = "moe-rollout"
logger = logging.getLogger("rollout")


class Fleet:
    """The hosts of a run, from the trainer's side.

    Example:
        with Fleet.launch(RolloutConfig.from_yaml("rollout.yaml")) as fleet:
            for completion in fleet.generate(prompts, SamplingParams(n=8, max_tokens=512)):
                ...
    """

    def __init__(self, config: RolloutConfig, actors: dict[str, Any], *, owner: bool, owns_ray: bool) -> None:
        self.config = config
        self.name = config.name
        self._actors = actors
        self._owner = owner
        self._owns_ray = owns_ray
        self._roster: Roster | None = None
        self._loads = dict.fromkeys(actors, 0)

    @classmethod
    def launch(cls, config: RolloutConfig) -> Self:
        """Starts the hosts and waits until every one has loaded the checkpoint.

        Uses the Ray that this process is connected to or RAY_ADDRESS names, else starts a local one and owns it.

        Raises:
            ConfigError: the configuration and the environment contradict each other, or there is no such checkpoint.
            ValueError: the checkpoint cannot be hosted, or its routing cannot be matched; the message names what is
            in the way.
            DeadlineExceeded: a host did not report in time.
        """
        rl_mode, hints = resolve_rl_mode(config, os.environ)
        config = replace(config, rl_mode=rl_mode, model=os.path.abspath(config.model))
        for hint in hints:
            logger.warning(hint)
        owns_ray = not ray.is_initialized()
        if owns_ray:
            address = os.environ.get("RAY_ADDRESS")
            extra = {} if address else {"include_dashboard": False}
            ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR, **extra)
        options: dict[str, Any] = {"num_gpus": config.gpus_per_host} if uses_gpu(config.device) else {"num_cpus": 0}
        actors: dict[str, Any] = {}
        fleet = cls(config, actors, owner=True, owns_ray=owns_ray)
        try:
            for index in range(config.hosts):
                host_id = f"host-{index}"
                actors[host_id] = RemoteHost.options(
                    name=f"{config.name}/{host_id}", namespace=NAMESPACE, **options
                ).remote(config, host_id)
            fleet._loads = dict.fromkeys(actors, 0)
            introductions: list[Introduction] = fleet._ask_all(
                "start", awaited="hosts to load the checkpoint", deadline_s=config.deadlines.start_s
            )
            if config.weights.transport is not None:
                fleet._roster = roster_of(config, introductions)
                fleet._roster.write()
        except BaseException:
            fleet.shutdown()
            raise
        return fleet

    @classmethod
    def connect(cls, name: str) -> Self:
        """Finds a fleet that another process launched.

        Raises:
            FleetNotFound: no Ray cluster is running here, or none of its actors belongs to a fleet of this name.
        """
        owns_ray = not ray.is_initialized()
        if owns_ray:
            try:
                ray.init(address="auto", namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
            except ConnectionError as error:
                raise FleetNotFound(
                    f"fleet {name!r}: no running Ray cluster found; launch the fleet first, or set RAY_ADDRESS"
                ) from error
        named = ray.util.list_named_actors(all_namespaces=True)
        found = sorted(entry["name"] for entry in named if entry["namespace"] == NAMESPACE)
        mine = [full for full in found if full.rpartition("/")[0] == name]
        if not mine:
            others = sorted({full.rpartition("/")[0] for full in found})
            if owns_ray:
                ray.shutdown()
            raise FleetNotFound(f"no fleet {name!r} in this Ray cluster; fleets here: {', '.join(others) or 'none'}")
        actors = {full.rpartition("/")[2]: ray.get_actor(full, namespace=NAMESPACE) for full in mine}
        introduction: Introduction = ask(
            next(iter(actors.values())).introduce.remote(), "a host to introduce itself", 30.0
        )
        return cls(introduction.config, actors, owner=False, owns_ray=owns_ray)

    def generate(self, prompts: Iterable[Prompt], sampling: SamplingParams) -> CompletionStream:
        """Submits every prompt at once and returns the completions in the order in which they finish, n for each
        prompt.

        Raises:
            ValueError: two prompts share an id, or one can never run (too long, unknown tokens). Nothing runs then.
        """
        prompts = tuple(prompts)
        twice = sorted(name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1)
        if twice:
            raise ValueError(f"prompt ids must differ within one call; these come twice: {', '.join(twice[:10])}")
        hosts = spread(self._loads, [sampling.n] * len(prompts))
        batches: dict[str, list[tuple[Prompt, SamplingParams]]] = {}
        for prompt, host in zip(prompts, hosts, strict=True):
            seed = int.from_bytes(os.urandom(8), "big") >> 1
            batches.setdefault(host, []).append((prompt, sampling.seeded(seed)))
        stream = CompletionStream(self._actors, batches, self._loads, self.config.deadlines)
        stream.submit()
        return stream

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Score]:
        """Log-probabilities of given tokens under the present weights, in the order of `sequences`.

        Raises:
            ValueError: a sequence can never run.
        """
        hosts = spread(self._loads, [len(sequence) for sequence in sequences])
        by_host: dict[str, list[int]] = {}
        for index, host in enumerate(hosts):
            by_host.setdefault(host, []).append(index)
        deadline_s = self.config.deadlines.progress_s
        refs = {
            host: self._actors[host].score.remote([tuple(sequences[index]) for index in indices], deadline_s)
            for host, indices in by_host.items()
        }
        scores: dict[int, Score] = {}
        for host, indices in by_host.items():
            scores.update(zip(indices, ask(refs[host], f"{host} to score", deadline_s), strict=True))
        return [scores[index] for index in range(len(sequences))]

    def status(self) -> FleetStatus:
        """What every host is doing; a host that does not answer is listed as dead."""
        refs = {host: actor.status.remote() for host, actor in self._actors.items()}
        hosts = []
        for host, ref in refs.items():
            try:
                hosts.append(ask(ref, f"{host} to report", self.config.deadlines.message_s))
            except (HostGone, DeadlineExceeded) as error:
                hosts.append(_gone(host, str(error)))
        return FleetStatus(name=self.name, hosts=tuple(hosts))

    def shutdown(self) -> None:
        """Ends the hosts (the launcher's fleet) or the connection (everybody else's)."""
        if self._owner and self._actors:
            if self._roster is not None:
                self._roster.remove()
            refs = [actor.stop.remote() for actor in self._actors.values()]
            ray.wait(refs, num_returns=len(refs), timeout=self.config.deadlines.stop_s)
            for actor in self._actors.values():
                ray.kill(actor)
        self._actors = {}
        if self._owns_ray:
            ray.shutdown()
            self._owns_ray = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _ask_all(self, method: str, *args: Any, awaited: str = "", deadline_s: float | None = None) -> list[Any]:
        """The same call to every host; answers in the order of hosts."""
        wait_s = self.config.deadlines.message_s if deadline_s is None else deadline_s
        refs = [getattr(actor, method).remote(*args) for actor in self._actors.values()]
        answers: list[Any] = ask(refs, awaited or f"every host to answer {method}", wait_s)
        return answers


def roster_of(config: RolloutConfig, introductions: Sequence[Introduction]) -> Roster:
    """Where learners find the hosts, and on what terms."""
    assert config.weights.transport is not None
    return Roster(
        name=config.name,
        transport=config.weights.transport,
        hosts=tuple(
            RosterHost(id=entry.host_id, address=entry.address) for entry in introductions if entry.address is not None
        ),
        bucket_bytes=config.weights.bucket_mib << 20,
        deadline_s=config.deadlines.message_s,
        silence_s=config.deadlines.silence_s,
    )


def _gone(host_id: str, why: str) -> HostStatus:
    return HostStatus(
        host_id=host_id,
        state="dead",
        version=None,
        running=0,
        waiting=0,
        process=0,
        blocks_free=0,
        blocks=0,
        detail=why,
    )
