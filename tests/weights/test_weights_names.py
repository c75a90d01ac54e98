"""The public face of the package: changed on purpose or not at all."""

import weights
import weights.disk

PUBLIC = """
Catalogue CommitIncomplete DeadlineExceeded Digest Digests ExpertRows FolderError HostTimes HostedLayout HostedSlice
Manifest ManifestError MessageError PublishReport Publisher Publishing Receiver Roster RosterError RosterHost Rows Rule
Serving Sibling State TensorSpec TransportError UpdateAborted WeightVersion WeightsError Whole gathered rounded
runtime_directory take_part tensor_digest to_wire
"""


DISK = """
DEFAULT_FILE_BYTES VERSION_FILE CheckpointFolder StepFolder VersionFile latest_step parse_step_name read_checkpoint
read_step step_name step_paths write_step
"""


def test_the_public_names_are_these() -> None:
    assert weights.__all__ == PUBLIC.split()
    assert all(hasattr(weights, name) for name in weights.__all__)
    assert weights.disk.__all__ == DISK.split()
    assert all(hasattr(weights.disk, name) for name in weights.disk.__all__)


def test_no_public_name_hides_a_module() -> None:
    assert callable(weights.tensor_digest)
    for module in ("plan", "bucket", "digest", "manifest", "messages", "receiver", "publisher"):
        assert getattr(weights, module).__name__ == f"weights.{module}"
    for module in ("step_names", "step_writer", "step_folder", "version_file", "checkpoint_folder"):
        assert getattr(weights.disk, module).__name__ == f"weights.disk.{module}"
