"""moe-rollout publish: streams a checkpoint, or a step that a learner wrote, into a running fleet."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from rollout.cli.fault import described
from rollout.cli.terminal import amount, progress, show, show_json, show_table
from rollout.errors import ConfigError
from rollout.model.checkpoint import read_config
from rollout.model.families import decoder_spec
from weights.disk import VERSION_FILE, CheckpointFolder, StepFolder, read_checkpoint, read_step
from weights.errors import UpdateAborted
from weights.publisher import Publisher
from weights.report import PublishReport

NAME = "publish"
SUMMARY = "bring every host of a running fleet to a checkpoint's weights"
DESCRIPTION = """\
Streams a folder's tensors into all hosts of a fleet on this machine: all of them take the new version, or none does and
what they served serves on. The folder is a Hugging Face checkpoint of the model that they host, or a step folder with a
version.yaml, which brings its run and step along.

  moe-rollout publish checkpoints/step-400 --fleet grpo-run-7 --step 400"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument("folder", metavar="FOLDER", help="a checkpoint, or a step folder")
    parser.add_argument("--fleet", metavar="NAME", required=True, help="to publish to")
    parser.add_argument("--step", type=int, help="of a checkpoint: the step that hosts will report (default: 0)")
    parser.add_argument("--run", dest="run_id", metavar="RUN", help="of a checkpoint: the run; a new one unless said")
    parser.add_argument("--json", action="store_true", help="one line of JSON in place of a report")


def run(arguments: argparse.Namespace) -> int:
    """Publishes, with a bar, and reports."""
    folder = Path(arguments.folder)
    source = source_of(folder)
    run_id, step = arguments.run_id, 0 if arguments.step is None else arguments.step
    if isinstance(source, StepFolder):
        if arguments.step is not None or arguments.run_id is not None:
            raise ConfigError(f"{folder} says itself which step it is ({source.version}): leave --step and --run out")
        run_id, step = source.version.run, source.version.step
    with Publisher.connect(arguments.fleet, run=run_id) as publisher:
        try:
            report = publisher.publish(_read(source), step)
        except UpdateAborted as error:
            text = (
                f"{folder} was not taken by fleet {arguments.fleet}, which serves on as before; publish a checkpoint "
                f"of the model that it hosts, in its dtype or one that widens to it: {described(error)}"
            )
            raise UpdateAborted(text, error.hosts) from error
    if arguments.json:
        show_json(plain(report))
    else:
        show_report(report)
    return 0


def source_of(folder: Path) -> StepFolder | CheckpointFolder:
    """What the folder holds, its headers checked.

    Raises:
        FolderError: no such folder, or nothing in it that can be published.
        ValueError: a checkpoint whose config.json is of no model that can be hosted.
    """
    if (folder / VERSION_FILE).exists():
        return read_step(folder, content=False)  # publishing reads and hashes everything anyway
    source = read_checkpoint(folder)
    if not (folder / "config.json").exists():
        return source
    spec = decoder_spec(read_config(folder))
    extra = tuple(f"model.layers.{len(spec.layers) + index}." for index in range(spec.extra_layers))
    return read_checkpoint(folder, without=extra) if extra else source


def _read(source: StepFolder | CheckpointFolder) -> Iterator[tuple[str, Tensor]]:
    with progress("tensors") as bar:
        task = bar.add_task("reading", total=len(source.names))
        for name, tensor in source.tensors():
            yield name, tensor
            bar.advance(task)
        bar.update(task, description="hosts check and commit")


def show_report(report: PublishReport) -> None:
    """What was published, how long each phase took, and how long each host paused."""
    show(f"published {report.version}: {amount(report.bytes)} to {len(report.hosts)} hosts in {report.seconds:.3f} s")
    show("phases: " + ", ".join(f"{phase} {seconds:.3f} s" for phase, seconds in report.phases.items()))
    rows = [
        (host, f"{times.pause_s:.3f} s", f"{times.copy_s:.3f} s", f"{times.verify_s:.3f} s")
        for host, times in report.hosts.items()
    ]
    show_table("", ("host", "requests paused", "of that copying", "verifying"), rows)


def plain(report: PublishReport) -> dict[str, object]:
    """For JSON."""
    return {
        "version": str(report.version),
        "bytes": report.bytes,
        "seconds": report.seconds,
        "phases": dict(report.phases),
        "hosts": {
            host: {"pause_s": times.pause_s, "copy_s": times.copy_s, "verify_s": times.verify_s}
            for host, times in report.hosts.items()
        },
    }
