"""Versions and manifests: bound to content, ordered within a run, and refused when malformed."""

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weights import errors
from weights.catalogue import Catalogue, TensorSpec
from weights.digest import Digest, tensor_digest
from weights.digests import Digests
from weights.errors import ManifestError
from weights.manifest import Manifest
from weights.version import WeightVersion

D = Digest(0x0123456789ABCDEF, 2)


def entry(name: str, seed: int = 0) -> tuple[TensorSpec, Digest]:
    tensor = torch.full((2, 3), float(seed))
    return TensorSpec(name=name, shape=(2, 3), dtype=tensor.dtype), tensor_digest(name, tensor)


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
    manifest = Manifest.of([entry("a"), entry("b", 1)])
    assert manifest.bytes == 48
    assert manifest.digest == entry("a")[1] + entry("b", 1)[1]
    assert manifest.digest == Manifest.of([entry("b", 1), entry("a")]).digest


def test_a_manifest_has_a_digest_for_each_tensor() -> None:
    with pytest.raises(ManifestError, match="2 tensors and 1 digests"):
        Manifest(Catalogue([entry("a")[0], entry("b")[0]]), Digests.of([D]))


def test_digests_survive_packing_lanes_and_text() -> None:
    several = [D, Digest(0, 0), Digest((1 << 64) - 1, 1 << 63)]
    packed = Digests.of(several)
    assert [packed[place] for place in range(len(packed))] == several
    assert Digests.of_lanes(packed.lanes) == packed
    assert Digests.from_hex(packed.hex) == packed
    assert packed.total == Digest.total(several)
    assert Digests.of([]).total == Digest(0, 0)


def test_digests_name_the_places_where_they_differ() -> None:
    assert Digests.of([D, D, D]).differing(Digests.of([D, Digest(1, 2), D])) == [1]
    assert Digests.of([D]).differing(Digests.of([D])) == []


@pytest.mark.parametrize("text", ["0", "xy", "00" * 15, "00" * 17])
def test_text_that_is_no_whole_number_of_digests_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Digests.from_hex(text)


def test_a_subset_takes_the_place_of_the_same_names() -> None:
    whole = Manifest.of([entry("a"), entry("b"), entry("c")])
    patched = whole.patched(Manifest.of([entry("c", 7), entry("a", 8)]))
    assert patched == Manifest.of([entry("a", 8), entry("b"), entry("c", 7)])


def test_a_subset_may_come_in_another_dtype() -> None:
    half = torch.zeros(2, 3, dtype=torch.bfloat16)
    other = TensorSpec(name="b", shape=(2, 3), dtype=half.dtype), tensor_digest("b", half)
    whole = Manifest.of([entry("a"), entry("b")])
    assert whole.patched(Manifest.of([other])) == Manifest.of([entry("a"), other])


def test_a_subset_of_tensors_that_the_base_has_not_is_refused() -> None:
    with pytest.raises(ManifestError, match="no such tensors: x, y"):
        Manifest.of([entry("a")]).patched(Manifest.of([entry("x"), entry("a"), entry("y")]))


def test_a_catalogue_survives_plain_data() -> None:
    catalogue = Catalogue([entry("a")[0], TensorSpec(name="c", shape=(), dtype=torch.bool)])
    read = Catalogue.from_plain(catalogue.to_plain())
    assert read == catalogue
    assert read.id == catalogue.id


def test_catalogues_that_differ_in_anything_have_other_ids() -> None:
    a, b = TensorSpec(name="a", shape=(2,), dtype=torch.bool), TensorSpec(name="b", shape=(2,), dtype=torch.bool)
    wider = TensorSpec(name="a", shape=(2,), dtype=torch.float32)
    longer = TensorSpec(name="a", shape=(2, 1), dtype=torch.bool)
    ids = {Catalogue(tensors).id for tensors in ([], [a], [b], [a, b], [b, a], [wider], [longer], [a, a])}
    assert len(ids) == 8


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (["a", [2]], "expected .name"),
        (["a", [2], "float32", 1], "expected .name"),
        (["a", [2.0], "float32"], "expected .name"),
        (["a", [True], "float32"], "expected .name"),
        (["a", 2, "float32"], "expected .name"),
        (["a", "2", "float32"], "expected .name"),
        ([1, [2], "float32"], "expected .name"),
        (None, "expected .name"),
        (["a", [2], "complex64"], "dtype 'complex64' is unknown"),
        (["", [2], "float32"], "printable"),
        (["a\n", [2], "float32"], "printable"),
        (["a" * 513, [2], "float32"], "printable"),
        (["a", [-2], "float32"], "none negative"),
        (["a", [1] * 9, "float32"], "at most 8"),
        (["a", [1 << 40, 1 << 40], "float32"], "2.50 bytes"),
    ],
)
def test_a_malformed_row_is_refused(row: object, complaint: str) -> None:
    with pytest.raises(ManifestError, match=complaint):
        Catalogue.from_plain([row])


@pytest.mark.parametrize("plain", [None, 3, "rows", {"a": 1}])
def test_what_is_no_list_is_no_catalogue(plain: object) -> None:
    with pytest.raises(ManifestError, match="a list of tensors"):
        Catalogue.from_plain(plain)


def test_a_tensor_of_a_dtype_that_the_wire_does_not_know_is_refused() -> None:
    with pytest.raises(ManifestError, match="cannot be sent"):
        TensorSpec(name="a", shape=(1,), dtype=torch.complex64)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(JSON)
def test_any_plain_data_is_a_catalogue_or_a_manifest_error(plain: object) -> None:
    try:
        catalogue = Catalogue.from_plain(plain)
    except ManifestError:
        return
    assert Catalogue.from_plain(catalogue.to_plain()) == catalogue


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
        errors.DeviceFull("f"),
        errors.UpdateAborted("aborted", {"b": "why"}),
        errors.CommitIncomplete("incomplete", ("a",), {"b": "torn"}, {"c": "unknown"}),
    ]
    assert {type(sample) for sample in samples} == {
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)
    }
    for sample in samples:
        again = pickle.loads(pickle.dumps(sample))
        assert (type(again), str(again), vars(again)) == (type(sample), str(sample), vars(sample))
