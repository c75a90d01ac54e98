"""A host in this process: it generates, takes weights while it does, and accounts for both. No Ray."""

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import glm4_config, perturb_, qwen3_config, save, tiny_model
from replay import replayed_logprobs
from transformers import PreTrainedModel

from rollout.config import RolloutConfig
from rollout.errors import DeadlineExceeded, HostFailed, QueueFull, VersionTooOld
from rollout.host import Host
from rollout.model.hosted import HostedModel
from rollout.request import Completion, FinishReason, Prompt, SamplingParams
from weights.digest import Digest
from weights.errors import UpdateAborted
from weights.naming import to_wire
from weights.publisher import Publisher
from weights.rendezvous import Roster, RosterHost
from weights.version import WeightVersion


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "run"
    monkeypatch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(directory))
    return directory


class Hosted:
    """A host, the learner whose checkpoint it loaded, and a publisher that reaches it."""

    def __init__(self, learner: PreTrainedModel, folder: Path, **fields: object) -> None:
        self.learner = learner
        self.folder = save(learner, folder)
        plain = {
            "name": "test",
            "model": str(folder),
            "rl_mode": True,
            "engine": {"max_context": 128, "max_running": 4},
        }
        self.config = RolloutConfig.from_mapping(plain | fields)
        self.host = Host(self.config, "host-0")
        address = self.host.introduction.address
        assert address is not None
        Roster(name="test", transport="shared_memory", hosts=(RosterHost(id="host-0", address=address),)).write()
        self.publisher = Publisher.connect("test", run="learner")

    def collect(self, client: str, count: int) -> list[Completion]:
        completions: list[Completion] = []
        while len(completions) < count:
            arrived = self.host.collect(client, 20)
            assert arrived, "nothing finished for 20 s"
            completions += arrived
        return completions


@pytest.fixture
def hosted(tmp_path: Path, runtime: Path) -> Iterator[Hosted]:
    hosted = Hosted(tiny_model(glm4_config(), 1), tmp_path / "checkpoint")
    yield hosted
    hosted.publisher.close()
    hosted.host.stop()


def prompts(count: int, **fields: object) -> list[tuple[Prompt, SamplingParams]]:
    params = SamplingParams(**({"max_tokens": 40, "seed": 3, "ignore_eos": True} | fields))  # type: ignore[arg-type]
    return [(Prompt(id=f"p{i}", token_ids=(1, 2, 3 + i)), params) for i in range(count)]


def wire_of(learner: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in to_wire(learner.state_dict().items())}


def test_updates_during_generation_replay(hosted: Hosted) -> None:
    weights = {hosted.host.introduction.version: wire_of(hosted.learner)}
    hosted.host.submit("me", prompts(12, n=2))
    for step in range(1, 6):
        perturb_(hosted.learner, 50 + step)
        report = hosted.publisher.publish(hosted.learner, step=step)
        weights[report.version] = wire_of(hosted.learner)
        assert hosted.host.status().version == report.version
    completions = hosted.collect("me", 24)
    assert {(c.prompt_id, c.sample) for c in completions} == {(f"p{i}", s) for i in range(12) for s in range(2)}
    assert len({span.version for c in completions for span in c.version_spans}) > 1
    scratch = HostedModel.load(hosted.folder, device="cpu")
    for completion in completions:
        assert completion.model_logprobs == pytest.approx(replayed_logprobs(completion, scratch, weights), abs=1e-5)


def test_the_version_is_bound_to_the_content(hosted: Hosted) -> None:
    loaded = hosted.host.introduction.version
    again = hosted.publisher.publish(hosted.learner, step=1).version
    assert again.digest == loaded.digest
    assert (again.run, again.step) == ("learner", 1)
    perturb_(hosted.learner, 2)
    assert hosted.publisher.publish(hosted.learner, step=2).version.digest != loaded.digest


def test_a_refused_update_leaves_the_old_version_generating_the_same_tokens(hosted: Hosted) -> None:
    hosted.host.submit("before", prompts(2))
    before = {c.prompt_id: c.token_ids for c in hosted.collect("before", 2)}
    broken = wire_of(hosted.learner)
    broken["model.norm.wait"] = broken.pop("model.norm.weight")
    broken["lm_head.weight"] = broken["lm_head.weight"][:-1]
    with pytest.raises(UpdateAborted) as caught:
        hosted.publisher.publish(broken, step=1)
    for offender in ("model.norm.wait", "model.norm.weight", "lm_head.weight"):
        assert offender in str(caught.value)
    assert hosted.host.status().version == hosted.host.introduction.version
    hosted.host.submit("after", prompts(2))
    assert {c.prompt_id: c.token_ids for c in hosted.collect("after", 2)} == before


def test_scores_come_from_one_version_while_updates_go_on(hosted: Hosted) -> None:
    stop = threading.Event()

    def publish() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            hosted.publisher.publish(hosted.learner, step=step)

    thread = threading.Thread(target=publish)
    thread.start()
    tokens = tuple(range(1, 40))
    scores = [hosted.host.score([tokens], 20)[0]]
    while len({score.version for score in scores}) < 3 and len(scores) < 5000:
        scores += hosted.host.score([tokens], 20)
    stop.set()
    thread.join()
    with torch.no_grad():
        logits_TV = hosted.learner(torch.tensor([tokens])).logits[0, :-1]
    expected = torch.log_softmax(logits_TV, 1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
    for score in scores:
        assert score.logprobs == pytest.approx(expected, abs=1e-5)
    assert len({score.version for score in scores}) >= 3


def test_cancelled_prompts_come_back_as_aborted_and_a_closed_client_is_forgotten(hosted: Hosted) -> None:
    hosted.host.submit("me", prompts(3, max_tokens=100))
    hosted.host.submit("other", prompts(1, max_tokens=100))
    hosted.host.cancel("me", ["p0", "p2"])
    finished = {c.prompt_id: c.finish_reason for c in hosted.collect("me", 3)}
    assert finished == {"p0": FinishReason.ABORT, "p1": FinishReason.LENGTH, "p2": FinishReason.ABORT}
    hosted.host.close("other")
    assert hosted.host.collect("other", 0.2) == []
    assert hosted.host.score([(1, 2)], 20), "the engine goes on"
    status = hosted.host.status()
    assert (status.running, status.waiting, status.blocks_free) == (0, 0, status.blocks)


def test_one_prompt_that_can_never_run_keeps_all_of_them_out(hosted: Hosted) -> None:
    with pytest.raises(ValueError, match="prompt 'p1'"):
        hosted.host.submit("me", [*prompts(1), (Prompt(id="p1", token_ids=(1,) * 200), SamplingParams(max_tokens=1))])
    assert hosted.host.collect("me", 0.1) == []


def test_a_host_whose_engine_broke_says_so_to_everybody(hosted: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_forward(*_args: object, **_fields: object) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(hosted.host._loop.engine.decoder, "forward", broken_forward)
    hosted.host.submit("me", prompts(1))
    with pytest.raises(HostFailed, match="no memory left"):
        hosted.host.collect("me", 20)
    status = hosted.host.status()
    assert (status.state, status.version) == ("failed", None)
    assert "no memory left" in status.detail
    with pytest.raises(HostFailed):
        hosted.host.submit("me", prompts(1))
    with pytest.raises(HostFailed):
        hosted.host.score([(1, 2)], 20)


def test_a_score_that_takes_too_long_says_what_it_waited_for(hosted: Hosted) -> None:
    with hosted.host.paused(), pytest.raises(DeadlineExceeded, match=r"waited 0\.1 s for host-0 to score 1 sequences"):
        hosted.host.score([(1, 2, 3)], 0.1)


def test_a_host_that_holds_serves_nothing_until_a_sibling_has_shared_its_version(hosted: Hosted) -> None:
    perturb_(hosted.learner, 9)
    version = hosted.publisher.publish(hosted.learner, step=3).version
    late = Host(hosted.config, "host-1", hold=True)
    try:
        assert late.status().version is None
        late.submit("me", prompts(1))
        assert late.collect("me", 0.2) == []
        assert late.introduction.address is not None
        assert hosted.host.share("host-1", late.introduction.address) == version
        assert late.status().version == version
        (completion,) = late.collect("me", 20)
        assert {span.version for span in completion.kv_version_spans} == {version}
        assert late.verify() == (version, version.digest) == hosted.host.verify()
    finally:
        late.stop()


def test_verify_finds_a_byte_that_changed_behind_our_back(hosted: Hosted) -> None:
    version, found = hosted.host.verify()
    assert version is not None
    assert found == version.digest
    hosted.host._loop.engine.model.parameters["norm.weight"][3] += 1e-3
    assert hosted.host.verify()[1] != version.digest


def test_a_queue_that_is_full_pushes_back_and_takes_more_when_some_are_done(tmp_path: Path, runtime: Path) -> None:
    engine = {"max_running": 2, "max_waiting": 4, "max_context": 64}
    hosted = Hosted(tiny_model(qwen3_config(), 3), tmp_path / "checkpoint", engine=engine)
    try:
        with hosted.host.paused():
            hosted.host.submit("me", prompts(3, n=2, max_tokens=3))
            with pytest.raises(QueueFull, match=r"has 6 unfinished samples and cannot take 1 more .*max_waiting"):
                hosted.host.submit("me", [(Prompt(id="one more", token_ids=(1,)), SamplingParams(max_tokens=1))])
        hosted.collect("me", 6)
        hosted.host.submit("me", [(Prompt(id="one more", token_ids=(1,)), SamplingParams(max_tokens=1, seed=1))])
        hosted.collect("me", 1)
    finally:
        hosted.publisher.close()
        hosted.host.stop()


def test_a_name_that_is_not_new_is_refused_until_its_samples_are_done(hosted: Hosted) -> None:
    with hosted.host.paused():
        hosted.host.submit("me", prompts(2, max_tokens=3))
        with pytest.raises(ValueError, match="these are not new to host-0: p1"):
            hosted.host.submit("me", prompts(2, max_tokens=3)[1:])
        with pytest.raises(ValueError, match="given twice in one call"):
            hosted.host.submit("you", [*prompts(1), *prompts(1)])
        hosted.host.submit("you", prompts(2, max_tokens=3))
    assert len(hosted.collect("me", 2)) == 2
    hosted.host.submit("me", prompts(2, max_tokens=3))
    assert len(hosted.collect("me", 2)) == 2


def test_submitting_never_waits_for_an_update_and_min_version_may_refuse(hosted: Hosted) -> None:
    wanted = WeightVersion(run="learner", step=2, digest=Digest(0, 0))
    with hosted.host.paused():
        hosted.host.submit("me", prompts(1, min_version=wanted))
        with pytest.raises(VersionTooOld, match=r"host-0 serves checkpoint@0:.* p0 wants learner@2"):
            hosted.host.submit("me", prompts(1, min_version=wanted, below_min_version="refuse"))
    assert hosted.host.collect("me", 0.2) == []
    version = hosted.publisher.publish(hosted.learner, step=2).version
    (completion,) = hosted.collect("me", 1)
    assert {span.version for span in completion.version_spans} == {version}
    hosted.host.submit("me", prompts(1, min_version=wanted, below_min_version="refuse", max_tokens=2))
    hosted.collect("me", 1)


def test_what_a_commit_ends_is_delivered(hosted: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, calls = hosted.host._loop, itertools.count()
    forward = loop.engine.decoder.forward

    def held_until_a_pause_is_wanted(*arguments: object, **fields: object) -> object:
        if next(calls) == 3:
            with loop._changed:
                assert loop._changed.wait_for(lambda: loop._pauses_wanted, 20)
        return forward(*arguments, **fields)  # type: ignore[arg-type]

    monkeypatch.setattr(loop.engine.decoder, "forward", held_until_a_pause_is_wanted)
    hosted.host.submit("me", prompts(3, max_tokens=100, at_commit="abort"))
    hosted.host.submit("me", [(Prompt(id="stale", token_ids=(1, 2)), SamplingParams(max_tokens=100, max_staleness=0))])
    hosted.publisher.publish(hosted.learner, step=1)
    reasons = {c.prompt_id: c.finish_reason for c in hosted.collect("me", 4)}
    assert reasons == dict.fromkeys(["p0", "p1", "p2"], FinishReason.ABORT) | {"stale": FinishReason.STALE}


def test_a_checkpoint_and_the_publishing_of_its_very_tensors_have_one_digest(tmp_path: Path, runtime: Path) -> None:
    hosted = Hosted(tiny_model(qwen3_config(), 3, torch.bfloat16), tmp_path / "checkpoint")
    try:
        loaded, found = hosted.host.verify()
        assert loaded is not None
        assert found == loaded.digest
        assert hosted.publisher.publish(hosted.learner, step=1).version.digest == loaded.digest
    finally:
        hosted.publisher.close()
        hosted.host.stop()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rl_mode_hosts_the_gate_in_fp32_and_widens_what_is_sent(
    dtype: torch.dtype, tmp_path: Path, runtime: Path
) -> None:
    hosted = Hosted(tiny_model(qwen3_config(), 3, dtype), tmp_path / "checkpoint")
    parameters = hosted.host._loop.engine.model.parameters
    try:
        assert parameters["layers.0.gate.weight"].dtype == torch.float32
        perturb_(hosted.learner, 4)
        hosted.publisher.publish(hosted.learner, step=1)
        sent = hosted.learner.state_dict()["model.layers.0.mlp.gate.weight"]
        assert sent.dtype == dtype
        assert torch.equal(parameters["layers.0.gate.weight"], sent.float())
    finally:
        hosted.publisher.close()
        hosted.host.stop()


def test_fp32_weights_are_refused_by_a_bf16_host(tmp_path: Path, runtime: Path) -> None:
    hosted = Hosted(tiny_model(qwen3_config(), 3, torch.bfloat16), tmp_path / "checkpoint", rl_mode=False)
    try:
        assert hosted.host._loop.engine.model.parameters["layers.0.gate.weight"].dtype == torch.bfloat16
        with pytest.raises(UpdateAborted, match=r"model\.layers\.0\.mlp\.gate\.weight"):
            hosted.publisher.publish(tiny_model(qwen3_config(), 3), step=1)
        assert hosted.host.status().version == hosted.host.introduction.version
    finally:
        hosted.publisher.close()
        hosted.host.stop()
