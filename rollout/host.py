"""One replica of the model: an engine that generates and a receiver that takes fresh weights. The two walks cross here.

A token walks through `submit`, the engine's loop and the outbox. A tensor walks through the receiver, which asks this
host to pause, writes in place, verifies, and tells it the version that it now serves.
"""

import os
import socket
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from concurrent.futures import wait
from contextlib import ExitStack, contextmanager

import torch

from rollout.admission import Admission
from rollout.arrivals import keeps_shadow, reach_of
from rollout.config import RolloutConfig
from rollout.door import open_door
from rollout.engine import Engine
from rollout.engine.group import Group
from rollout.engine.loop import EngineLoop
from rollout.engine.sequence import Purpose, Sequence
from rollout.errors import DeadlineExceeded, HostFailed, VersionTooOld
from rollout.hosting import hosting_of, uses_gpu
from rollout.introduction import CHECKPOINT_RUN, Introduction
from rollout.model.decoder import Decoder
from rollout.model.end_of_sequence import end_of_sequence_ids
from rollout.model.hosted import HostedModel
from rollout.outbox import Outbox
from rollout.request import Completion, Prompt, SamplingParams, Score
from rollout.scores import Scores
from rollout.statement import certified_rows
from rollout.status import HostStatus
from rollout.totals import HostTotals
from rollout.updates import TimedReceiver, UpdateLog
from weights.digest import Digest
from weights.errors import DeadlineExceeded as PauseDeadlineExceeded
from weights.publisher import Publisher
from weights.rendezvous import RosterHost, socket_path
from weights.transports.shared_memory import OneHost
from weights.version import WeightVersion


class Host:
    """A replica of the model in this process; works without Ray.

    Args:
        config: the fleet's, rl_mode resolved.
        host_id: unique in the fleet.
        hold: serve nothing before the first commit. For a host that was started again while the fleet is past its
            checkpoint.

    Raises:
        ValueError: the checkpoint cannot be hosted, or its routing cannot be matched.
        CheckpointError: its files are missing, broken, or not what its config.json says.
    """

    def __init__(self, config: RolloutConfig, host_id: str, *, hold: bool = False) -> None:
        self.config = config
        self.host_id = host_id
        device = torch.device("cuda" if uses_gpu(config.device) else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(config.engine.cpu_threads)
        model = HostedModel.load(
            config.model, hosting=hosting_of(config, device), device=device, at_random=config.load == "random"
        )
        version = model.version(CHECKPOINT_RUN)
        engine = Engine(
            model,
            Decoder(model.spec, model.parameters),
            config.engine,
            eos_token_ids=end_of_sequence_ids(config.model),
            version=version,
            at_commit=config.weights.requests_in_flight,
        )
        self._loop = EngineLoop(engine, finished=self._finished, failed=self._failed)
        self._outbox = Outbox()
        self._scores = Scores()
        self._admission = Admission(host_id, config.engine.max_running + config.engine.max_waiting)
        self._failure = ""
        self._torn = "waits for the fleet's version" if hold else ""
        self._loop.serving = not hold
        self._updates = UpdateLog()
        self._receiver = TimedReceiver(
            self._updates,
            host=host_id,
            layout=model.layout,
            parameters=model.parameters,
            serving=self,
            version=None if hold else version,
            wire_dtypes=model.wire_dtypes,
            reach=reach_of(config, device),
            silence_s=config.deadlines.silence_s,
            delivery_s=config.deadlines.message_s,
        )
        self._door = open_door(config, self._receiver, on_gpu=device.type == "cuda")
        self.introduction = Introduction(
            host_id=host_id,
            config=config,
            version=None if hold else version,
            address=None if self._door is None else socket_path(config.name, host_id),
            process=os.getpid(),
            machine=socket.gethostname(),
            on_gpu=device.type == "cuda",
            shadow=keeps_shadow(config, sum(tensor.nbytes for tensor in model.parameters.values())),
            bits=certified_rows(config, model.certification.reports),
        )
        self._loop.start()

    def submit(self, client: str, prompts: Many[tuple[Prompt, SamplingParams]]) -> None:
        """Queues n samples of every prompt. Never waits for an update.

        Raises:
            ValueError: one of them can never run, or is not new; none is queued then, nor in the next two cases.
            VersionTooOld: a prompt is to be refused below a version that this host has not reached.
            QueueFull: more would wait than engine.max_waiting.
            HostFailed: the engine has stopped.
        """
        self._check_running()
        sequences = []
        for prompt, params in prompts:
            params = params.seeded(int.from_bytes(os.urandom(8), "big") >> 1)
            group = Group(params.n) if params.n > 1 else None
            sequences += [Sequence((client, prompt.id, n), prompt, params, group=group) for n in range(params.n)]
        for sequence in sequences:
            self._loop.engine.validate(sequence)
        self._check_versions(prompts)
        self._admission.take([sequence.key for sequence in sequences])
        self._outbox.open(client)
        self._loop.post(lambda engine: engine.add(*sequences))

    def collect(self, client: str, wait_s: float) -> list[Completion]:
        """What has finished for a client, waiting up to `wait_s` seconds for the first.

        Raises:
            HostFailed: the engine has stopped, and nothing is left to collect.
        """
        return self._outbox.collect(client, wait_s)

    def cancel(self, client: str, prompt_ids: Many[str]) -> None:
        """Ends these prompts of a client where they stand; they come back as aborted."""
        gone = {(client, prompt_id) for prompt_id in prompt_ids}
        self._loop.post(lambda engine: self._abort(engine, lambda sequence: sequence.key[:2] in gone))

    def close(self, client: str) -> None:
        """Ends everything of a client and forgets what it did not collect."""
        self._outbox.close(client)
        self._loop.post(lambda engine: self._abort(engine, lambda sequence: sequence.key[0] == client))

    def score(self, sequences: Many[tuple[int, ...]], deadline_s: float) -> list[Score]:
        """Log-probabilities of given tokens, each sequence under one version.

        Raises:
            ValueError: a sequence can never run.
            HostFailed: the engine has stopped.
            DeadlineExceeded: not done in time.
        """
        asked = self._scores.ask(sequences)
        try:
            for sequence in asked:
                self._loop.engine.validate(sequence)
        except ValueError:
            for sequence in asked:
                self._scores.drop(sequence)
            raise
        self._loop.post(lambda engine: engine.add(*asked))
        if wait(asked.values(), deadline_s).not_done:
            self._loop.post(lambda engine: self._abort(engine, lambda sequence: sequence in asked))
            raise DeadlineExceeded(f"{self.host_id} to score {len(asked)} sequences", deadline_s)
        return [future.result() for future in asked.values()]

    def status(self) -> HostStatus:
        """What the host is doing at this moment."""
        engine, scheduler = self._loop.engine, self._loop.engine.scheduler
        serves = not self._failure and not self._torn
        return HostStatus(
            host_id=self.host_id,
            state="failed" if self._failure else str(self._receiver.state),
            version=engine.version if serves else None,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            process=os.getpid(),
            blocks_free=scheduler.pool.free,
            blocks=scheduler.pool.count,
            detail=self._failure or self._torn,
            last_update=self._updates.last,
        )

    def totals(self) -> HostTotals:
        """What the host has done since it started."""
        engine, updates = self._loop.engine, self._updates
        return HostTotals(
            tokens_by_version=dict(engine.counts.tokens_by_version),
            prompt_tokens=engine.counts.prompt_tokens,
            prefix_tokens=engine.scheduler.prefix_tokens,
            preemptions=engine.scheduler.preemptions,
            finished=dict(engine.counts.finished),
            updates=updates.committed,
            update_records=tuple(updates.records),
            updates_refused=updates.refused,
            updates_called_off=updates.called_off,
            torn=updates.torn,
        )

    def verify(self) -> tuple[WeightVersion | None, Digest]:
        """The version that the host serves, and the digest of what its parameters hold, worked out anew."""
        return self._receiver.version, self._receiver.live_digest()

    def share(self, host_id: str, address: str) -> WeightVersion:
        """Brings a sibling to the very version that this host serves, from this host's parameters.

        Raises:
            UpdateAborted: this host has no version, took another while it shared, or the sibling refused.
            CommitIncomplete: the sibling is torn.
        """
        version, tensors = self._receiver.content()
        sibling = OneHost(RosterHost(id=host_id, address=address))
        deadlines, weights = self.config.deadlines, self.config.weights
        with Publisher(
            sibling,
            run=version.run,
            deadline_s=deadlines.message_s,
            bucket_bytes=weights.bucket_mib << 20,
            is_sibling=True,
        ) as publisher:
            return publisher.publish(tensors, step=version.step, digest=version.digest).version

    def stop(self) -> None:
        """Ends the engine after its running step, and takes no more updates.

        Raises:
            DeadlineExceeded: the step did not end in time.
        """
        try:
            if self._door is not None:
                self._door.close(self.config.deadlines.stop_s)
        except PauseDeadlineExceeded as error:
            raise DeadlineExceeded(f"its weight updates to end: {error}", self.config.deadlines.stop_s) from error
        finally:
            self._loop.stop(self.config.deadlines.stop_s)

    # What the receiver asks of its host (weights.serving.Serving).

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No engine step runs inside."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self._loop.paused(self.config.deadlines.pause_s))
            except DeadlineExceeded as error:
                raise PauseDeadlineExceeded(str(error)) from error
            yield

    def committed(self, version: WeightVersion) -> None:
        """Inside the pause: the parameters hold this version, verified."""
        for sequence in self._loop.engine.commit(version):
            self._finished(sequence)
        self._loop.serving = True
        self._torn = ""

    def torn(self, reason: str) -> None:
        """Serve nothing until the next commit: the parameters hold a mixture, or the siblings may hold others.

        Inside the pause or, where none can be had or is needed, without one: it never waits.
        """
        self._loop.serving = False
        self._torn = reason
        self._updates.torn += 1

    # What the engine's thread reports.

    def _finished(self, sequence: Sequence) -> None:
        if sequence.purpose is Purpose.SCORE:
            self._scores.answer(sequence)
        else:
            self._admission.finish(sequence.key)
            self._outbox.put(sequence.key[0], sequence.completion(self.host_id))

    def _check_versions(self, prompts: Many[tuple[Prompt, SamplingParams]]) -> None:
        version = self._loop.engine.version
        late = [
            f"{prompt.id} wants {params.min_version}"
            for prompt, params in prompts
            if params.below_min_version == "refuse" and not params.may_begin_under(version)
        ]
        if late:
            raise VersionTooOld(f"{self.host_id} serves {version}; " + "; ".join(late[:10]))

    def _check_running(self) -> None:
        if self._failure:
            raise HostFailed(self._failure)

    def _abort(self, engine: Engine, chosen: Callable[[Sequence], bool]) -> None:
        for sequence in engine.cancel(chosen):
            if sequence.purpose is Purpose.GENERATE:
                self._finished(sequence)
            else:
                self._scores.drop(sequence)

    def _failed(self, traceback: str) -> None:
        self._failure = traceback
        self._outbox.fail(traceback)
        self._scores.fail(traceback)
