"""A step folder is there whole or not at all, and is what its version.yaml says or one error."""

import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fakes.disk_learner import tensors as three_tensors
from fakes.weights_fleet import learner_state
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from weights.digest import Digest, tensor_digest
from weights.disk import latest_step, parse_step_name, read_step, step_name, step_paths, write_step
from weights.errors import FolderError
from weights.naming import to_wire

ROOT = Path(__file__).parents[2]
STEP = "step-0000000003"


def write(folder: Path, seed: int = 1, step: int = 3, run: str = "run") -> Path:
    write_step(learner_state(seed), folder, run=run, step=step, file_bytes=8192)
    return folder / step_name(step)


def said(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((folder / "version.yaml").read_text())
    return content


def say(folder: Path, **changes: object) -> None:
    (folder / "version.yaml").write_text(yaml.safe_dump(said(folder) | changes))


def entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# Whole.


def test_what_is_written_is_read_bit_for_bit_under_wire_names(tmp_path: Path) -> None:
    state = learner_state(1)
    version = write_step(state, tmp_path / "steps", run="run", step=3, file_bytes=8192)
    assert latest_step(tmp_path / "steps") == tmp_path / "steps" / STEP
    step = read_step(tmp_path / "steps" / STEP)
    wire = dict(to_wire(state.items()))
    read = dict(step.tensors())
    assert read.keys() == wire.keys() == set(step.names)
    assert "lm_head.weight" not in read, "a tied tensor is written once"
    assert all(torch.equal(read[name], wire[name]) for name in wire)
    assert step.version == version
    assert version.digest == Digest.total(tensor_digest(name, tensor) for name, tensor in wire.items())
    assert step.bytes == sum(tensor.nbytes for tensor in wire.values())
    assert len(step.files) > 1
    assert entries(tmp_path / "steps") == [STEP], "nothing else is left"


def test_the_safetensors_library_reads_what_is_written(tmp_path: Path) -> None:
    step = read_step(write(tmp_path))
    library = {name: tensor for file in step.files for name, tensor in load_file(step.path / file).items()}
    assert library.keys() == set(step.names)
    assert all(torch.equal(library[name], tensor) for name, tensor in step.tensors())


def test_tensors_come_and_go_as_they_like(tmp_path: Path) -> None:
    """Transposed, overlapping, empty, scalar, given one by one and dropped: each is written as it was."""

    def pairs() -> Iterator[tuple[str, Tensor]]:
        whole = torch.arange(12.0).reshape(3, 4)
        yield "transposed", whole.T
        yield "overlapping", whole[1:]
        yield "flat", whole.reshape(-1)
        yield "empty", torch.empty(0, 5)
        yield "scalar", torch.tensor(2.5)
        for index in range(20):
            yield f"gathered.{index}", torch.full((1000,), index, dtype=torch.int16)

    write_step(pairs(), tmp_path, run="run", step=3, file_bytes=4096)
    read = dict(read_step(tmp_path / STEP).tensors())
    assert read.keys() == dict(pairs()).keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in pairs())


def test_a_learner_that_trains_on_meanwhile_has_written_what_it_gave(tmp_path: Path) -> None:
    weight = torch.zeros(1000)

    def pairs() -> Iterator[tuple[str, Tensor]]:
        yield "weight", weight
        weight.add_(1)
        yield "bias", torch.ones(10)

    write_step(pairs(), tmp_path, run="run", step=3)
    assert torch.equal(dict(read_step(tmp_path / STEP).tensors())["weight"], torch.zeros(1000))


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="w comes twice"):
        write_step([("w", torch.ones(1)), ("w", torch.ones(2))], tmp_path, run="run", step=3)
    assert entries(tmp_path) == []


def test_a_reader_never_sees_a_step_that_is_not_whole(tmp_path: Path) -> None:
    done = threading.Event()
    wrong: list[str] = []
    seen: set[int] = set()

    def look() -> None:
        while not done.is_set():
            for path in step_paths(tmp_path):
                try:
                    seen.add(read_step(path).version.step)
                except FolderError as error:
                    wrong.append(str(error))

    reader = threading.Thread(target=look)
    reader.start()
    for step in range(15):
        write(tmp_path, seed=step, step=step)
    while len(seen) < 15 and not wrong:
        reader.join(0.01)
    done.set()
    reader.join()
    assert not wrong
    assert seen == set(range(15))


def test_everything_is_on_the_disk_before_the_step_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync, rename = os.fsync, os.rename

    def recording_sync(descriptor: int) -> None:
        order.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        sync(descriptor)

    def recording_rename(source: Path, target: Path) -> None:
        order.append("renamed")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recording_sync)
    monkeypatch.setattr(os, "rename", recording_rename)
    files = read_step(write(tmp_path)).files
    hidden = f".{STEP}.tmp"
    assert order == [*(f"{hidden}/{file}" for file in files), f"{hidden}/version.yaml", hidden, "renamed", "."]


# Not there.


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_bytes_leaves_nothing_of_the_step(tmp_path: Path) -> None:
    before = read_step(write(tmp_path, step=2)).version
    with (
        file_size_limit(1 << 16),
        pytest.raises(FolderError, match=r"could not be written.*File too large.*MiB free") as caught,
    ):
        write_step({"w": torch.ones(100_000)}, tmp_path, run="run", step=3)
    assert str(tmp_path / STEP) in str(caught.value)
    assert entries(tmp_path) == [step_name(2)]
    assert read_step(tmp_path / step_name(2)).version == before
    write(tmp_path, step=3)


@pytest.mark.parametrize("failing", range(5))
def test_a_disk_that_is_full_at_any_fsync_leaves_nothing_of_the_step(
    tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three files, version.yaml and the folder itself: delayed allocation fails at any of them."""
    synced = 0

    def full(_descriptor: int) -> None:
        nonlocal synced
        if synced == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced += 1

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FolderError, match=r"nothing of it is left there: .*No space left on device.*MiB free"):
            write_step(three_tensors(), tmp_path, run="run", step=3, file_bytes=64)
    assert entries(tmp_path) == []
    write_step(three_tensors(), tmp_path, run="run", step=3, file_bytes=64)
    read_step(tmp_path / STEP)


def test_a_source_that_breaks_off_leaves_nothing_of_the_step(tmp_path: Path) -> None:
    def breaking() -> Iterator[tuple[str, Tensor]]:
        yield "w0", torch.ones(16)
        yield "w1", torch.ones(16)
        raise ConnectionError("a rank is gone")

    with pytest.raises(ConnectionError, match="a rank is gone"):
        write_step(breaking(), tmp_path, run="run", step=3, file_bytes=64)
    assert entries(tmp_path) == []


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ({}, "step 3 has no tensors"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "w: torch.complex64 cannot be sent"),
        ({"": torch.ones(2)}, "a tensor's name is 1 to"),
        ({"model.experts.down_proj": torch.ones(2)}, r"stacked experts are \[E"),
    ],
)
def test_a_source_that_cannot_be_sent_is_the_callers_mistake(
    tmp_path: Path, source: dict[str, Tensor], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        write_step(source, tmp_path, run="run", step=3)
    assert entries(tmp_path) == []


@pytest.mark.parametrize(("run", "step"), [("a b", 3), ("run", -1), ("run", 1 << 63)])
def test_a_version_that_cannot_be_is_refused_before_anything_is_touched(tmp_path: Path, run: str, step: int) -> None:
    with pytest.raises(ValueError):
        write_step(learner_state(1), tmp_path / "steps", run=run, step=step)
    assert entries(tmp_path) == []


def test_a_folder_whose_parent_is_gone_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"No such file or directory.*out of reach"):
        write(tmp_path / "unmounted" / "steps")
    assert entries(tmp_path) == []


def test_a_folder_that_vanishes_under_the_writer_is_one_error(tmp_path: Path) -> None:
    def removing() -> Iterator[tuple[str, Tensor]]:
        yield "w0", torch.ones(16)
        shutil.rmtree(tmp_path / "steps")
        yield "w1", torch.ones(16)

    with pytest.raises(FolderError, match="could not be written"):
        write_step(removing(), tmp_path / "steps", run="run", step=3, file_bytes=64)
    assert entries(tmp_path) == []


# Several writers.


def learner(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "fakes.disk_learner", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", "OMP_NUM_THREADS": "1"},
    )


def test_a_second_writer_is_refused_and_a_dead_ones_leavings_are_swept(tmp_path: Path) -> None:
    first = learner("stop", str(tmp_path), "run", "3")
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "waiting\n"
        assert step_paths(tmp_path) == ()
        owner = f"being written by process {first.pid} on {socket.gethostname()}"
        with pytest.raises(FolderError, match=rf"{STEP}: is {owner}; a step has one writer"):
            write(tmp_path)
        write(tmp_path, step=4)
        assert entries(tmp_path) == [f".{STEP}.lock", f".{STEP}.tmp", step_name(4)], "a living writer's are let be"
    finally:
        first.kill()
        first.wait()
        assert first.stdout is not None
        first.stdout.close()
    assert entries(tmp_path) == [f".{STEP}.lock", f".{STEP}.tmp", step_name(4)]
    write(tmp_path, step=5)
    assert entries(tmp_path) == [step_name(4), step_name(5)]
    read_step(write(tmp_path, step=3))


def test_a_writer_that_is_killed_at_any_moment_leaves_a_whole_step_or_none(tmp_path: Path) -> None:
    process = learner("die", str(tmp_path), "run", "3")
    assert process.stdout is not None
    process.communicate(timeout=120)
    assert process.returncode == 0
    deaths = entries(tmp_path)
    assert len(deaths) == 8, (
        "before each fsync: the new folder's, three files', version.yaml's, the step's, the rename's"
    )
    whole = []
    for death in sorted(deaths, key=int):
        folder = tmp_path / death
        whole.append([read_step(path).version.step for path in step_paths(folder)])
        write(folder, step=4)
        assert [name for name in entries(folder) if name.startswith(".")] == []
    assert whole == [[], [], [], [], [], [], [3], [3]]


def test_of_many_writers_at_once_one_writes_the_step(tmp_path: Path) -> None:
    start = threading.Barrier(6)
    outcomes: list[str] = []

    def one(seed: int) -> None:
        start.wait()
        try:
            write(tmp_path, seed=seed)
            outcomes.append("written")
        except FolderError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("written") == 1
    assert all("being written by" in said or "is there already" in said for said in outcomes if said != "written")
    assert entries(tmp_path) == [STEP]
    read_step(tmp_path / STEP)


def test_a_step_is_never_replaced(tmp_path: Path) -> None:
    before = read_step(write(tmp_path)).version
    with pytest.raises(FolderError, match=f"{STEP}: is there already, and a step is never replaced"):
        write(tmp_path, seed=2)
    assert read_step(tmp_path / STEP).version == before


def test_a_restarted_learner_is_told_when_its_steps_would_never_be_served(tmp_path: Path) -> None:
    write(tmp_path, step=50, run="first")
    with pytest.raises(FolderError, match=r"holds step-0000000050 of run first.* of run second never would be"):
        write(tmp_path, step=41, run="second")
    write(tmp_path, step=41, run="first")
    write(tmp_path, step=51, run="second")
    say(tmp_path / step_name(51), step="?")
    with pytest.raises(FolderError, match="holds step-0000000050"):
        write(tmp_path, step=42, run="second")
    assert entries(tmp_path) == [step_name(step) for step in (41, 50, 51)]


# One error.


def swap_content(step: Path) -> None:
    other = write(step.parent.parent / "other", seed=2)
    for file in other.glob("*.safetensors"):
        shutil.copy(file, step / file.name)


def flip_a_bit(step: Path) -> None:
    file = step / "tensors-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def link_a_file(step: Path) -> None:
    file = step / "tensors-00001.safetensors"
    file.rename(step.parent.parent / "elsewhere.safetensors")
    os.symlink(step.parent.parent / "elsewhere.safetensors", file)


def link_a_file_inside(step: Path) -> None:
    os.rename(step / "tensors-00001.safetensors", step / "real.safetensors")
    os.symlink("real.safetensors", step / "tensors-00001.safetensors")


def link_the_version(step: Path) -> None:
    os.rename(step / "version.yaml", step / "real.yaml")
    os.symlink("real.yaml", step / "version.yaml")


def link_the_step(step: Path) -> None:
    os.rename(step, step.parent.parent / "elsewhere")
    os.symlink(step.parent.parent / "elsewhere", step)


def make_a_fifo(step: Path) -> None:
    os.unlink(step / "tensors-00001.safetensors")
    os.mkfifo(step / "tensors-00001.safetensors")


def make_a_folder(step: Path) -> None:
    os.unlink(step / "tensors-00001.safetensors")
    os.mkdir(step / "tensors-00001.safetensors")


def repeat_a_tensor(step: Path) -> None:
    shutil.copy(step / "tensors-00001.safetensors", step / "again.safetensors")
    say(step, files=[*said(step)["files"], "again.safetensors"])


def add_a_tensor(step: Path) -> None:
    save_file({"more": torch.ones(2)}, step / "more.safetensors")
    say(step, files=[*said(step)["files"], "more.safetensors"])


def truncate(step: Path) -> None:
    os.truncate(step / "tensors-00001.safetensors", 1000)


def pickle_it(step: Path) -> None:
    torch.save({"w": torch.ones(3)}, step / "tensors-00001.safetensors")


BREAK: dict[str, tuple[Callable[[Path], object], str]] = {
    "no version.yaml": (
        lambda step: os.unlink(step / "version.yaml"),
        r"version\.yaml: cannot be opened: No such file",
    ),
    "not a mapping": (lambda step: (step / "version.yaml").write_text("- 3"), r"version\.yaml: expected a mapping"),
    "no step": (lambda step: (step / "version.yaml").write_text("run: r"), "no step, no digest, no files"),
    "another step's": (lambda step: say(step, step=4), "is of step 4, which belongs into step-0000000004, not step-"),
    "digest of something else": (lambda step: say(step, digest="ab" * 16), f"version.yaml says {'ab' * 16}"),
    "content of something else": (swap_content, "its tensors have digest"),
    "a bit flipped": (flip_a_bit, "its tensors have digest"),
    "a tensor more": (add_a_tensor, "its tensors have digest"),
    "a file fewer": (lambda step: say(step, files=["tensors-00001.safetensors"]), "its tensors have digest"),
    "path out": (lambda step: say(step, files=["../x.safetensors"]), "is not the name of a .safetensors file in this"),
    "file missing": (lambda step: say(step, files=["x.safetensors"]), "x.safetensors: cannot be opened: No such file"),
    "file linked out": (link_a_file, "tensors-00001.safetensors: is a symbolic link"),
    "file linked inside": (link_a_file_inside, "tensors-00001.safetensors: is a symbolic link"),
    "version linked": (link_the_version, "version.yaml: is a symbolic link"),
    "step linked": (link_the_step, "is a symbolic link; give the folder that it points to"),
    "a fifo": (make_a_fifo, "tensors-00001.safetensors: is not a file"),
    "a folder": (make_a_folder, "tensors-00001.safetensors: is not a file"),
    "a tensor twice": (repeat_a_tensor, "holds tensors that another file holds"),
    "truncated": (truncate, "not a whole safetensors file"),
    "a pickle": (pickle_it, "not a whole safetensors file"),
    "gone": (shutil.rmtree, "cannot be opened as a folder: No such file"),
}


@pytest.mark.parametrize("how", BREAK)
def test_a_bad_step_is_one_error_that_names_it(tmp_path: Path, how: str) -> None:
    step = write(tmp_path / "steps")
    breaks, says = BREAK[how]
    breaks(step)
    with pytest.raises(FolderError, match=says) as caught:
        read_step(step)
    assert str(step) in str(caught.value)
    assert "\n" not in str(caught.value) or "YAML" in str(caught.value)


def test_content_that_changes_after_it_was_found_sound_shows_before_its_last_tensor_is_had(tmp_path: Path) -> None:
    step = read_step(write(tmp_path / "steps"))
    swap_content(step.path)
    taken: list[str] = []
    with pytest.raises(FolderError, match="its tensors have digest"):
        dict(noted(step.tensors(), taken))
    assert taken == list(step.names)


def noted(pairs: Iterator[tuple[str, Tensor]], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in pairs:
        names.append(name)
        yield name, tensor


def test_a_step_that_was_exported_under_another_name_is_read(tmp_path: Path) -> None:
    version = read_step(write(tmp_path)).version
    os.rename(tmp_path / STEP, tmp_path / "best")
    (tmp_path / "best" / "config.json").write_text("{}")
    assert read_step(tmp_path / "best").version == version
    os.rename(tmp_path / "best", tmp_path / "step-3")
    with pytest.raises(FolderError, match="belongs into step-0000000003, not step-3"):
        read_step(tmp_path / "step-3")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("fuzzed"))


@settings(max_examples=300)
@given(
    st.binary(max_size=120)
    | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.fixed_dictionaries(
        {
            "step": st.integers() | st.text(max_size=5),
            "run": st.text(max_size=5),
            "digest": st.text("0123456789abcdef", min_size=31, max_size=33),
            "files": st.lists(st.text("./ax\\", max_size=6).map(lambda stem: f"{stem}.safetensors"), max_size=3),
        }
    ).map(lambda plain: yaml.safe_dump(plain).encode())
)
def test_any_version_yaml_gives_a_step_or_one_error(fuzzed: Path, data: bytes) -> None:
    (fuzzed / "version.yaml").write_bytes(data)
    try:
        read_step(fuzzed)
    except FolderError as error:
        said = str(error)
    else:
        return
    assert str(fuzzed) in said


# Names.


@given(st.integers(0, (1 << 63) - 1))
def test_a_steps_name_says_its_step(step: int) -> None:
    assert parse_step_name(step_name(step)) == step


@given(st.text("step-0123456789x", max_size=26) | st.from_regex(r"step-\d{1,21}", fullmatch=True))
def test_a_name_that_is_not_exactly_a_steps_is_none(name: str) -> None:
    step = parse_step_name(name)
    assert step is None or step_name(step) == name


def test_the_newest_is_the_highest_step_beyond_ten_digits_too(tmp_path: Path) -> None:
    assert latest_step(tmp_path) is None
    for name in (step_name(9), step_name(10), step_name(10**10), "step-11", ".step-0000000012.tmp", "step-0000000013x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in step_paths(tmp_path)] == [step_name(10**10), step_name(10), step_name(9)]
