"""A long run: random updates, kills, requests in three modes; every completion is replayed, every leak is found."""

import os
import random
import signal
import threading
import time
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

from replay import agreement
from torch import Tensor

from ordeal.arena import arena_config
from ordeal.content import Content
from ordeal.processes import Spoken
from ordeal.resources import Held, growth, held
from ordeal.table import PHASES
from rollout import Completion, Fleet, HostDied, Prompt, SamplingParams
from rollout.model.hosted import HostedModel
from weights.version import WeightVersion

HOSTS = 2
KILL_EVERY_S = (9.0, 18.0)
SAMPLE_S = 0.5
TOLERANCE = 1e-5
GROWTH = 0.02
MODES = ("keep", "recompute", "abort")
KEPT_VERSIONS = 4


class Weights(OrderedDict[WeightVersion, dict[str, Tensor]]):
    """Version -> tensors, drawn again from the seed of whoever published them; the latest few are kept."""

    def __init__(self, content: Content) -> None:
        super().__init__()
        self._content = content
        self.seeds: dict[WeightVersion, int] = {}

    def __missing__(self, version: WeightVersion) -> dict[str, Tensor]:
        self[version] = tensors = self._content.tensors(self.seeds[version])
        if len(self) > KEPT_VERSIONS:
            self.popitem(last=False)
        return tensors


class Soak:
    """One run. `faults` names everything that was not as promised."""

    def __init__(self, workspace: Path, seconds: float, seed: int) -> None:
        self.seconds = seconds
        self.config = arena_config(workspace, f"soak-{os.getpid()}", hosts=HOSTS)
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self.samples: list[Held] = []
        self._random = random.Random(seed)
        content = Content(Path(self.config.model))
        self._content = content
        self._weights = Weights(content)
        self._order_of: dict[WeightVersion, int] = {}
        self._scratch = HostedModel.load(self.config.model, device="cpu")
        self._learners = Spoken("ordeal.learner", self.config.model)
        self._learners.event("ready")
        self._over = threading.Event()

    def run(self) -> dict[str, Any]:
        """What was done and found, for one line of JSON."""
        try:
            with Fleet.launch(self.config) as fleet:
                self._know(fleet.status().version, None)
                self._began_s = time.monotonic()
                threads = [
                    threading.Thread(target=self._guarded, args=(work, fleet))
                    for work in (self._learn, self._kill, self._sample)
                ]
                for thread in threads:
                    thread.start()
                try:
                    while time.monotonic() - self._began_s < self.seconds and not self.faults:
                        self._request(fleet)
                finally:
                    self._over.set()
                    for thread in threads:
                        thread.join()
        finally:
            self._learners.end()
        return self._account()

    def _guarded(self, work: Any, fleet: Fleet) -> None:
        try:
            work(fleet)
        except Exception as error:  # a thread's edge: what stopped it is a finding
            self.faults.append(f"{work.__name__}: {type(error).__name__}: {error}")

    def _learn(self, fleet: Fleet) -> None:
        """Learner after learner, each with a run of its own; a third of them are killed on the way."""
        order = 0
        choice = random.Random(self._random.random())
        while not self._over.is_set():
            order += 1
            phase = choice.choice(list(PHASES)) if choice.random() < 1 / 3 else None
            run = f"soak-{order}"
            self._know(self._content.version(run, 1, order), order)
            self._learners.tell(order=order, fleet=fleet.name, run=run, seed=order, step=1, phase=phase, blow="SIGKILL")
            event = self._learners.event("published", "failed", "killed", order=order)
            self.counts[f"updates {event['event']}"] += 1
            self._over.wait(choice.uniform(0.05, 0.8))

    def _know(self, version: WeightVersion | None, order: int | None) -> None:
        assert version is not None
        self._order_of[version] = 0 if order is None else order
        if order is None:
            self._weights[version] = dict(self._content._template)
        else:
            self._weights.seeds[version] = order

    def _kill(self, fleet: Fleet) -> None:
        """A host is killed or frozen, again and again."""
        choice = random.Random(self._random.random())
        while not self._over.wait(choice.uniform(*KILL_EVERY_S)):
            alive = [host.process for host in fleet.status().hosts if host.process]
            if alive:
                os.kill(choice.choice(alive), choice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]))
                self.counts["kills"] += 1

    def _sample(self, fleet: Fleet) -> None:
        """What driver, hosts and learners hold, whenever all hosts are there."""
        while not self._over.wait(SAMPLE_S):
            status = fleet.status()
            if all(host.version is not None for host in status.hosts):
                processes = [os.getpid(), self._learners.popen.pid, *(host.process for host in status.hosts)]
                found = held(processes, time.monotonic() - self._began_s)
                if found is not None:
                    self.samples.append(found)

    def _request(self, fleet: Fleet) -> None:
        """One call of generate, and the judgement on all that comes of it."""
        mode = self._random.choice(MODES)
        wanted = {(f"p{index}", sample) for index in range(8) for sample in range(2)}
        params = SamplingParams(
            n=2, max_tokens=self._random.randint(5, 55), ignore_eos=True, at_commit=mode, record_routing=True
        )
        answered: list[Completion] = []
        lost: set[tuple[str, int]] = set()
        try:
            prompts = [Prompt(id=f"p{index}", token_ids=(1, 2, index % 8)) for index in range(8)]
            for completion in fleet.generate(prompts, params):
                answered.append(completion)
        except HostDied as error:
            lost = set(error.request_ids)
        except TimeoutError as error:  # a frozen host took nothing: told by name, and submitted again next time
            self.counts["calls that met a frozen host"] += 1
            if "to take prompts" not in str(error):
                self.faults.append(f"generate: {error}")
            return
        ids = Counter((completion.prompt_id, completion.sample) for completion in answered)
        if set(ids) | lost != wanted or set(ids) & lost or set(ids.values()) - {1}:
            self.faults.append(f"requests: {wanted - set(ids) - lost} unanswered, {ids} answered, {lost} lost")
        self.counts["lost"] += len(lost)
        for completion in answered:
            self._judge(completion)
            self.counts[f"completions {mode}"] += 1

    def _judge(self, completion: Completion) -> None:
        """Its log-probabilities come out again from the versions it names, and those never go backwards."""
        orders = [self._order_of[span.version] for span in completion.version_spans]
        if orders != sorted(orders):
            self.faults.append(f"{completion.prompt_id}: versions go backwards: {completion.version_spans}")
        self.counts["completions over several versions"] += len(orders) > 1
        apart, skipped = agreement(completion, self._scratch, self._weights)
        self.counts["tokens compared"] += len(apart)
        self.counts["tokens after a near tie"] += skipped
        if max(apart, default=0.0) > TOLERANCE:
            self.faults.append(f"{completion.prompt_id} of {completion.host_id}: {max(apart):.2e} off its replay")

    def _account(self) -> dict[str, Any]:
        grown = {}
        whole = time.monotonic() - self._began_s >= self.seconds  # else a fault ended it: nothing to compare
        for what in ("memory_mib", "descriptors", "segments") if whole else ():
            second, last = growth(self.samples, self.seconds, what)
            grown[what] = [round(second, 1), round(last, 1)]
            if last > second * (1 + GROWTH):
                self.faults.append(f"{what}: {second} in the second tenth, {last} in the last")
        if whole and self.counts["kills"] < self.seconds // 20:
            self.faults.append(f"only {self.counts['kills']} kills")
        return {"seconds": self.seconds, **dict(sorted(self.counts.items())), **grown, "faults": self.faults[:20]}
