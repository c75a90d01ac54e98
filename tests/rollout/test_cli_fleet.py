"""moe-rollout launch in a process of its own, and the other commands as another shell of the machine types them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import glm4_config, qwen3_config, save, tiny_model

from rollout import RolloutConfig, RolloutError
from rollout.cli import main
from rollout.cli.background import launch_in_background
from rollout.metrics import METRICS, Kind
from rollout.whereabouts import Whereabouts
from weights.disk import write_step

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent.parent
DEADLINE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A fleet of two hosts that `moe-rollout launch` runs in another process."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    runtime: Path
    metrics: str


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    folder = tmp_path_factory.mktemp("launch")
    save(tiny_model(qwen3_config(), 1), folder / "model")
    name = f"cli-{os.getpid()}"
    plain = {"name": name, "model": str(folder / "model"), "hosts": 2, "engine": {"max_context": 64, "max_running": 4}}
    (folder / "rollout.yaml").write_text(yaml.safe_dump(plain))
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(folder / "run"))
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.delenv("RAY_AUTH_MODE", raising=False)
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "rollout.cli", "launch", "rollout.yaml", "--metrics-port", str(port)],
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            fleet = Launched(
                name=name,
                process=process,
                log=folder / "log",
                runtime=folder / "run",
                metrics=f"http://127.0.0.1:{port}/metrics",
            )
            wait_until_up(fleet)
            yield fleet
        finally:
            process.terminate()
            process.wait(DEADLINE_S)


def wait_until_up(fleet: Launched) -> None:
    until = time.monotonic() + DEADLINE_S
    while Whereabouts.read(fleet.name) is None:
        assert fleet.process.poll() is None, fleet.log.read_text()
        assert time.monotonic() < until, fleet.log.read_text()
        time.sleep(0.1)


def answer(capsys: pytest.CaptureFixture[str], *argv: object) -> list[dict[str, Any]]:
    """What a command says in JSON, line by line."""
    assert main([*(str(part) for part in argv), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def mistake(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([str(part) for part in argv]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    return said


def test_status_without_a_name_finds_the_fleet_and_its_hosts(
    launched: Launched, capsys: pytest.CaptureFixture[str]
) -> None:
    (plain,) = answer(capsys, "status")
    assert plain["fleet"] == launched.name
    assert str(plain["version"]).startswith("checkpoint@0:")
    assert [(host["host"], host["state"]) for host in plain["hosts"]] == [("host-0", "idle"), ("host-1", "idle")]


def test_prompts_are_continued_and_the_same_seed_gives_the_same_tokens(
    launched: Launched, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("generate", "--fleet", launched.name, "--tokens", "1,2,3", "--n", 2, "--max-tokens", 5, "--seed", 3)
    first, second = (answer(capsys, *argv, "--ignore-eos") for _ in range(2))
    tokens = [sorted((c["sample"], c["token_ids"]) for c in completions) for completions in (first, second)]
    assert tokens[0] == tokens[1]
    assert [len(ids) for _, ids in tokens[0]] == [5, 5]
    assert all("text" not in completion for completion in first)
    assert main([str(part) for part in (*argv, "--ignore-eos")]) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "2 completions, 10 tokens; ended 2 by length"
    assert " ".join(str(token) for token in tokens[0][0][1]) in said.out


def test_a_prompt_that_the_hosts_refuse_is_one_line(launched: Launched, capsys: pytest.CaptureFixture[str]) -> None:
    said = mistake(capsys, "generate", "--fleet", launched.name, "--tokens", "1,99", "--max-tokens", 4)
    assert said.endswith("prompt 'prompt-0': token ids [99] are outside the model's vocabulary of 61")
    said = mistake(capsys, "generate", "--fleet", launched.name, "--tokens", "1,2", "--max-tokens", 400)
    assert "set --max-tokens to at most 62" in said


def test_a_checkpoint_and_a_step_folder_are_published_verified_and_reported(
    launched: Launched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tiny_model(qwen3_config(), 2), tmp_path / "second")
    (report,) = answer(capsys, "publish", folder, "--fleet", launched.name, "--step", 3, "--run", "by-hand")
    assert str(report["version"]).startswith("by-hand@3:")
    assert set(report["phases"]) == {"gather", "offer", "stage", "vote", "commit"}
    step = write_step(tiny_model(qwen3_config(), 5).state_dict(), tmp_path / "steps", run="learner", step=4)
    (report,) = answer(capsys, "publish", tmp_path / "steps" / "step-0000000004", "--fleet", launched.name)
    assert report["version"] == str(step)
    (verified,) = answer(capsys, "verify", launched.name)
    assert [(h["version"], h["digest"], h["verdict"]) for h in verified["hosts"]] == [
        (str(step), step.digest.hex, "holds what it says")
    ] * 2
    (status,) = answer(capsys, "status", launched.name)
    for host in status["hosts"]:
        assert host["last_update"]["version"] == str(step)
        assert set(host["last_update"]["phases"]) == {"offer", "stage", "vote", "commit"}
    assert main(["status", launched.name]) == 0
    text = capsys.readouterr().out
    assert f"all serve {step}" in text
    assert re.search(r"host-1: last update \d+ s ago, learner@4:", text)


def test_another_models_checkpoint_is_refused_on_one_line_and_changes_nothing(
    launched: Launched, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (before,) = answer(capsys, "status", launched.name)
    folder = save(tiny_model(glm4_config(), 1), tmp_path / "glm4")
    said = mistake(capsys, "publish", folder, "--fleet", launched.name)
    assert "was not taken by fleet" in said
    assert "publish a checkpoint of the model that it hosts" in said
    assert "model.layers.0.self_attn.q_norm.weight: missing" in said
    assert "more (--verbose lists them)" in said
    assert main(["publish", str(folder), "--fleet", launched.name, "--verbose"]) == 1
    assert "host-1: the update does not fit" in capsys.readouterr().err
    (after,) = answer(capsys, "status", launched.name)
    assert after["version"] == before["version"]


def test_a_name_that_is_not_there_is_told_with_those_that_are(
    launched: Launched, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (("status", "nobody"), ("verify", "nobody"), ("generate", "--fleet", "nobody", "--tokens", "1")):
        said = mistake(capsys, *argv)
        assert f"no fleet 'nobody' on this machine; fleets here: {launched.name}; start one with" in said
    assert f"a fleet '{launched.name}' runs on this machine already" in mistake(
        capsys, "launch", launched.log.parent / "rollout.yaml"
    )


def test_prometheus_finds_what_the_hosts_did(launched: Launched, capsys: pytest.CaptureFixture[str]) -> None:
    """After the tests above: tokens, updates and a refused one. Ray exports every 10 s."""
    until = time.monotonic() + DEADLINE_S
    wanted = {"tokens", "version_tokens", "prompt_tokens", "completions", "updates", "faults"}
    wanted |= {metric.name.removeprefix("moe_rollout_") for metric in METRICS if metric.kind is not Kind.COUNTER}
    names = {name for m in METRICS if m.name.removeprefix("moe_rollout_") in wanted for name in m.exported}
    while True:
        with urllib.request.urlopen(launched.metrics, timeout=10) as page:
            lines = page.read().decode().splitlines()
        samples = {line.split("{")[0] for line in lines}
        refused = [
            line for line in lines if line.startswith("ray_moe_rollout_faults_total") and 'kind="refused"' in line
        ]
        steps = [line for line in lines if line.startswith("ray_moe_rollout_step")]
        if names <= samples and len(refused) == 2 and len(steps) == 2:
            break
        assert time.monotonic() < until, names - samples
        time.sleep(0.5)
    for step in steps:  # of the versions before this one nothing is left
        assert f'fleet="{launched.name}"' in step
        assert 'run="learner"' in step
        assert float(step.rpartition(" ")[2]) == 4


def test_a_signal_ends_everything_and_leaves_nothing(launched: Launched) -> None:
    """The last test that needs the fleet."""
    with (launched.runtime / f"{launched.name}.roster.json").open() as file:
        assert len(json.load(file)["hosts"]) == 2
    session = subprocess.run(
        ["ps", "-o", "pid=,args=", "--sid", str(launched.process.pid)], capture_output=True, text=True, check=True
    ).stdout
    assert session.count("ray::HostActor") == 2
    launched.process.send_signal(signal.SIGTERM)
    assert launched.process.wait(DEADLINE_S) == 0
    assert launched.log.read_text().splitlines()[-1] == f"fleet {launched.name}: ended"
    assert "Traceback" not in launched.log.read_text()
    assert list(launched.runtime.iterdir()) == []
    left = {int(line.split()[0]) for line in session.splitlines()} - {launched.process.pid}
    until = time.monotonic() + DEADLINE_S
    while alive := {process for process in left if Path(f"/proc/{process}").exists()}:
        assert time.monotonic() < until, alive
        time.sleep(0.1)


@pytest.fixture
def alone(launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of one host, with a runtime directory of its own."""
    monkeypatch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(tmp_path / "run"))
    plain = yaml.safe_load((launched.log.parent / "rollout.yaml").read_text())
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(plain | {"name": f"alone-{os.getpid()}", "hosts": 1}))
    return tmp_path / "alone.yaml"


def test_generate_with_a_fleet_of_its_own_leaves_nothing(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (completion,) = answer(capsys, "generate", alone, "--tokens", "1,2,3", "--max-tokens", 4, "--ignore-eos")
    assert (completion["host"], len(completion["token_ids"])) == ("host-0", 4)
    assert len(completion["logprobs"]) == 4
    assert list((alone.parent / "run").iterdir()) == []


def test_a_detached_launch_returns_when_the_hosts_are_up_and_ends_by_a_signal(
    alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"alone-{os.getpid()}"
    command = [sys.executable, "-m", "rollout.cli", "launch", str(alone), "--detached"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    up, how = done.stderr.splitlines()
    launcher = int(how.removeprefix("end it with: kill "))
    try:
        assert f"up in the background, process {launcher}, log " in up
        (plain,) = answer(capsys, "status", name)
        assert len(plain["hosts"]) == 1
    finally:
        os.kill(launcher, signal.SIGTERM)
    until = time.monotonic() + DEADLINE_S
    log = alone.parent / "run" / f"{name}.log"
    while not log.read_text().endswith(f"fleet {name}: ended\n"):
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)


def test_a_detached_launch_that_fails_hands_on_its_last_words(alone: Path) -> None:
    with pytest.raises(RolloutError, match=r"the launcher ended with status 1: cannot read gone\.yaml: No such file"):
        launch_in_background("gone.yaml", RolloutConfig.from_yaml(alone))
