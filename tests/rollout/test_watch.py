"""A watched folder: its newest sound step is served by all hosts or none, and whatever is wrong is told once."""

import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import perturb_, qwen3_config, save, tiny_model
from fakes.weights_fleet import BUCKET_BYTES, FakeHost, learner_state
from torch import Tensor

from rollout.config import RolloutConfig
from rollout.errors import DeadlineExceeded, StepNotTaken
from rollout.host import Host
from rollout.request import Completion, Prompt, SamplingParams
from rollout.watch import FolderWatch
from weights.disk import StepFolder, step_name, write_step
from weights.errors import CommitIncomplete, FolderError, RosterError
from weights.publisher import Publisher
from weights.rendezvous import Roster, RosterHost, socket_path
from weights.report import PublishReport
from weights.state import State
from weights.transports.server import HostServer
from weights.transports.shared_memory import siblings
from weights.version import WeightVersion

FLEET = "fleet"
PATIENCE_S = 30.0


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Fleet:
    """Two hosts on real sockets, a folder, a watch on it that looks when it is told to, and what it said."""

    def __init__(self, directory: Path) -> None:
        self.folder = directory / "steps"
        self.hosts: dict[str, FakeHost] = {}
        self.servers: dict[str, HostServer] = {}
        Roster(
            name=FLEET,
            transport="shared_memory",
            hosts=tuple(RosterHost(id=host, address=socket_path(FLEET, host)) for host in "ab"),
            bucket_bytes=BUCKET_BYTES,
            deadline_s=PATIENCE_S,
            silence_s=2 * PATIENCE_S,
        ).write()
        for host in "ab":
            self.start(host)
        self.clock = Clock()
        self.updates: list[PublishReport] = []
        self.errors: list[StepNotTaken] = []
        self.watch = self.watching(FolderWatch)

    def watching(self, kind: type[FolderWatch]) -> FolderWatch:
        return kind(
            FLEET,
            self.folder,
            poll_s=1.0,
            on_update=self.updates.append,
            on_error=self.errors.append,
            clock=self.clock,
        )

    def start(self, host: str) -> None:
        """A host with fresh storage, in its place."""
        self.hosts[host] = FakeHost(host, silence_s=2 * PATIENCE_S, clock=time.monotonic)
        self.servers[host] = HostServer(
            self.hosts[host].receiver,
            socket_path(FLEET, host),
            lambda: siblings(FLEET, host, deadline_s=5.0),
            deadline_s=PATIENCE_S,
        )

    def write(self, step: int, *, seed: int | None = None, run: str = "run") -> WeightVersion:
        """A step of the weights of a seed; the step's number unless said."""
        return write_step(
            learner_state(step if seed is None else seed), self.folder, run=run, step=step, file_bytes=8192
        )

    def all_serve(self, version: WeightVersion, seed: int) -> bool:
        return all(host.serving.serves == version and host.holds(learner_state(seed)) for host in self.hosts.values())

    def untouched(self) -> bool:
        return all(
            host.serving.serves == host.initial and not host.serving.pauses and host.receiver.state is State.IDLE
            for host in self.hosts.values()
        )

    def told(self) -> list[str]:
        """What was told since it was last asked."""
        said = [str(error) for error in self.errors]
        self.errors.clear()
        return said


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_ROLLOUT_RUNTIME_DIR", f"{directory}/run")
        fleet = Fleet(Path(directory))
        yield fleet
        for server in fleet.servers.values():
            server.close()


def test_the_newest_step_is_served_by_all_hosts_under_the_label_that_it_was_written_with(fleet: Fleet) -> None:
    fleet.write(1)
    version = fleet.write(2)
    assert fleet.watch.look()
    assert fleet.all_serve(version, seed=2)
    assert [report.version for report in fleet.updates] == [version]
    assert set(fleet.updates[0].hosts) == {"a", "b"}
    assert not fleet.watch.look(), "it is served already"
    version = fleet.write(3)
    assert fleet.watch.look()
    assert fleet.all_serve(version, seed=3)
    assert [host.serving.pauses for host in fleet.hosts.values()] == [2, 2], "overtaken steps cost nothing"
    assert not fleet.errors


def test_a_step_that_comes_late_does_not_turn_the_fleet_back(fleet: Fleet) -> None:
    version = fleet.write(5)
    assert fleet.watch.look()
    fleet.write(4)
    shutil.rmtree(fleet.folder / step_name(5))
    assert not fleet.watch.look()
    assert fleet.all_serve(version, seed=5)
    assert not fleet.errors


def test_a_new_run_is_taken_up_at_a_lower_step(fleet: Fleet) -> None:
    fleet.write(50, run="first")
    assert fleet.watch.look()
    shutil.rmtree(fleet.folder)
    version = fleet.write(41, run="second")
    assert fleet.watch.look()
    assert fleet.all_serve(version, seed=41)


# Bad steps.


def edit(step: Path, old: str, new: str) -> None:
    text = (step / "version.yaml").read_text()
    assert old in text
    (step / "version.yaml").write_text(text.replace(old, new))


def corrupt(step: Path) -> None:
    file = step / "tensors-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


BREAK: dict[str, tuple[Callable[[Path], object], str]] = {
    "not a mapping": (lambda step: (step / "version.yaml").write_text("3"), "expected a mapping"),
    "no step": (lambda step: edit(step, "step: 2", "stp: 2"), "no step"),
    "another step": (lambda step: edit(step, "step: 2", "step: 3"), "is of step 3, which belongs into"),
    "no version.yaml": (lambda step: os.unlink(step / "version.yaml"), "cannot be opened"),
    "content of something else": (corrupt, "its tensors have digest"),
    "path out of the folder": (
        lambda step: edit(step, "tensors-00001", "../tensors-00001"),
        "is not the name of a .safetensors file in this folder",
    ),
    "a file gone": (lambda step: os.unlink(step / "tensors-00002.safetensors"), "cannot be opened"),
}


@pytest.mark.parametrize("how", BREAK)
def test_a_bad_step_is_told_once_and_no_host_hears_of_it(fleet: Fleet, how: str) -> None:
    breaks, says = BREAK[how]
    fleet.write(2)
    breaks(fleet.folder / step_name(2))
    for _ in range(3):
        assert not fleet.watch.look()
        fleet.clock.now += 1e6
    (told,) = fleet.told()
    assert told.startswith(f"{step_name(2)} is not sound, and is passed over; what was served serves on: ")
    assert says in told
    assert fleet.untouched()
    version = fleet.write(3)
    assert fleet.watch.look()
    assert fleet.all_serve(version, seed=3)
    assert fleet.told() == []


def test_the_newest_sound_step_is_taken_in_place_of_a_bad_one_and_the_bad_one_once_it_is_mended(fleet: Fleet) -> None:
    first = fleet.write(1)
    second = fleet.write(2)
    edit(fleet.folder / step_name(2), "step: 2", "step: two")
    assert fleet.watch.look()
    assert fleet.all_serve(first, seed=1)
    assert len(fleet.told()) == 1
    assert not fleet.watch.look()
    edit(fleet.folder / step_name(2), "step: two", "step: 2")
    assert fleet.watch.look()
    assert fleet.all_serve(second, seed=2)
    assert fleet.told() == []


def test_a_step_that_is_copied_in_file_by_file_is_taken_when_it_is_whole(fleet: Fleet) -> None:
    version = fleet.write(2)
    os.rename(fleet.folder / step_name(2), fleet.folder / "made")
    (fleet.folder / step_name(2)).mkdir()
    for file in sorted(os.listdir(fleet.folder / "made"), reverse=True):
        assert not fleet.watch.look()
        shutil.copy(fleet.folder / "made" / file, fleet.folder / step_name(2) / file)
    assert fleet.watch.look()
    assert fleet.all_serve(version, seed=2)
    assert all(step_name(2) in told for told in fleet.told())


def test_a_step_of_another_model_is_refused_by_name_and_tried_again_less_and_less_often(fleet: Fleet) -> None:
    tried: list[tuple[int, float]] = []

    class Counting(FolderWatch):
        def _tensors(self, step: StepFolder) -> Iterator[tuple[str, Tensor]]:
            tried.append((step.version.step, fleet.clock.now))
            return super()._tensors(step)

    first = fleet.write(1)
    other = learner_state(2)
    other["model.norm.wait"] = other.pop("model.norm.weight")
    write_step(other, fleet.folder, run="run", step=2)
    watch = fleet.watching(Counting)
    assert watch.look(), "the older one is sound"
    for second in range(1, 40):
        fleet.clock.now = float(second)
        assert not watch.look()
    assert tried == [(2, 0), (1, 0), (2, 2), (2, 6), (2, 14), (2, 30)]
    assert fleet.all_serve(first, seed=1)
    (told,) = fleet.told()
    for part in (step_name(2), "is tried again", "model.norm.wait", "model.norm.weight", "a:", "b:"):
        assert part in told
    third = fleet.write(3)
    assert watch.look(), "a newer step does not wait for it"
    assert fleet.all_serve(third, seed=3)


# The fleet's faults.


def test_with_one_host_out_of_reach_none_takes_the_step_and_all_do_when_it_is_back(fleet: Fleet) -> None:
    version = fleet.write(1)
    fleet.servers["b"].close()
    assert not fleet.watch.look()
    assert not fleet.watch.look()
    (told,) = fleet.told()
    assert "cannot connect to b" in told
    assert fleet.untouched()
    fleet.start("b")
    assert fleet.watch.look()
    assert fleet.all_serve(version, seed=1)
    assert fleet.told() == []


def test_a_publisher_that_is_there_already_is_named_and_waited_out(fleet: Fleet) -> None:
    version = fleet.write(1)
    with Publisher.connect(FLEET, run="other"):
        assert not fleet.watch.look()
        assert "has a publisher already, other" in fleet.told()[0]
    assert fleet.watch.look()
    assert fleet.all_serve(version, seed=1)
    with Publisher.connect(FLEET, run="other"):
        assert not fleet.watch.look(), "the watch holds no host between two updates"


def test_a_fleet_that_is_not_there_is_told_once(fleet: Fleet) -> None:
    fleet.write(1)
    Roster.read(FLEET).remove()
    assert not fleet.watch.look()
    assert not fleet.watch.look()
    (error,) = fleet.errors
    assert isinstance(error.__cause__, RosterError)


def test_a_commit_that_one_host_missed_is_made_whole_at_the_next_attempt(fleet: Fleet) -> None:
    fleet.write(1)
    assert fleet.watch.look()
    version = fleet.write(2)
    fleet.hosts["b"].serving.busy = True
    assert not fleet.watch.look()
    (error,) = fleet.errors
    assert isinstance(error.__cause__, CommitIncomplete)
    assert fleet.hosts["a"].serving.serves == version
    fleet.hosts["b"].serving.busy = False
    assert not fleet.watch.look(), "not at once"
    fleet.clock.now += 2.0
    assert fleet.watch.look()
    assert fleet.all_serve(version, seed=2)
    assert fleet.updates[-1].version == version


def test_a_host_that_lost_its_weights_has_them_again_from_the_folder(fleet: Fleet) -> None:
    version = fleet.write(2)
    assert fleet.watch.look()
    fleet.servers["b"].close()
    fleet.start("b")
    assert not fleet.watch.look()
    fleet.watch.take_up_again()
    assert fleet.watch.look()
    assert fleet.all_serve(version, seed=2)
    assert not fleet.watch.look(), "once"
    assert fleet.told() == []


# The folder's faults.


def test_a_folder_that_comes_late_vanishes_and_comes_back_is_told_once_each_time(fleet: Fleet) -> None:
    for _ in range(3):
        assert not fleet.watch.look()
    (told,) = fleet.told()
    assert told == f"{fleet.folder}: cannot be listed: No such file or directory; the watch waits for it"
    version = fleet.write(1)
    assert fleet.watch.look()
    shutil.rmtree(fleet.folder)
    for _ in range(3):
        assert not fleet.watch.look()
    assert len(fleet.told()) == 1
    assert fleet.all_serve(version, seed=1)
    version = fleet.write(2)
    assert fleet.watch.look()
    assert fleet.all_serve(version, seed=2)
    assert fleet.told() == []


def test_a_folder_that_vanishes_while_a_step_is_read_leaves_every_host_as_it_was(fleet: Fleet) -> None:
    class Vanishing(FolderWatch):
        def _tensors(self, step: StepFolder) -> Iterator[tuple[str, Tensor]]:
            for index, pair in enumerate(super()._tensors(step)):
                if index == 3:
                    shutil.rmtree(self.folder)
                yield pair

    fleet.write(1)
    watch = fleet.watching(Vanishing)
    assert not watch.look()
    (error,) = fleet.errors
    assert isinstance(error.__cause__, FolderError)
    assert "No such file" in str(error)
    assert fleet.untouched()


def test_content_that_changes_while_it_is_read_is_never_offered(fleet: Fleet) -> None:
    class Changing(FolderWatch):
        def _tensors(self, step: StepFolder) -> Iterator[tuple[str, Tensor]]:
            corrupt(step.path)
            yield from super()._tensors(step)

    fleet.write(1)
    assert not fleet.watching(Changing).look()
    assert "its tensors have digest" in fleet.told()[0]
    assert fleet.untouched()


# The thread.


def started(fleet: Fleet, kind: type[FolderWatch] = FolderWatch) -> tuple[FolderWatch, "queue.Queue[object]"]:
    said: queue.Queue[object] = queue.Queue()
    watch = kind(FLEET, fleet.folder, poll_s=0.01, on_update=said.put, on_error=said.put)
    return watch.start(), said


def test_it_takes_up_what_a_learner_writes_while_it_runs(fleet: Fleet) -> None:
    watch, said = started(fleet)
    with_error = said.get(timeout=PATIENCE_S)
    assert isinstance(with_error, StepNotTaken), "the folder is not there yet"
    for step in range(1, 6):
        version = fleet.write(step)
        report = said.get(timeout=PATIENCE_S)
        assert isinstance(report, PublishReport)
        assert report.version == version
    assert watch.alive
    watch.close()
    assert not watch.alive
    assert fleet.all_serve(version, seed=5)
    assert said.empty()


class Gated(FolderWatch):
    """Stops at the first tensor of a step."""

    reading = threading.Event()
    go_on = threading.Event()

    def _tensors(self, step: StepFolder) -> Iterator[tuple[str, Tensor]]:
        self.reading.set()
        assert self.go_on.wait(PATIENCE_S)
        yield from super()._tensors(step)


def test_closed_while_it_reads_a_step_it_drops_it_and_says_when_it_cannot_end(fleet: Fleet) -> None:
    fleet.write(1)
    watch, said = started(fleet, Gated)
    assert Gated.reading.wait(PATIENCE_S)
    with pytest.raises(DeadlineExceeded, match=r"waited 0\.05 s for the update from .*steps to end"):
        watch.close(0.05)
    Gated.go_on.set()
    watch.close()
    assert not watch.alive
    assert said.empty()
    assert fleet.untouched()


def test_a_watch_that_never_started_closes(fleet: Fleet) -> None:
    fleet.watch.close()
    with pytest.raises(ValueError, match=r"poll_s: got 0, must be above 0"):
        FolderWatch(FLEET, fleet.folder, poll_s=0, on_update=print, on_error=print)


# With engines.


def test_hosts_that_generate_take_a_step_from_disk_and_a_bad_one_changes_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(tmp_path / "run"))
    learner = tiny_model(qwen3_config(), 1)
    config = RolloutConfig.from_mapping(
        {
            "name": FLEET,
            "model": str(save(learner, tmp_path / "checkpoint")),
            "rl_mode": True,
            "engine": {"max_context": 64, "max_running": 4},
            "weights": {"transport": "disk", "folder": str(tmp_path / "steps")},
        }
    )
    hosts = [Host(config, f"host-{index}") for index in range(2)]
    try:
        addresses = [(host.host_id, host.introduction.address) for host in hosts]
        Roster(
            name=FLEET,
            transport="shared_memory",
            hosts=tuple(RosterHost(id=name, address=address) for name, address in addresses if address is not None),
        ).write()
        told: list[object] = []
        assert config.weights.folder is not None
        watch = FolderWatch(FLEET, config.weights.folder, on_update=told.append, on_error=told.append)
        at_start = [greedy(host) for host in hosts]
        perturb_(learner, 2)
        version = write_step(learner, tmp_path / "steps", run="learner", step=1)
        assert watch.look()
        after = [greedy(host) for host in hosts]
        assert [c.version_spans[-1].version for c in after] == [version, version]
        assert after[0].token_ids == after[1].token_ids != at_start[0].token_ids
        perturb_(learner, 3)
        write_step(learner, tmp_path / "steps", run="learner", step=2)
        edit(tmp_path / "steps" / step_name(2), "digest: ", "digest: 0")
        assert not watch.look()
        assert isinstance(told[-1], StepNotTaken)
        again = [greedy(host) for host in hosts]
        assert [(c.version_spans, c.token_ids) for c in again] == [(c.version_spans, c.token_ids) for c in after]
    finally:
        for host in hosts:
            host.stop()


def greedy(host: Host) -> Completion:
    host.submit("me", [(Prompt(id="p", token_ids=(1, 2, 3)), SamplingParams(max_tokens=12, temperature=0.0, seed=1))])
    (completion,) = host.collect("me", PATIENCE_S)
    return completion
