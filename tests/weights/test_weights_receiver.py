"""The receiver's state machine as a table, and what a commit may leave behind."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from fakes.weights_fleet import BUCKET_BYTES, TIED, FakeHost, FakeServing, layout, learner_state, offer_of, storage
from fakes.weights_reach import ProcessMemory

from weights.delivery import Delivery
from weights.digest import Digest
from weights.errors import DeadlineExceeded, PeerGone, RosterError
from weights.gather import Gathered, SegmentPool, gather
from weights.lease import SlotTerms
from weights.messages import (
    PROTOCOL,
    Abort,
    Aborted,
    Answer,
    Ask,
    Begun,
    Commit,
    Committed,
    Deliver,
    Delivered,
    Finish,
    Hello,
    Join,
    Joined,
    Offered,
    Refused,
    Reply,
    Request,
    Stage,
    Staged,
    Vote,
    Voted,
    Welcome,
)
from weights.naming import HostedLayout, Whole
from weights.receiver import Receiver
from weights.state import Intent, Outcome, State
from weights.transports.memory import MemorySegment, MemoryTransport, SimulatedClock
from weights.version import WeightVersion

GONE, SILENT = "gone", "silent"


class OneAnswer:
    """A sibling that gives one answer, or is gone, or cannot be reached."""

    def __init__(self, host: str, outcome: Outcome | str) -> None:
        self.host = host
        self.outcome = outcome
        self.heard: list[Intent] = []

    def ask(self, question: Ask) -> Answer:
        self.heard.append(question.intent)
        if self.outcome == GONE:
            raise PeerGone(f"cannot connect to {self.host}")
        if self.outcome == SILENT:
            raise DeadlineExceeded(f"{self.host} did not answer")
        return Answer(sequence=1, update=question.update, host=self.host, outcome=Outcome(self.outcome))


class Driver:
    """Speaks the protocol to one host, step by step."""

    def __init__(self) -> None:
        self.clock = SimulatedClock()
        self.memory = ProcessMemory()
        self.host = FakeHost("a", silence_s=30.0, clock=self.clock, reach=self.memory)
        self.gathered = self.gather(1)
        self.delivery = Delivery.SEGMENTS
        self.slots = [self.memory.buffer(BUCKET_BYTES, torch.device("cpu")) for _ in range(2)]

    def gather(self, seed: int) -> Gathered:
        pool = SegmentPool(MemoryTransport({}, self.clock, silence_s=30.0), BUCKET_BYTES)
        return gather(learner_state(seed), TIED, pool, BUCKET_BYTES)

    def say(self, request: Request, segment: torch.Tensor | None = None) -> Reply:
        return self.host.receiver.handle(request, segment)

    def offer(self, update: str = "u", *, step: int = 1, run: str = "run", base: Digest | None = None) -> Reply:
        offer = offer_of(self.gathered.manifest, update=update, run=run, step=step, base=base, delivery=self.delivery)
        return self.say(offer)

    def stage(self, bucket: int, update: str = "u") -> Reply:
        return self.say(Stage(sequence=3, update=update, bucket=bucket), self.gathered.segments[bucket].data)

    def stage_all(self, update: str = "u") -> None:
        for bucket in range(len(self.gathered.segments)):
            assert isinstance(self.stage(bucket, update), Staged)

    def vote(self, update: str = "u") -> Reply:
        return self.say(Vote(sequence=4, update=update))

    def commit(self, update: str = "u") -> Reply:
        return self.say(Commit(sequence=5, update=update))

    def join(self) -> Reply:
        slots = SlotTerms("slots", tuple(slot.memory for slot in self.slots))
        return self.say(Join(sequence=2, wire=None, slots=slots))

    def deliver(self, bucket: int, update: str = "u") -> Reply:
        self.slots[bucket % 2].data.copy_(self.gathered.segments[bucket].data)
        return self.say(Deliver(sequence=5, update=update, bucket=bucket))

    def finish(self, update: str = "u") -> Reply:
        return self.say(Finish(sequence=6, update=update))

    def abort(self, update: str = "u") -> Reply:
        return self.say(Abort(sequence=6, update=update, reason="test"))

    def ask(self, intent: Intent, update: str = "u") -> Outcome:
        reply = self.say(Ask(sequence=1, update=update, asker="b", intent=intent))
        assert isinstance(reply, Answer)
        return reply.outcome

    def damage(self) -> None:
        """A copy that does not arrive: the staged bytes change between the vote and the commit."""
        self.gathered.segments[0].data[0] ^= 1

    def reach(self, state: str) -> "Driver":
        """Brings the host into a state: idle, offered, staged, held, committed, torn, or torn-offered; or, where the
        update is streamed: begun, delivering (one bucket), or delivered (all).
        """
        if state in ("begun", "delivering", "delivered"):
            self.delivery = Delivery.STREAM
            assert isinstance(self.join(), Joined)
            assert isinstance(self.offer(), Offered)
            assert isinstance(self.vote(), Voted)
            assert isinstance(self.commit(), Begun)
            last = {"begun": 0, "delivering": 1, "delivered": len(self.gathered.segments)}[state]
            for bucket in range(last):
                assert isinstance(self.deliver(bucket), Delivered)
        if state.startswith("torn"):
            self.offer("t")
            self.stage_all("t")
            self.vote("t")
            self.damage()
            assert isinstance(self.commit("t"), Refused)
            self.gathered = self.gather(1)
        if state in ("offered", "torn-offered", "staged", "held", "committed"):
            assert isinstance(self.offer(), Offered)
        if state in ("staged", "held", "committed"):
            self.stage_all()
            assert isinstance(self.vote(), Voted)
        if state == "held":
            assert self.ask(Intent.HOLD) is Outcome.VOTED
        if state == "committed":
            assert isinstance(self.commit(), Committed)
        return self


REQUESTS: dict[str, Callable[[Driver], Reply]] = {
    "hello": lambda d: d.say(Hello(sequence=1, protocol=PROTOCOL, publisher="p")),
    "other protocol": lambda d: d.say(Hello(sequence=1, protocol=PROTOCOL + 1, publisher="p")),
    "offer": lambda d: d.offer(),
    "other offer": lambda d: d.offer("v", step=2),
    "stage": lambda d: d.stage(0),
    "stage of another": lambda d: d.stage(0, "v"),
    "stage beyond": lambda d: d.say(Stage(sequence=3, update="u", bucket=99), d.gathered.segments[0].data),
    "stage of nothing": lambda d: d.say(Stage(sequence=3, update="u", bucket=1)),
    "vote": lambda d: d.vote(),
    "vote of another": lambda d: d.vote("v"),
    "commit": lambda d: d.commit(),
    "commit of another": lambda d: d.commit("v"),
    "join": lambda d: d.join(),
    "deliver": lambda d: d.deliver(0),
    "deliver next": lambda d: d.deliver(1),
    "deliver later": lambda d: d.deliver(2),
    "deliver beyond": lambda d: d.say(Deliver(sequence=5, update="u", bucket=99)),
    "deliver to another": lambda d: d.deliver(0, "v"),
    "finish": lambda d: d.finish(),
    "finish of another": lambda d: d.finish("v"),
    "abort": lambda d: d.abort(),
    "abort of another": lambda d: d.abort("v"),
}
# What a request gets in each state, and the state after it: - stands for the state before.
TABLE = """
                   | idle            | offered      | staged         | held         | committed       | torn
hello              | Welcome -       | Welcome -    | Welcome -      | Welcome -    | Welcome -       | Welcome -
other protocol     | Refused -       | Refused -    | Refused -      | Refused -    | Refused -       | Refused -
offer              | Offered offered | Offered -    | Offered -      | Offered -    | Refused -       | Offered offered
other offer        | Offered offered | Refused -    | Refused -      | Refused -    | Offered offered | Offered offered
stage              | Refused -       | Staged -     | Staged -       | Staged -     | Refused -       | Refused -
stage of another   | Refused -       | Refused -    | Refused -      | Refused -    | Refused -       | Refused -
stage beyond       | Refused -       | Refused idle | Refused -      | Refused -    | Refused -       | Refused -
stage of nothing   | Refused -       | Refused idle | Staged -       | Staged -     | Refused -       | Refused -
vote               | Refused -       | Refused idle | Voted -        | Voted -      | Refused -       | Refused -
vote of another    | Refused -       | Refused -    | Refused -      | Refused -    | Refused -       | Refused -
commit             | Refused -       | Refused -    | Committed idle | Refused -    | Committed -     | Refused -
commit of another  | Refused -       | Refused -    | Refused -      | Refused -    | Refused -       | Refused -
join               | Joined -        | Refused -    | Refused -      | Refused -    | Joined -        | Joined -
deliver            | Refused -       | Refused -    | Refused -      | Refused -    | Refused -       | Refused -
deliver next       | Refused -       | Refused -    | Refused -      | Refused -    | Refused -       | Refused -
deliver later      | Refused -       | Refused -    | Refused -      | Refused -    | Refused -       | Refused -
deliver beyond     | Refused -       | Refused -    | Refused -      | Refused -    | Refused -       | Refused -
deliver to another | Refused -       | Refused -    | Refused -      | Refused -    | Refused -       | Refused -
finish             | Refused -       | Refused -    | Refused -      | Refused -    | Committed -     | Refused -
finish of another  | Refused -       | Refused -    | Refused -      | Refused -    | Refused -       | Refused -
abort              | Aborted -       | Aborted idle | Aborted idle   | Aborted idle | Refused -       | Aborted -
abort of another   | Aborted -       | Aborted -    | Aborted -      | Aborted -    | Aborted -       | Aborted -
"""
# The same for an update that is streamed, once its commit has come.
STREAM_TABLE = """
                   | begun                | delivering   | delivered
hello              | Welcome -            | Welcome -    | Welcome -
other protocol     | Refused -            | Refused -    | Refused -
offer              | Offered -            | Offered -    | Offered -
other offer        | Refused -            | Refused -    | Refused -
stage              | Refused -            | Refused -    | Refused -
stage of another   | Refused -            | Refused -    | Refused -
stage beyond       | Refused -            | Refused -    | Refused -
stage of nothing   | Refused -            | Refused -    | Refused -
vote               | Voted -              | Voted -      | Voted -
vote of another    | Refused -            | Refused -    | Refused -
commit             | Begun -              | Refused -    | Refused -
commit of another  | Refused -            | Refused -    | Refused -
join               | Refused -            | Refused -    | Refused -
deliver            | Delivered committing | Delivered -  | Delivered -
deliver next       | Refused -            | Delivered -  | Delivered -
deliver later      | Refused -            | Refused -    | Delivered -
deliver beyond     | Refused -            | Refused -    | Refused -
deliver to another | Refused -            | Refused -    | Refused -
finish             | Refused -            | Refused -    | Committed idle
finish of another  | Refused -            | Refused -    | Refused -
abort              | Aborted idle         | Refused torn | Refused torn
abort of another   | Aborted -            | Aborted -    | Aborted -
"""


def cells() -> list[tuple[str, str, str, str]]:
    found = []
    for table in (TABLE, STREAM_TABLE):
        header, *rows = [[cell.strip() for cell in line.split("|")] for line in table.strip("\n").splitlines()]
        found += [
            (row[0], state, *cell.split()) for row in rows for state, cell in zip(header[1:], row[1:], strict=True)
        ]
    return found


STATE_OF = {
    "idle": "idle",
    "offered": "offered",
    "staged": "staged",
    "held": "staged",
    "begun": "staged",
    "delivering": "committing",
    "delivered": "committing",
    "committed": "idle",
    "torn": "torn",
}


@pytest.mark.parametrize(("request_name", "state", "answer", "after"), cells())
def test_every_request_in_every_state(request_name: str, state: str, answer: str, after: str) -> None:
    driver = Driver().reach(state)
    assert driver.host.receiver.state == STATE_OF[state]
    served, old = driver.host.serving.serves, {k: v.clone() for k, v in driver.host.parameters.items()}
    reply = REQUESTS[request_name](driver)
    assert type(reply).__name__ == answer
    assert driver.host.receiver.state == (STATE_OF[state] if after == "-" else after)
    if answer == "Committed":
        assert driver.host.holds(learner_state(1))
        assert driver.host.serving.serves == driver.host.receiver.version is not None
    elif answer != "Delivered":
        assert driver.host.serving.serves == (None if after == "torn" else served)
        assert all(torch.equal(old[name], tensor) for name, tensor in driver.host.parameters.items())


def test_the_tables_have_every_request_in_every_state() -> None:
    assert {cell[:2] for cell in cells()} == {(request, state) for request in REQUESTS for state in STATE_OF}


def test_a_commit_writes_pauses_verifies_and_flips() -> None:
    driver = Driver().reach("committed")
    expected = WeightVersion(run="run", step=1, digest=driver.gathered.manifest.digest)
    assert driver.host.holds(learner_state(1))
    assert driver.host.serving.serves == driver.host.receiver.version == expected
    assert driver.host.serving.pauses == 1
    again = driver.commit()
    assert isinstance(again, Committed)
    assert again.version == expected
    assert driver.host.serving.pauses == 1  # a commit that arrives twice writes once


def test_parameters_never_move() -> None:
    driver = Driver()
    before = {name: tensor.data_ptr() for name, tensor in driver.host.parameters.items()}
    driver.reach("committed")
    assert {name: tensor.data_ptr() for name, tensor in driver.host.parameters.items()} == before


def test_inference_tensors_are_written_too() -> None:
    with torch.inference_mode():
        host = FakeHost("a")
    driver = Driver()
    driver.host = host
    driver.reach("committed")
    assert host.holds(learner_state(1))


def test_a_copy_that_does_not_land_tears_the_host_and_a_complete_commit_heals_it() -> None:
    driver = Driver().reach("staged")
    driver.damage()
    reply = driver.commit()
    assert isinstance(reply, Refused)
    assert reply.state is State.TORN
    assert "model.embed_tokens.weight: embed has digest" in reply.reason
    assert driver.host.serving.serves is None
    assert driver.host.receiver.version is None
    assert "model.embed_tokens.weight" in str(driver.host.serving.torn_because)

    driver.gathered = driver.gather(1)
    driver.offer("v", step=1)  # a torn host has no step that could be stale
    driver.stage_all("v")
    driver.vote("v")
    assert isinstance(driver.commit("v"), Committed)
    assert driver.host.serving.serves == driver.host.receiver.version is not None
    assert driver.host.holds(learner_state(1))


def test_a_torn_host_stays_torn_when_its_next_update_is_aborted() -> None:
    driver = Driver().reach("torn-offered")
    driver.abort()
    assert driver.host.receiver.state is State.TORN
    assert driver.host.serving.serves is None


def test_a_failure_of_torch_in_the_copy_tears_the_host() -> None:
    driver = Driver().reach("staged")
    driver.host.parameters["norm"] = torch.zeros(3, dtype=torch.bfloat16)  # nothing fits into it any more
    reply = driver.commit()
    assert isinstance(reply, Refused)
    assert (reply.state, driver.host.serving.serves) == (State.TORN, None)


def test_an_interrupted_commit_tears_the_host() -> None:
    class Interrupting(FakeServing):
        def committed(self, version: WeightVersion) -> None:
            raise KeyboardInterrupt

    driver = Driver()
    driver.host.serving = Interrupting(driver.host.initial)
    driver.host.receiver = Receiver(
        host="a",
        layout=layout(driver.host.parameters),
        parameters=driver.host.parameters,
        serving=driver.host.serving,
        version=driver.host.initial,
    )
    driver.reach("staged")
    with pytest.raises(KeyboardInterrupt):
        driver.commit()
    assert (driver.host.receiver.state, driver.host.serving.serves) == (State.TORN, None)


def test_a_host_that_cannot_pause_keeps_its_vote_and_writes_nothing() -> None:
    driver = Driver().reach("staged")
    driver.host.serving.busy = True
    reply = driver.commit()
    assert isinstance(reply, Refused)
    assert (reply.state, driver.host.serving.serves) == (State.STAGED, driver.host.initial)
    assert "could not pause" in reply.reason
    driver.host.serving.busy = False
    assert isinstance(driver.commit(), Committed)


def test_bytes_that_are_not_the_manifest_s_are_never_voted_for() -> None:
    driver = Driver()
    driver.offer()
    driver.damage()
    driver.stage_all()
    reply = driver.vote()
    assert isinstance(reply, Refused)
    assert "model.embed_tokens.weight: the bytes that arrived" in reply.reason
    assert driver.host.receiver.state is State.IDLE
    assert driver.host.serving.pauses == 0


def test_a_vote_names_the_buckets_that_did_not_arrive() -> None:
    driver = Driver()
    driver.offer()
    for bucket in (0, 2):
        driver.stage(bucket)
    reply = driver.vote()
    assert isinstance(reply, Refused)
    assert "bucket 1: did not arrive" in reply.reason
    assert "bucket 0" not in reply.reason


def test_buckets_may_come_in_any_order_and_twice() -> None:
    driver = Driver()
    driver.offer()
    for bucket in [*reversed(range(len(driver.gathered.segments))), 0, 1]:
        assert isinstance(driver.stage(bucket), Staged)
    assert isinstance(driver.vote(), Voted)
    assert isinstance(driver.commit(), Committed)
    assert driver.host.holds(learner_state(1))


def test_a_short_segment_is_refused() -> None:
    driver = Driver().reach("offered")
    reply = driver.say(Stage(sequence=3, update="u", bucket=0), driver.gathered.segments[0].data[:10])
    assert isinstance(reply, Refused)
    assert "has 10 bytes" in reply.reason


@pytest.mark.parametrize(
    ("step", "run", "taken"), [(0, "run", False), (1, "run", False), (2, "run", True), (0, "new", True)]
)
def test_a_stale_step_is_refused_within_its_run(step: int, run: str, taken: bool) -> None:
    driver = Driver().reach("committed")
    driver.gathered = driver.gather(2)
    reply = driver.offer("v", step=step, run=run)
    assert isinstance(reply, Offered if taken else Refused)
    if isinstance(reply, Refused):
        assert f"step {step} of the same run is stale" in reply.reason


def test_the_version_that_serves_may_be_published_again() -> None:
    driver = Driver().reach("committed")
    assert isinstance(driver.offer("v", step=1), Offered)


def test_a_subset_of_another_base_is_refused() -> None:
    driver = Driver()
    reply = driver.offer(base=Digest(1, 2))
    assert isinstance(reply, Refused)
    assert f"builds on content {Digest(1, 2)}, and this host serves {driver.host.initial}" in reply.reason


@pytest.mark.parametrize("change", [{"bucket_bytes": 100}, {"run": "a b"}])
def test_an_offer_that_no_publisher_would_make_is_refused(change: dict[str, object]) -> None:
    driver = Driver()
    offer = offer_of(driver.gathered.manifest)
    assert isinstance(driver.say(replace(offer, **change)), Refused)


def test_an_offer_that_comes_after_its_abort_is_refused() -> None:
    driver = Driver()
    assert isinstance(driver.abort(), Aborted)
    assert isinstance(driver.offer(), Refused)


def test_another_offer_under_the_same_name_is_refused() -> None:
    driver = Driver().reach("offered")
    assert isinstance(driver.offer(step=7), Refused)


@pytest.mark.parametrize(
    ("state", "intent", "outcome", "after"),
    [
        ("idle", Intent.HOLD, Outcome.UNKNOWN, "idle"),
        ("idle", Intent.ABORT, Outcome.UNKNOWN, "idle"),
        ("offered", Intent.HOLD, Outcome.ABORTED, "idle"),
        ("offered", Intent.ABORT, Outcome.ABORTED, "idle"),
        ("staged", Intent.HOLD, Outcome.VOTED, "staged"),
        ("staged", Intent.ABORT, Outcome.ABORTED, "idle"),
        ("held", Intent.HOLD, Outcome.VOTED, "staged"),
        ("held", Intent.ABORT, Outcome.ABORTED, "idle"),
        ("begun", Intent.HOLD, Outcome.VOTED, "staged"),
        ("begun", Intent.ABORT, Outcome.ABORTED, "idle"),
        ("delivering", Intent.HOLD, Outcome.TORN, "committing"),
        ("delivering", Intent.ABORT, Outcome.TORN, "committing"),
        ("delivered", Intent.HOLD, Outcome.TORN, "committing"),
        ("committed", Intent.HOLD, Outcome.COMMITTED, "idle"),
        ("committed", Intent.ABORT, Outcome.COMMITTED, "idle"),
    ],
)
def test_a_sibling_s_question_in_every_state(state: str, intent: Intent, outcome: Outcome, after: str) -> None:
    driver = Driver().reach(state)
    assert driver.ask(intent) is outcome
    assert driver.host.receiver.state == after
    if outcome in (Outcome.UNKNOWN, Outcome.ABORTED):
        assert isinstance(driver.offer(), Refused)  # what a sibling was told stays true


def test_a_torn_host_says_so_to_its_sibling() -> None:
    assert Driver().reach("torn").ask(Intent.HOLD, "t") is Outcome.TORN


@pytest.mark.parametrize(
    ("state", "waits", "after"),
    [("begun", True, State.STAGED), ("delivering", False, State.TORN), ("delivered", False, State.TORN)],
)
def test_a_lost_publisher_ends_the_pause_and_tears_a_host_that_has_a_bucket(
    state: str, waits: bool, after: State
) -> None:
    driver = Driver().reach(state)
    assert driver.host.serving.is_paused
    assert driver.host.receiver.lost() == waits
    assert driver.host.receiver.state is after
    assert not driver.host.serving.is_paused
    assert driver.host.serving.serves == (driver.host.initial if waits else None)
    if not waits:
        assert driver.memory.opened == []
        assert driver.ask(Intent.HOLD) is Outcome.TORN


@pytest.mark.parametrize(
    ("answer", "settled", "serves"),
    [
        (Outcome.VOTED, Outcome.ABORTED, True),
        (Outcome.COMMITTED, Outcome.TORN, False),
        (Outcome.TORN, Outcome.TORN, False),
        (GONE, Outcome.ABORTED, True),
        (SILENT, Outcome.UNDECIDED, False),
    ],
)
def test_a_host_that_has_begun_and_lost_its_publisher_cannot_follow(
    answer: Outcome | str, settled: Outcome, serves: bool
) -> None:
    driver = Driver().reach("begun")
    assert driver.host.receiver.lost()
    settlement = driver.host.receiver.settle(lambda: [OneAnswer("b", answer)])
    assert settlement is not None
    assert settlement.outcome is settled
    assert driver.host.serving.serves == (driver.host.initial if serves else None)
    assert driver.memory.opened == []
    assert isinstance(driver.deliver(0), Refused)


def test_a_lost_publisher_ends_an_update_without_a_vote_and_leaves_one_with_it() -> None:
    driver = Driver().reach("offered")
    assert not driver.host.receiver.lost()
    assert driver.host.receiver.state is State.IDLE
    driver = Driver().reach("staged")
    assert driver.host.receiver.lost()
    assert driver.host.receiver.state is State.STAGED


@pytest.mark.parametrize(
    ("answers", "settled"),
    [
        ([], Outcome.ABORTED),
        ([GONE], Outcome.ABORTED),
        ([Outcome.VOTED, Outcome.VOTED], Outcome.ABORTED),
        ([Outcome.ABORTED, Outcome.VOTED], Outcome.ABORTED),
        ([Outcome.ABORTED, SILENT], Outcome.ABORTED),
        ([Outcome.UNKNOWN], Outcome.ABORTED),
        ([Outcome.UNDECIDED], Outcome.ABORTED),
        ([Outcome.VOTED, GONE], Outcome.ABORTED),
        ([Outcome.COMMITTED], Outcome.COMMITTED),
        ([Outcome.VOTED, Outcome.COMMITTED], Outcome.COMMITTED),
        ([SILENT, Outcome.TORN], Outcome.COMMITTED),
        ([GONE, SILENT, Outcome.COMMITTED], Outcome.COMMITTED),
        ([SILENT], Outcome.UNDECIDED),
        ([SILENT, Outcome.VOTED, GONE], Outcome.UNDECIDED),
        ([SILENT, Outcome.UNKNOWN], Outcome.UNDECIDED),
        ([SILENT, Outcome.UNDECIDED], Outcome.UNDECIDED),
    ],
)
def test_a_host_that_voted_and_lost_its_publisher_ends_as_its_siblings_did_or_is_silent(
    answers: list[Outcome | str], settled: Outcome
) -> None:
    driver = Driver().reach("staged")
    siblings = [OneAnswer(f"s{i}", outcome) for i, outcome in enumerate(answers)]
    settlement = driver.host.receiver.settle(lambda: siblings)
    assert settlement is not None
    assert settlement.outcome is settled
    new = WeightVersion(run="run", step=1, digest=driver.gathered.manifest.digest)
    expected = {
        Outcome.COMMITTED: (State.IDLE, new),
        Outcome.ABORTED: (State.IDLE, driver.host.initial),
        Outcome.UNDECIDED: (State.TORN, None),
    }
    assert (driver.host.receiver.state, driver.host.serving.serves) == expected[settled]
    assert driver.host.receiver.version == driver.host.serving.serves
    assert driver.host.holds(learner_state(1)) == (settled is Outcome.COMMITTED)
    if settled is Outcome.COMMITTED:
        assert all(sibling.heard == [Intent.HOLD] for sibling in siblings)
    else:
        assert isinstance(driver.commit(), Refused)  # too late, for ever
        assert all(sibling.host in settlement.reason for sibling in siblings)
    if settled is Outcome.ABORTED:
        assert all(sibling.heard == [Intent.HOLD, Intent.ABORT] for sibling in siblings)
    if settled is Outcome.UNDECIDED:
        assert all({*sibling.heard} == {Intent.HOLD} for sibling in siblings)  # nobody is told what it does not know
        assert siblings[0].heard.count(Intent.HOLD) > 10  # it was asked until the deadline
        assert driver.host.serving.torn_because == settlement.reason
        assert driver.ask(Intent.HOLD) is Outcome.UNDECIDED


def test_an_undecided_host_is_healed_by_a_complete_commit() -> None:
    driver = Driver().reach("staged")
    driver.host.receiver.settle(lambda: [OneAnswer("b", SILENT)])
    assert driver.host.serving.serves is None
    driver.offer("v", step=1)
    driver.stage_all("v")
    driver.vote("v")
    assert isinstance(driver.commit("v"), Committed)
    assert driver.host.serving.serves == driver.host.receiver.version is not None
    assert driver.host.holds(learner_state(1))


@pytest.mark.parametrize(
    ("later", "settled"), [(Outcome.COMMITTED, Outcome.COMMITTED), (Outcome.VOTED, Outcome.ABORTED)]
)
def test_a_sibling_that_answers_at_last_decides(later: Outcome, settled: Outcome) -> None:
    driver = Driver().reach("staged")
    late = OneAnswer("b", SILENT)

    def siblings() -> list[OneAnswer]:
        late.outcome = later if len(late.heard) >= 3 else SILENT
        return [late]

    settlement = driver.host.receiver.settle(siblings)
    assert settlement is not None
    assert settlement.outcome is settled


def test_a_silent_sibling_that_leaves_the_roster_cannot_be_serving() -> None:
    driver = Driver().reach("staged")
    rosters = iter([[OneAnswer("b", SILENT)], [OneAnswer("b", SILENT)], [], []])
    settlement = driver.host.receiver.settle(lambda: next(rosters))
    assert settlement is not None
    assert settlement.outcome is Outcome.ABORTED
    assert driver.host.serving.serves == driver.host.initial


def test_a_host_that_cannot_know_its_siblings_serves_nothing() -> None:
    driver = Driver().reach("staged")

    def siblings() -> list[OneAnswer]:
        raise RosterError("no fleet 'f'")

    settlement = driver.host.receiver.settle(siblings)
    assert settlement is not None
    assert settlement.outcome is Outcome.UNDECIDED
    assert "the roster not reached: no fleet 'f'" in settlement.reason
    assert driver.host.serving.serves is None


@pytest.mark.parametrize(
    ("told", "settled"), [(Outcome.COMMITTED, Outcome.COMMITTED), (SILENT, Outcome.UNDECIDED), (GONE, Outcome.ABORTED)]
)
def test_a_sibling_that_held_may_have_followed_one_that_is_gone_now(told: Outcome | str, settled: Outcome) -> None:
    driver = Driver().reach("staged")

    class Followed(OneAnswer):
        def ask(self, question: Ask) -> Answer:
            self.outcome = Outcome.VOTED if question.intent is Intent.HOLD else told
            return super().ask(question)

    settlement = driver.host.receiver.settle(lambda: [Followed("b", Outcome.VOTED), OneAnswer("c", GONE)])
    assert settlement is not None
    assert settlement.outcome is settled


def test_a_host_that_must_follow_tries_to_pause_again() -> None:
    driver = Driver().reach("staged")
    driver.host.serving.misses = 3
    settlement = driver.host.receiver.settle(lambda: [OneAnswer("b", Outcome.COMMITTED)])
    assert settlement is not None
    assert settlement.outcome is Outcome.COMMITTED
    assert driver.host.holds(learner_state(1))


def test_a_host_that_must_follow_and_cannot_pause_stops_serving() -> None:
    driver = Driver().reach("staged")
    driver.host.serving.busy = True
    settlement = driver.host.receiver.settle(lambda: [OneAnswer("b", Outcome.COMMITTED)])
    assert settlement is not None
    assert settlement.outcome is Outcome.TORN
    assert "b took the commit; could not pause" in settlement.reason
    assert (driver.host.receiver.state, driver.host.serving.serves) == (State.TORN, None)
    assert driver.host.serving.torn_because == settlement.reason
    assert driver.ask(Intent.HOLD) is Outcome.TORN


def test_an_abort_that_comes_while_siblings_are_asked_ends_it() -> None:
    driver = Driver().reach("staged")

    class Quicker(OneAnswer):
        def ask(self, question: Ask) -> Answer:
            assert driver.ask(Intent.ABORT) is Outcome.ABORTED
            return super().ask(question)

    settlement = driver.host.receiver.settle(lambda: [Quicker("b", Outcome.ABORTED)])
    assert settlement is not None
    assert settlement.outcome is Outcome.ABORTED
    assert driver.host.serving.serves == driver.host.initial


def test_settling_without_an_update_does_nothing() -> None:
    assert Driver().host.receiver.settle(lambda: [OneAnswer("b", Outcome.COMMITTED)]) is None


def test_a_commit_that_comes_while_siblings_are_asked_is_refused() -> None:
    driver = Driver().reach("staged")
    replies = []

    class Late(OneAnswer):
        def ask(self, question: Ask) -> Answer:
            replies.append(driver.commit())
            return super().ask(question)

    driver.host.receiver.settle(lambda: [Late("b", Outcome.VOTED)])
    assert {type(reply) for reply in replies} == {Refused}
    assert driver.host.serving.serves == driver.host.initial


def test_silence_is_measured_from_the_publisher_s_last_word() -> None:
    driver = Driver()
    assert driver.host.receiver.silence_left_s is None
    driver.offer()
    driver.clock.advance(20)
    assert driver.host.receiver.silence_left_s == 10
    driver.ask(Intent.HOLD, "other")  # a sibling is not the publisher
    assert driver.host.receiver.silence_left_s == 10
    driver.stage(0)
    assert driver.host.receiver.silence_left_s == 30


@pytest.mark.parametrize("state", ["offered", "staged", "begun", "delivering"])
@pytest.mark.parametrize(
    "sign",
    [
        *["hello", "other protocol", "other offer", "stage of another", "vote of another", "commit of another"],
        *["join", "deliver to another", "finish of another", "abort of another"],
    ],
)
def test_what_does_not_name_the_update_under_way_is_no_sign_of_its_publisher(sign: str, state: str) -> None:
    driver = Driver().reach(state)
    driver.clock.advance(20)
    REQUESTS[sign](driver)
    assert driver.host.receiver.silence_left_s == 10
    REQUESTS["offer"](driver)
    assert driver.host.receiver.silence_left_s == 30


def test_a_torn_host_hears_its_publisher_in_whatever_it_says() -> None:
    driver = Driver().reach("torn")
    driver.clock.advance(20)
    REQUESTS["hello"](driver)
    assert driver.host.receiver.silence_left_s == 30


def test_a_torn_host_does_not_wait_for_ever_for_the_publisher_that_tore_it() -> None:
    driver = Driver().reach("torn")
    assert driver.host.receiver.silence_left_s == 30
    driver.offer()
    driver.stage_all()
    driver.vote()
    driver.commit()
    assert driver.host.receiver.silence_left_s is None


def test_a_host_welcomes_with_what_it_serves() -> None:
    driver = Driver().reach("committed")
    reply = REQUESTS["hello"](driver)
    assert isinstance(reply, Welcome)
    assert (reply.host, reply.state, reply.version) == ("a", State.IDLE, driver.host.serving.serves)
    assert reply.layout == layout(storage()).digest
    assert reply.tied == TIED


def test_parameters_that_are_not_the_layout_s_are_refused() -> None:
    mapping = HostedLayout([Whole(parameter="p", name="w")], {"p": torch.zeros(2, 3)})
    host = FakeHost("a")
    for wrong in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(3, 2).t()):
        with pytest.raises(ValueError, match="not the layout's"):
            Receiver(host="a", layout=mapping, parameters={"p": wrong}, serving=host.serving, version=host.initial)


def test_a_memory_segment_starts_empty() -> None:
    assert MemorySegment(10).data.tolist() == [0] * 10
