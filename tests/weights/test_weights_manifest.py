"""Versions and manifests: bound to content, ordered within a run, and refused when malformed."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weights import errors
from weights.digest import Digest, tensor_digest
from weights.errors import ManifestError
from weights.manifest import Manifest, TensorEntry
from weights.version import WeightVersion

D = Digest(0x0123456789ABCDEF, 2)


def entry(name: str, seed: int = 0) -> TensorEntry:
    tensor = torch.full((2, 3), float(seed))
    return TensorEntry(name=name, shape=(2, 3), dtype=tensor.dtype, digest=tensor_digest(name, tensor))


def test_a_version_reads_as_run_step_and_digest() -> None:
    assert str(WeightVersion(run="run-7", step=43, digest=D)) == "run-7@43:01234567"


def test_versions_are_ordered_by_step_within_a_run() -> None:
    old, new = WeightVersion(run="r", step=1, digest=D), WeightVersion(run="r", step=2, digest=D)
    assert old < new
    assert old <= new
    assert new > old
    assert new >= old
    assert max(new, old) == new
    assert old != WeightVersion(run="r", step=1, digest=Digest(0, 0))


def test_versions_of_different_runs_have_no_order() -> None:
    first, second = WeightVersion(run="r", step=1, digest=D), WeightVersion(run="s", step=2, digest=D)
    with pytest.raises(ValueError, match="different runs"):
        assert first < second


@pytest.mark.parametrize("run", ["", "a@b", "a b", "a/b", "-a", "a" * 129, "a\n"])
def test_a_run_that_would_not_read_back_is_refused(run: str) -> None:
    with pytest.raises(ValueError, match="a run is named"):
        WeightVersion(run=run, step=0, digest=D)


@pytest.mark.parametrize("step", [-1, 1 << 63])
def test_a_step_out_of_range_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match="a step is in"):
        WeightVersion(run="r", step=step, digest=D)


def test_a_version_survives_plain_data() -> None:
    version = WeightVersion(run="r", step=3, digest=D)
    assert WeightVersion.from_plain(version.to_plain()) == version


@pytest.mark.parametrize(
    "plain",
    [
        None,
        [],
        {},
        {"run": "r", "step": 1},
        {"run": "r", "step": True, "digest": D.hex},
        {"run": "r", "step": 1.0, "digest": D.hex},
        {"run": 1, "step": 1, "digest": D.hex},
        {"run": "r", "step": 1, "digest": "x"},
        {"run": "r", "step": 1, "digest": D.hex, "more": 1},
    ],
)
def test_a_malformed_version_is_refused(plain: object) -> None:
    with pytest.raises(ValueError):
        WeightVersion.from_plain(plain)


def test_a_manifest_adds_up_its_tensors_in_any_order() -> None:
    manifest = Manifest((entry("a"), entry("b", 1)))
    assert manifest.bytes == 48
    assert manifest.digest == entry("a").digest + entry("b", 1).digest
    assert manifest.digest == Manifest(manifest.entries[::-1]).digest


def test_a_manifest_survives_plain_data() -> None:
    manifest = Manifest((entry("a"), entry("b", 1), TensorEntry(name="c", shape=(), dtype=torch.bool, digest=D)))
    assert Manifest.from_plain(manifest.to_plain()) == manifest


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (["a", [2], "float32"], "expected .name"),
        (["a", [2], "float32", D.hex, 1], "expected .name"),
        (["a", [2.0], "float32", D.hex], "expected .name"),
        (["a", [True], "float32", D.hex], "expected .name"),
        (["a", 2, "float32", D.hex], "expected .name"),
        (["a", "2", "float32", D.hex], "expected .name"),
        ([1, [2], "float32", D.hex], "expected .name"),
        (None, "expected .name"),
        (["a", [2], "complex64", D.hex], "dtype 'complex64' is unknown"),
        (["a", [2], "float32", "no"], "32 lower-case"),
        (["", [2], "float32", D.hex], "printable"),
        (["a\n", [2], "float32", D.hex], "printable"),
        (["a" * 513, [2], "float32", D.hex], "printable"),
        (["a", [-2], "float32", D.hex], "none negative"),
        (["a", [1] * 9, "float32", D.hex], "at most 8"),
        (["a", [1 << 40, 1 << 40], "float32", D.hex], "2.50 bytes"),
    ],
)
def test_a_malformed_row_is_refused(row: object, complaint: str) -> None:
    with pytest.raises(ManifestError, match=complaint):
        Manifest.from_plain([row])


@pytest.mark.parametrize("plain", [None, 3, "rows", {"a": 1}])
def test_what_is_no_list_is_no_manifest(plain: object) -> None:
    with pytest.raises(ManifestError, match="a list of tensors"):
        Manifest.from_plain(plain)


def test_an_entry_of_a_dtype_that_the_wire_does_not_know_is_refused() -> None:
    with pytest.raises(ManifestError, match="cannot be sent"):
        TensorEntry(name="a", shape=(1,), dtype=torch.complex64, digest=D)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(JSON)
def test_any_plain_data_is_a_manifest_or_a_manifest_error(plain: object) -> None:
    try:
        manifest = Manifest.from_plain(plain)
    except ManifestError:
        return
    assert Manifest.from_plain(manifest.to_plain()) == manifest


def test_every_error_survives_pickling() -> None:
    samples = [
        errors.WeightsError("w"),
        errors.ManifestError("m"),
        errors.MessageError("g"),
        errors.RosterError("r"),
        errors.FolderError("f"),
        errors.TransportError("t"),
        errors.PeerGone("p"),
        errors.DeadlineExceeded("d"),
        errors.UpdateAborted("aborted", {"b": "why"}),
        errors.CommitIncomplete("incomplete", ("a",), {"b": "torn"}, {"c": "unknown"}),
    ]
    assert {type(sample) for sample in samples} == {
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)
    }
    for sample in samples:
        again = pickle.loads(pickle.dumps(sample))
        assert (type(again), str(again), vars(again)) == (type(sample), str(sample), vars(sample))
