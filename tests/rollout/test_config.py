"""A configuration says what is meant or why it cannot be."""

from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rollout.config import RolloutConfig, WeightsConfig, resolve_rl_mode
from rollout.errors import ConfigError

MINIMAL = {"name": "run-7", "model": "checkpoints/tiny"}


def test_a_file_with_name_and_model_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "rollout.yaml"
    path.write_text("name: run-7\nmodel: checkpoints/tiny\nengine: {max_running: 8}\nweights: {transport: null}\n")
    config = RolloutConfig.from_yaml(path)
    assert (config.name, config.engine.max_running, config.weights.transport, config.rl_mode) == (
        "run-7",
        8,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"rl_mod": True}, r"unknown key rl_mod; did you mean rl_mode\?"),
        ({"engine": {"max_runing": 3}}, r"unknown key engine\.max_runing; did you mean engine\.max_running\?"),
        ({"hosts": "two"}, r"hosts: got 'two', expected a whole number"),
        ({"hosts": True}, r"hosts: got True, expected a whole number"),
        ({"hosts": 0}, r"hosts: got 0, must be above 0"),
        ({"engine": 3}, r"engine: got 3, expected a mapping"),
        ({"engine": {"max_running": 0}}, r"engine\.max_running: got 0, must be above 0"),
        (
            {"weights": {"transport": "carrier_pigeon"}},
            r"weights\.transport: got 'carrier_pigeon', expected shared_memory or cuda_ipc or nccl or disk or null",
        ),
        (
            {"weights": {"transport": "disk"}},
            r"weights\.folder: got None with weights\.transport disk; .* needs a folder",
        ),
        ({"weights": {"folder": "steps"}}, r"weights\.folder: got 'steps' with weights\.transport shared_memory"),
        ({"weights": {"transport": "disk", "folder": ""}}, r"weights\.folder: got an empty path"),
        ({"weights": {"poll_s": 0}}, r"weights\.poll_s: got 0, must be above 0"),
        ({"gate": "fp16"}, r"gate: got 'fp16', expected fp32 or trainer"),
        ({"name": "a/b"}, r"name: got 'a/b'"),
        (
            {"deadlines": {"pause_s": 60, "message_s": 60}},
            r"pause_s: got 60, must be less than deadlines\.message_s=60",
        ),
        ({"deadlines": {"pause_s": -1}}, r"deadlines\.pause_s: got -1, must be above 0"),
    ],
)
def test_a_mistake_is_named(extra: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        RolloutConfig.from_mapping(MINIMAL | extra)


def test_a_configuration_built_in_python_is_checked_like_one_from_a_file() -> None:
    with pytest.raises(ConfigError, match=r"gate: got 'fp16', expected fp32 or trainer; .*dtype: got 'bf16'"):
        RolloutConfig(name="run-7", model="m", dtype="bf16", gate="fp16")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="requests_in_flight: got 'drop'"):
        WeightsConfig(requests_in_flight="drop")  # type: ignore[arg-type]


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rollout.yaml"
    path.write_text("name: a\nmodel: b\nhosts: 2\nhosts: 4\n")
    with pytest.raises(ConfigError, match="the key 'hosts' is given twice"):
        RolloutConfig.from_yaml(path)


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RolloutConfig.from_mapping({"nam": "x", "hosts": "two", "engine": {"kv_block": 1}})
    for part in ("unknown key nam; did you mean name?", "missing key model", "hosts: got 'two'", "engine.kv_block"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1, 2]", "expected a mapping"),
        ("a: [", "is not YAML"),
        ('!!int ""', "is not YAML"),
        ("\x00", "is not YAML"),
        ("[" * 3000, "is not YAML"),
        ("", "expected a mapping"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "rollout.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=says):
        RolloutConfig.from_yaml(path)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
keys = st.sampled_from(["name", "model", "engine", "weights", "deadlines", "hosts", "rl_mode", "trainer"]) | st.text()


@given(
    st.binary(max_size=60) | st.dictionaries(keys, plain, max_size=5).map(lambda data: yaml.safe_dump(data).encode())
)
def test_any_bytes_are_a_configuration_or_one_clear_error(content: bytes) -> None:
    with NamedTemporaryFile(suffix=".yaml") as file:
        file.write(content)
        file.flush()
        config = None
        with suppress(ConfigError):
            config = RolloutConfig.from_yaml(file.name)
        assert config is None or config.name


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*No such file"):
        RolloutConfig.from_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("field", "variable", "in_force"),
    [
        (None, None, True),
        (None, "0", False),
        (None, "1", True),
        (True, None, True),
        (False, None, False),
        (True, "1", True),
        (False, "0", False),
    ],
)
def test_rl_mode_is_the_field_or_the_variable_or_on(field: bool | None, variable: str | None, in_force: bool) -> None:
    config = RolloutConfig.from_mapping(MINIMAL | {"rl_mode": field})
    environ = {} if variable is None else {"MOE_ROLLOUT_RL": variable}
    assert resolve_rl_mode(config, environ)[0] is in_force


@pytest.mark.parametrize(("field", "variable"), [(True, "0"), (False, "1")])
def test_field_and_variable_that_differ_are_both_named(field: bool, variable: str) -> None:
    config = RolloutConfig.from_mapping(MINIMAL | {"rl_mode": field})
    with pytest.raises(ConfigError, match=rf"rl_mode: {str(field).lower()} .* MOE_ROLLOUT_RL={variable}"):
        resolve_rl_mode(config, {"MOE_ROLLOUT_RL": variable})


def test_a_variable_that_is_neither_0_nor_1_is_refused() -> None:
    with pytest.raises(ConfigError, match="MOE_ROLLOUT_RL: got 'yes', must be 0 or 1"):
        resolve_rl_mode(RolloutConfig.from_mapping(MINIMAL), {"MOE_ROLLOUT_RL": "yes"})


def test_fastdeploys_variable_is_answered_with_a_hint() -> None:
    in_force, hints = resolve_rl_mode(RolloutConfig.from_mapping(MINIMAL), {"FD_ENABLE_RL": "0"})
    assert in_force
    assert len(hints) == 1
    assert "MOE_ROLLOUT_RL" in hints[0]


def test_rl_mode_off_warns_where_a_learner_may_publish() -> None:
    off = MINIMAL | {"rl_mode": False}
    assert "gates follow the checkpoint's dtype" in resolve_rl_mode(RolloutConfig.from_mapping(off), {})[1][0]
    alone = RolloutConfig.from_mapping(off | {"weights": {"transport": None}})
    assert resolve_rl_mode(alone, {})[1] == ()
