"""moe-rollout as a new user types it, as far as nothing has to run: every mistake is one line and an exit status."""

import json
import os
import signal
import socket
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import glm4_config, qwen3_config, save, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers

from rollout import HostStatus, RolloutConfig
from rollout.cli import main
from rollout.cli.fault import described, one_line
from rollout.cli.memory import HostMemory, Room, host_memory, refuse_shortage
from rollout.cli.prompts import prompts_of
from rollout.cli.stopping import stoppable
from rollout.cli.terminal import amount
from rollout.cli.text import Text
from rollout.cli.verify import judged
from rollout.errors import ConfigError, DeadlineExceeded, HostFailed
from rollout.machine_memory import available_bytes
from rollout.model.hosted import HostedModel
from rollout.prospect import prospect_of
from rollout.status import FleetStatus
from rollout.whereabouts import Whereabouts, fleets_here
from weights.digest import Digest
from weights.version import WeightVersion

COMMANDS = ("check", "parity", "launch", "generate", "publish", "status", "verify")


@pytest.fixture(autouse=True)
def _runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(qwen3_config(), 1), tmp_path_factory.mktemp("qwen3"))


@pytest.fixture
def config(checkpoint: Path, tmp_path: Path) -> Path:
    return write(tmp_path / "rollout.yaml", {"model": str(checkpoint)})


def write(path: Path, changes: dict[str, object]) -> Path:
    plain: dict[str, object] = {"name": "run-7", "engine": {"max_context": 64, "max_running": 4}}
    path.write_text(yaml.safe_dump(plain | changes))
    return path


def mistake(capsys: pytest.CaptureFixture[str], *argv: object, status: int = 1) -> str:
    """The one line that a command line which cannot work ends with."""
    try:
        answer = main([str(part) for part in argv])
    except SystemExit as ended:
        answer = int(str(ended.code))
    said = capsys.readouterr().err.splitlines()
    assert answer == status
    assert len(said) == 1, said
    assert said[0].startswith("moe-rollout")
    return said[0]


def test_help_tells_every_command_and_every_command_has_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], *([command] for command in COMMANDS)):
        with pytest.raises(SystemExit) as ended:
            main([*argv, "--help"])
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert "usage: moe-rollout" in text
        assert argv or all(command in text for command in COMMANDS)
        assert "==SUPPRESS==" not in text


def test_a_command_line_that_is_wrong_points_at_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "invalid choice: 'lunch'" in mistake(capsys, "lunch", status=2)
    assert "CONFIG; see moe-rollout check --help" in mistake(capsys, "check", status=2)
    assert "one of the arguments CONFIG --fleet is required" in mistake(capsys, "generate", status=2)


@pytest.mark.parametrize("command", ["check", "launch", "generate"])
def test_a_file_that_is_not_there_is_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(capsys, command, "nope.yaml").endswith("cannot read nope.yaml: No such file or directory")


def test_a_typo_gets_the_key_that_was_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path / "x.yaml", {"model": "m", "hots": 2, "engine": {"max_runing": 3}})
    said = mistake(capsys, "check", config)
    assert "unknown key hots; did you mean hosts?" in said
    assert "unknown key engine.max_runing; did you mean engine.max_running?" in said


def test_a_model_that_is_not_there_says_what_belongs_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = mistake(capsys, "launch", write(tmp_path / "x.yaml", {"model": "/no/where"}))
    assert said.endswith("model: there is no folder /no/where; give a Hugging Face checkpoint folder")


def test_a_folder_without_weights_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    said = mistake(capsys, "check", write(tmp_path / "x.yaml", {"model": str(tmp_path)}))
    assert "holds neither model.safetensors nor model.safetensors.index.json" in said


@pytest.mark.parametrize("command", ["check", "launch", "generate", "publish"])
def test_an_unsupported_architecture_is_told_with_the_supported(
    command: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = json.loads((checkpoint / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(other))
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes())
    config = write(tmp_path / "x.yaml", {"model": str(tmp_path)})
    argv = {"publish": (tmp_path, "--fleet", "x"), "generate": (config, "--tokens", "1")}.get(command, (config,))
    said = mistake(capsys, command, *argv)
    assert "architectures=['LlamaForCausalLM']" in said
    assert "Qwen3MoeForCausalLM, Glm4MoeForCausalLM" in said


def test_a_prompt_longer_than_the_context_says_how_much_room_there_is(
    config: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = ",".join(["1"] * 60)
    said = mistake(capsys, "generate", config, "--tokens", tokens, "--max-tokens", 10)
    assert "prompt-0: 60 prompt tokens and --max-tokens 10 exceed engine.max_context=64" in said
    assert "set --max-tokens to at most 4, or raise engine.max_context (the model takes 256)" in said
    wide = write(tmp_path / "wide.yaml", {"model": str(checkpoint), "engine": {"max_context": 4096}})
    said = mistake(capsys, "generate", wide, "--tokens", ",".join(["1"] * 300))
    assert said.endswith("exceed the model's context of 256 tokens; shorten the prompt")


def test_sampling_that_cannot_be_meant_is_told_before_anything_is_started(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = mistake(capsys, "generate", config, "--tokens", 1, "--temperature", "nan", "--top-p", 0)
    assert "temperature is nan, must be 0, or from " in said
    assert said.endswith("top_p is 0.0, must be above 0 and at most 1")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), "no prompt: give --prompt TEXT, --tokens 1,2,3 or --prompts FILE"),
        (("--prompt", "hello"), "has no tokenizer.json; give token ids instead, --tokens 1,2,3"),
        (("--tokens", "1,b"), "--tokens '1,b': expected token ids such as 1,2,3"),
        (("--tokens", ""), "prompt 'prompt-0' is empty: give at least one token id"),
        (("--prompts", "nope.txt"), "nope.txt: No such file or directory"),
    ],
)
def test_prompts_that_are_none_say_what_is_one(
    argv: tuple[str, ...], expected: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mistake(capsys, "generate", config, *argv).endswith(expected)


def test_a_port_in_use_says_how_to_choose_another(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = mistake(capsys, "launch", config, "--metrics-port", port)
    assert f"metrics_port: {port} on this machine cannot be had (address already in use)" in said
    assert said.endswith("choose another one with --metrics-port or metrics_port")


def test_a_port_of_somebody_elses_cluster_cannot_be_chosen(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "RAY_ADDRESS names a cluster that runs already" in mistake(capsys, "launch", config, "--metrics-port", 9000)
    assert "must be from 1 to 65535" in mistake(capsys, "launch", config, "--metrics-port", 0)


@pytest.mark.parametrize("command", ["launch", "generate"])
def test_too_little_memory_names_the_knob_to_turn(
    command: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = {"model": str(checkpoint), "hosts": 2, "engine": {"max_context": 64, "kv_blocks": 10**10}}
    argv = ("--tokens", "1", "--max-tokens", "4") if command == "generate" else ()
    said = mistake(capsys, command, write(tmp_path / "x.yaml", huge), *argv)
    assert "too little memory: 2 hosts need 86.2 KiB of parameters and 37.3 TiB of KV cache each" in said
    assert "set engine.kv_blocks to at most " in said


def test_check_shows_everything_and_then_refuses_too_little_memory(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path / "x.yaml", {"model": str(checkpoint), "engine": {"kv_blocks": 10**10}})
    assert main(["check", str(config)]) == 1
    said = capsys.readouterr()
    assert "expert ids, given the logits" in said.out
    assert len(said.err.splitlines()) == 1
    assert "too little memory" in said.err


def test_check_tells_what_will_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(config)]) == 0
    text = capsys.readouterr().out
    for expected in (
        "Qwen3MoeForCausalLM, 2 layers, 22,080 parameters, float32",
        "RL mode",
        "2 of 5 experts by softmax",
    ):
        assert expected in text
    assert main(["check", str(config), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["facts"]["gate"] == "float32 operands, float32 logits"
    assert {"operation", "bits", "why"} == set(plain["operations"][0])


def test_check_follows_the_environment_and_says_what_contradicts(
    config: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_ROLLOUT_RL", "0")
    assert main(["check", str(config), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["facts"]["RL mode"] == "off"
    assert "RL mode is off and a learner may publish" in plain["hints"][0]
    said = mistake(capsys, "check", write(tmp_path / "on.yaml", {"model": str(checkpoint), "rl_mode": True}))
    assert "contradict each other" in said


def test_a_gpu_that_is_not_there_is_told(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = mistake(capsys, "launch", write(tmp_path / "x.yaml", {"model": str(checkpoint), "device": "cuda"}))
    assert "PyTorch sees no GPU here; set device: cpu" in said


def test_device_memory_is_not_to_be_read_on_a_cpu(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"model": str(checkpoint), "device": "cpu", "weights": {"transport": "cuda_ipc"}}
    said = mistake(capsys, "check", write(tmp_path / "x.yaml", fields))
    assert "cuda_ipc reads device memory, and the hosts would run on a CPU" in said


@pytest.mark.parametrize(("shadow", "words"), [(True, "a full second copy"), (False, "written in place")])
def test_check_says_how_an_update_over_a_wire_is_staged(
    shadow: bool, words: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"model": str(checkpoint), "device": "cpu", "weights": {"transport": "nccl", "shadow": shadow}}
    assert main(["check", str(write(tmp_path / "x.yaml", fields)), "--json"]) == 0
    assert words in json.loads(capsys.readouterr().out)["facts"]["weight updates"]


def test_a_second_fleet_of_the_same_name_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Whereabouts(name="run-7", ray_address="127.0.0.1:1", ray_auth_mode="", launcher=os.getpid()).write()
    said = mistake(capsys, "launch", config)
    assert f"a fleet 'run-7' runs on this machine already (process {os.getpid()})" in said


def test_whereabouts_of_a_launcher_that_died_are_none() -> None:
    mine = Whereabouts(name="mine", ray_address="127.0.0.1:1", ray_auth_mode="token", launcher=os.getpid())
    dead = Whereabouts(name="dead", ray_address="127.0.0.1:1", ray_auth_mode="", launcher=2**22 + 1)
    for known in (mine, dead):
        known.write()
    assert fleets_here() == ("mine",)
    assert Whereabouts.read("mine") == mine
    assert Whereabouts.read("dead") is None
    mine.remove()
    assert fleets_here() == ()


def test_without_a_fleet_status_says_how_to_have_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(capsys, "status").endswith("no fleet runs on this machine; start one with moe-rollout launch CONFIG")


def test_publishing_to_nobody_or_from_nowhere_says_which(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no fleet 'nobody' in " in mistake(capsys, "publish", checkpoint, "--fleet", "nobody")
    said = mistake(capsys, "publish", "nowhere", "--fleet", "nobody")
    assert said.endswith("nowhere: cannot be opened as a folder: No such file or directory")


def test_a_knob_is_named_that_would_do() -> None:
    plain = RolloutConfig(name="x", model="x", hosts=4)
    need = HostMemory(parameters=100, kv_cache=plain.engine.blocks * 10)
    refuse_shortage(plain, need, Room(bytes=4 * need.total, hosts=4, where="here"))
    with pytest.raises(ConfigError, match=r"4 hosts need .*set engine.kv_blocks to at most 12288 \(now 16384\)"):
        refuse_shortage(plain, need, Room(bytes=3 * need.total + 100, hosts=4, where="here"))
    need = HostMemory(parameters=10**6, kv_cache=plain.engine.blocks * 10)
    with pytest.raises(ConfigError, match="set hosts to at most 3"):
        refuse_shortage(plain, need, Room(bytes=3 * need.total, hosts=4, where="here"))
    with pytest.raises(ConfigError, match="smaller model, dtype: bfloat16"):
        refuse_shortage(plain, need, Room(bytes=10**5, hosts=1, where="here"))


def test_memory_is_what_a_host_allocates(checkpoint: Path, config: Path) -> None:
    prospect = prospect_of(RolloutConfig.from_yaml(config), {})
    model = HostedModel.load(checkpoint, device="cpu")
    engine = prospect.config.engine
    kv = model.kv_cache(blocks=engine.blocks, block_size=engine.block_size)
    assert host_memory(prospect.config, prospect.spec) == HostMemory(
        parameters=sum(tensor.nbytes for tensor in model.parameters.values()),
        kv_cache=kv.keys.nbytes + kv.values.nbytes,
    )


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    1000 kB\n")
    assert available_bytes(tmp_path / "meminfo", tmp_path / "none") == 1000 << 10
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert available_bytes(tmp_path / "meminfo", tmp_path) == 1000 << 10
    (tmp_path / "memory.max").write_text("5000\n")
    assert available_bytes(tmp_path / "meminfo", tmp_path) == 4900
    assert (amount(0), amount(1536), amount(3 << 40)) == ("0 bytes", "1.5 KiB", "3.0 TiB")


def test_an_error_of_many_lines_becomes_one_and_counts_the_rest() -> None:
    many = ValueError("these do not fit:\n  a: missing\n  b: missing\n  c: missing\n  d: missing\n  e: missing")
    assert one_line(many) == ("these do not fit: a: missing; b: missing; c: missing; and 2 more (--verbose lists them)")
    assert described(many).splitlines()[-1] == "  e: missing"
    assert one_line(FileNotFoundError(2, "No such file or directory", "x")) == "x: No such file or directory"
    assert one_line(DeadlineExceeded("a host", 3.0)) == "waited 3 s for a host"
    trace = 'host-0: Traceback (most recent call last):\n  File "x", line 1, in <module>\nRuntimeError: it broke'
    assert one_line(HostFailed(trace)) == "host-0: RuntimeError: it broke"
    assert one_line(MemoryError()).startswith("out of memory: MemoryError; lower engine.kv_blocks")


def test_text_goes_in_where_there_is_a_tokenizer(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = Tokenizer(models.WordLevel({"red": 3, "green": 4, "?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    text = Text(folder)
    assert text.encode("green red blue") == (4, 3, 0)
    assert text.decode((3, 4)) == "red green"
    lines = tmp_path / "prompts.txt"
    lines.write_text("red green\n\n[7, 8]\n")
    arguments = Namespace(prompt=["green"], tokens=["1 2,3"], prompts=str(lines))
    found = prompts_of(arguments, text)
    assert [(prompt.id, prompt.token_ids) for prompt in found] == [
        ("prompt-0", (4,)),
        ("prompt-1", (1, 2, 3)),
        ("prompt-2", (3, 4)),
        ("prompt-3", (7, 8)),
    ]
    (folder / "tokenizer.json").write_text("{")
    said = mistake(capsys, "generate", write(tmp_path / "x.yaml", {"model": str(folder)}), "--prompt", "red")
    assert "tokenizer.json: is no tokenizer: " in said


HELD = WeightVersion(run="a", step=1, digest=Digest(1, 1))


def host(host_id: str, version: WeightVersion | None, state: str = "idle") -> HostStatus:
    return HostStatus(
        host_id=host_id, state=state, version=version, running=0, waiting=0, process=1, blocks_free=1, blocks=1
    )


def test_verify_finds_bytes_that_are_not_the_versions_and_hosts_that_serve_nothing() -> None:
    whole = FleetStatus(name="x", hosts=(host("host-0", HELD), host("host-1", HELD)))
    assert judged(whole, {"host-0": (HELD, HELD.digest), "host-1": (HELD, HELD.digest)})[1] == []
    rows, wrong = judged(whole, {"host-0": (HELD, HELD.digest), "host-1": (HELD, Digest(9, 9))})
    assert [row[3].split(":")[0] for row in rows] == ["holds what it says", "DIFFERS"]
    assert wrong == [f"host-1 DIFFERS: holds {Digest(9, 9)}, its version says {HELD.digest}"]
    torn = FleetStatus(name="x", hosts=(host("host-0", HELD), host("host-1", None, "torn")))
    assert judged(torn, {"host-0": (HELD, HELD.digest), "host-1": (None, Digest(9, 9))})[1] == [
        "host-1 serves nothing (torn)"
    ]
    other = WeightVersion(run="a", step=2, digest=Digest(2, 2))
    (mixed,) = judged(whole, {"host-0": (HELD, HELD.digest), "host-1": (other, other.digest)})[1]
    assert mixed.startswith("hosts serve different versions: a@1:")


def test_the_first_signal_stops_and_the_next_ones_do_not_disturb() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stopped = []
    with stoppable():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            stopped.append(True)
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
    assert stopped == [True]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_models_gate_and_router_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tiny_model(glm4_config(), 1), tmp_path / "glm4")
    assert main(["check", str(write(tmp_path / "x.yaml", {"model": str(folder)})), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert "2 of 6 experts by sigmoid with a bias" in facts["router"]
    assert facts["reduce function"] == "sum_eps 1e-20, then times 1.5"
