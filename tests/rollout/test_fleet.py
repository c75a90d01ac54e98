"""A fleet on a local Ray: two hosts in processes of their own, a learner and a second trainer in others."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import perturb_, qwen3_config, save, tiny_model
from replay import replayed_logprobs
from transformers import PreTrainedModel

from rollout import (
    Completion,
    FinishReason,
    Fleet,
    FleetNotFound,
    FleetStatus,
    HostDied,
    Prompt,
    RolloutConfig,
    SamplingParams,
)
from rollout.model.hosted import HostedModel
from weights.naming import to_wire
from weights.publisher import Publisher
from weights.rendezvous import runtime_directory

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def learner() -> PreTrainedModel:
    return tiny_model(qwen3_config(), 1)


@pytest.fixture(scope="module")
def folder(learner: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(learner, tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def config(folder: Path) -> RolloutConfig:
    plain = {"name": f"test-{os.getpid()}", "model": str(folder), "hosts": 2}
    return RolloutConfig.from_mapping(plain | {"engine": {"max_context": 128, "max_running": 8}})


@pytest.fixture(scope="module")
def fleet(config: RolloutConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        with Fleet.launch(config) as fleet:
            yield fleet


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=f"p{i}", token_ids=(1, 2, 3 + i % 50)) for i in range(count)]


def in_another_process(code: str, *arguments: str) -> dict[str, object]:
    """Runs Python code in a process of its own; its last line of output is JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_every_sample_of_every_prompt_comes_once_and_both_hosts_work(fleet: Fleet) -> None:
    completions = list(fleet.generate(prompts(10), SamplingParams(n=3, max_tokens=6, ignore_eos=True)))
    counts = Counter((c.prompt_id, c.sample) for c in completions)
    assert counts == {(f"p{i}", sample): 1 for i in range(10) for sample in range(3)}
    assert Counter(c.host_id for c in completions) == {"host-0": 15, "host-1": 15}


def test_a_seed_gives_the_same_samples_on_whatever_host(fleet: Fleet) -> None:
    params = SamplingParams(n=2, max_tokens=10, seed=11, ignore_eos=True)
    first = {(c.prompt_id, c.sample): c.token_ids for c in fleet.generate(prompts(4), params)}
    second = {(c.prompt_id, c.sample): c.token_ids for c in fleet.generate(prompts(4)[::-1], params)}
    assert first == second


def test_a_prompt_that_cannot_run_stops_the_whole_call_before_it_begins(fleet: Fleet) -> None:
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        fleet.generate([*prompts(5), Prompt(id="bad", token_ids=(9999,))], SamplingParams(max_tokens=2))
    with pytest.raises(ValueError, match="these come twice: p0"):
        fleet.generate([*prompts(2), *prompts(1)], SamplingParams(max_tokens=2))
    assert len(fleet.score([[1, 2], [1, 2]])) == 2  # both engines have had a turn since
    assert [(host.running, host.waiting) for host in fleet.status().hosts] == [(0, 0), (0, 0)]


def test_a_publish_reaches_every_host_while_they_generate(fleet: Fleet, learner: PreTrainedModel, folder: Path) -> None:
    before = fleet.status().version
    assert before is not None
    weights = {before: {name: tensor.clone() for name, tensor in to_wire(learner.state_dict().items())}}
    with Publisher.connect(fleet.name) as publisher:
        stream = fleet.generate(prompts(16), SamplingParams(n=2, max_tokens=100, ignore_eos=True))
        completions = [next(stream)]
        for step in (1, 2):
            perturb_(learner, 20 + step)
            report = publisher.publish(learner, step=step)
            assert set(report.hosts) == {"host-0", "host-1"}
            weights[report.version] = {name: tensor.clone() for name, tensor in to_wire(learner.state_dict().items())}
            assert fleet.status().version == report.version
        completions += stream
    assert len(completions) == 32
    assert sum(len(c.version_spans) > 1 for c in completions) >= 4
    scratch = HostedModel.load(folder, device="cpu")
    for completion in completions:
        assert completion.model_logprobs == pytest.approx(replayed_logprobs(completion, scratch, weights), abs=1e-5)


def test_a_learner_in_another_process_needs_only_the_name(fleet: Fleet, folder: Path) -> None:
    code = """
        import json, sys
        from safetensors.torch import load_file
        from weights.publisher import Publisher
        tensors = load_file(sys.argv[2] + "/model.safetensors")
        with Publisher.connect(sys.argv[1], run="elsewhere") as publisher:
            report = publisher.publish(tensors, step=7)
        assert "ray" not in sys.modules
        print(json.dumps({"step": report.version.step, "digest": report.version.digest.hex, "bytes": report.bytes}))
    """
    answer = in_another_process(code, fleet.name, str(folder))
    version = fleet.status().version
    assert version is not None
    assert (version.run, version.step, version.digest.hex) == ("elsewhere", answer["step"], answer["digest"])
    assert answer["bytes"] == sum(p.numel() * 4 for p in tiny_model(qwen3_config(), 1).parameters())


def test_a_trainer_in_another_process_connects_by_name(fleet: Fleet) -> None:
    code = """
        import json, sys
        from rollout import Completion, Fleet, Prompt, SamplingParams
        with Fleet.connect(sys.argv[1]) as fleet:
            params = SamplingParams(max_tokens=5, temperature=0.0)
            (completion,) = fleet.generate([Prompt(id="a", token_ids=(1, 2, 3))], params)
            print(json.dumps({"tokens": completion.token_ids, "hosts": len(fleet.status().hosts)}))
    """
    answer = in_another_process(code, fleet.name)
    (ours,) = fleet.generate([Prompt(id="a", token_ids=(1, 2, 3))], SamplingParams(max_tokens=5, temperature=0.0))
    assert answer == {"tokens": list(ours.token_ids), "hosts": 2}
    assert len(fleet.status().hosts) == 2, "a guest that leaves ends nothing"


def test_a_name_that_is_not_there_is_told_with_those_that_are(fleet: Fleet) -> None:
    with pytest.raises(FleetNotFound, match=f"no fleet 'nobody' in this Ray cluster; fleets here: {fleet.name}"):
        Fleet.connect("nobody")


def test_scores_are_spread_and_come_back_in_order(fleet: Fleet) -> None:
    sequences = [[1, 2, 3 + i] for i in range(7)]
    alone = [fleet.score([sequence])[0].logprobs for sequence in sequences]
    together = [score.logprobs for score in fleet.score(sequences)]
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_a_closed_stream_cancels_what_still_runs(fleet: Fleet) -> None:
    stream = fleet.generate(prompts(40), SamplingParams(n=4, max_tokens=120, ignore_eos=True))
    next(stream)
    stream.close()
    assert list(stream) == []
    until = time.monotonic() + 20  # closing does not wait for the hosts
    while (left := [(h.running, h.waiting) for h in fleet.status().hosts]) != [(0, 0), (0, 0)]:
        assert time.monotonic() < until, f"still there: {left}"
    assert fleet.score([[1, 2]])


def await_serving(fleet: Fleet, hosts: int = 2) -> FleetStatus:
    """Waits until every host serves the same version again."""
    ends_at = time.monotonic() + 60
    while (status := fleet.status()).version is None:
        assert time.monotonic() < ends_at, status
        time.sleep(0.1)
    assert len(status.hosts) == hosts
    return status


def test_a_host_that_dies_is_named_with_its_requests_and_comes_back_at_the_fleets_version(
    fleet: Fleet, learner: PreTrainedModel, folder: Path
) -> None:
    perturb_(learner, 40)
    with Publisher.connect(fleet.name, run="before-the-death") as publisher:
        version = publisher.publish(learner, step=5).version
    with guest(fleet.name) as theirs:
        before = theirs.ask()
        stream = fleet.generate(prompts(16), SamplingParams(n=2, max_tokens=120, ignore_eos=True))
        victim = fleet.status().hosts[0]
        os.kill(victim.process, signal.SIGKILL)
        completions: list[Completion] = []
        with pytest.raises(HostDied, match="host-0 died; requests without an answer: p") as caught:
            completions.extend(stream)
        answered = {(c.prompt_id, c.sample) for c in completions}
        assert answered.isdisjoint(caught.value.request_ids)
        assert answered | set(caught.value.request_ids) == {(f"p{i}", s) for i in range(16) for s in range(2)}
        assert sum(c.host_id == "host-1" for c in completions) == 16
        again = list(fleet.generate(prompts(4), SamplingParams(max_tokens=3)))  # at once: by those that are left
        assert {c.host_id for c in again} == {"host-1"}

        status = await_serving(fleet)
        assert status.version == version, "the checkpoint's would be stale"
        assert status.hosts[0].process != victim.process
        assert [incident.host_id for incident in status.incidents] == ["host-0"] * 2
        assert "is started again" in status.incidents[0].what
        both = list(fleet.generate(prompts(10), SamplingParams(max_tokens=3)))
        assert {c.host_id for c in both} == {"host-0", "host-1"}
        assert {span.version for c in both for span in c.version_spans} == {version}
        assert fleet.verify() == dict.fromkeys(("host-0", "host-1"), (version, version.digest))
        assert before["hosts"] == theirs.ask()["hosts"] == ["host-0", "host-1"], "a guest finds it at its next call"


def test_cancelled_prompts_come_back_as_aborted_and_the_others_end(fleet: Fleet) -> None:
    stream = fleet.generate(prompts(12), SamplingParams(n=2, max_tokens=100, ignore_eos=True))
    stream.cancel(["p0", "p1", "nobody"])
    completions = list(stream)
    assert {c.prompt_id for c in completions if c.finish_reason == FinishReason.ABORT} == {"p0", "p1"}
    assert Counter(c.prompt_id for c in completions) == {f"p{i}": 2 for i in range(12)}


def test_the_end_is_quick_and_twice_is_once(
    config: RolloutConfig, fleet: Fleet, tmp_path_factory: pytest.TempPathFactory
) -> None:
    short = Fleet.launch(replace(config, name=f"{config.name}-short", hosts=1))
    process = short.status().hosts[0].process
    began = time.monotonic()
    short.shutdown()
    assert time.monotonic() - began < 5
    short.shutdown()
    while runs(process):  # it was killed; how soon the kernel gets round to it depends on the machine's load
        assert time.monotonic() - began < 30
        time.sleep(0.01)
    assert not [path.name for path in runtime_directory().iterdir() if "-short" in path.name]
    assert fleet.status().version is not None, "the other fleet of this Ray goes on"


def runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def guest(name: str) -> Iterator["Guest"]:
    guest = Guest(name)
    try:
        yield guest
    finally:
        guest.process.communicate()


class Guest:
    """A trainer in another process; says which hosts answered whenever it is asked."""

    CODE = """
        import json, sys
        from rollout import Fleet, Prompt, SamplingParams
        with Fleet.connect(sys.argv[1]) as fleet:
            for line in sys.stdin:
                prompts = [Prompt(id=str(i), token_ids=(1, 2, 3)) for i in range(8)]
                found = {c.host_id for c in fleet.generate(prompts, SamplingParams(max_tokens=2))}
                print(json.dumps({"hosts": sorted(found)}), flush=True)
    """

    def __init__(self, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(self.CODE), name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self) -> dict[str, object]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer: dict[str, object] = json.loads(self.process.stdout.readline())
        return answer


def test_a_checkpoint_that_cannot_be_hosted_is_the_callers_error_and_leaves_nothing(
    fleet: Fleet, folder: Path, tmp_path: Path
) -> None:
    wrong = json.loads((folder / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        Fleet.launch(RolloutConfig(name="unhostable", model=str(tmp_path)))
    with pytest.raises(FleetNotFound):
        Fleet.connect("unhostable")
