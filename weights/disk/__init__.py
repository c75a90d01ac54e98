"""Weights in a folder: the step folders that a learner writes and a fleet takes up, and Hugging Face checkpoints."""

from weights.disk.checkpoint_folder import CheckpointFolder, read_checkpoint
from weights.disk.step_folder import StepFolder, read_step
from weights.disk.step_names import latest_step, parse_step_name, step_name, step_paths
from weights.disk.step_writer import DEFAULT_FILE_BYTES, write_step
from weights.disk.version_file import VERSION_FILE, VersionFile

__all__ = [
    "DEFAULT_FILE_BYTES",
    "VERSION_FILE",
    "CheckpointFolder",
    "StepFolder",
    "VersionFile",
    "latest_step",
    "parse_step_name",
    "read_checkpoint",
    "read_step",
    "step_name",
    "step_paths",
    "write_step",
]
