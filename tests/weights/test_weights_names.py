"""The public face of the package: changed on purpose or not at all."""

import weights

PUBLIC = """
CommitIncomplete DeadlineExceeded Digest ExpertRows HostTimes HostedLayout HostedSlice Manifest ManifestError
MessageError PublishReport Publisher Receiver Roster RosterError RosterHost Rows Rule Serving Sibling State TensorEntry
TransportError UpdateAborted WeightVersion WeightsError Whole runtime_directory tensor_digest to_wire
"""


def test_the_public_names_are_these() -> None:
    assert weights.__all__ == PUBLIC.split()
    assert all(hasattr(weights, name) for name in weights.__all__)


def test_no_public_name_hides_a_module() -> None:
    assert callable(weights.tensor_digest)
    for module in ("plan", "bucket", "digest", "manifest", "messages", "receiver", "publisher"):
        assert getattr(weights, module).__name__ == f"weights.{module}"
