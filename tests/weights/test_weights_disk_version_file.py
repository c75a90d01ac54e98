"""version.yaml: whatever its bytes are, it is a version and names of files, or one error."""

import string

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weights.digest import Digest
from weights.disk import VersionFile
from weights.version import WeightVersion

GOOD: dict[str, object] = {"step": 3, "run": "a", "digest": "0" * 31 + "1", "files": ["x.safetensors"]}

names = st.text(string.ascii_letters + string.digits + "-_ é", min_size=1, max_size=20).map(
    lambda stem: f"{stem}.safetensors"
)
versions = st.builds(
    WeightVersion,
    run=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,127}", fullmatch=True),
    step=st.integers(0, (1 << 63) - 1),
    digest=st.builds(Digest, st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1)),
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=4),
    max_leaves=12,
)


@given(versions, st.lists(names, min_size=1, max_size=5, unique=True))
@example(WeightVersion(run="1e5", step=0, digest=Digest(0, 8)), ["0x1.safetensors"])
@example(WeightVersion(run="null", step=0, digest=Digest(int("12345678901234e1", 16), 0)), ["~.safetensors"])
def test_what_is_written_is_what_is_read(version: WeightVersion, files: list[str]) -> None:
    said = VersionFile(version=version, files=tuple(files))
    assert VersionFile.parse(said.to_yaml().encode()) == said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "expected a mapping of step, run, digest, files, got None"),
        ("[1, 2]", "expected a mapping .* got a list"),
        ("a: [", "not YAML of plain values"),
        ("step: !!python/object/apply:os.system ['true']", "not YAML of plain values"),
        ("step: !!int ''", "not YAML of plain values"),
        ("step: !!timestamp x", "not YAML of plain values"),
        ("step: !!bool maybe", "not YAML of plain values"),
        ("step: " + "9" * 5000, "not YAML of plain values"),
        ("[" * 60000, "nested deeper than a list in a mapping"),
        ("? " * 9000, "nested deeper than a list in a mapping"),
        ("- " * 9000, "nested deeper than a list in a mapping"),
        ("a: &a [x, x]\nb: &b [*a, *a]\n", "aliases"),
        ("a: &a {x: 1}\n<<: [*a, *a]\n", "aliases"),
        ("\x00", "not YAML of plain values"),
        ("# " + "x" * (64 << 10), "more than 65536 bytes"),
    ],
)
def test_what_is_no_mapping_of_plain_values_is_refused(content: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        VersionFile.parse(content.encode())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"step": None}, r"step: expected a whole number in \[0, 2\^63\), got None"),
        ({"step": True}, "step: .* got True"),
        ({"step": "3"}, "step: .* got '3'"),
        ({"step": -1}, "step: .* got -1"),
        ({"step": 1 << 63}, "step: .* got 9223372036854775808"),
        ({"step": [[[]]]}, "step: .* got a list"),
        ({"run": 7}, "run: expected text .* in quotes, got 7"),
        ({"run": "a b"}, "run: .* got 'a b'"),
        ({"run": "a" * 200}, r"run: .* got 'a{80}'\.\.\."),
        ({"digest": 12345678}, "digest: expected 32 lower-case hexadecimal digits, in quotes, got 12345678"),
        ({"digest": "A" * 32}, "digest: expected 32 lower-case"),
        ({"files": []}, "files: expected a list of names, at least one"),
        ({"files": "x.safetensors"}, "files: expected a list of names"),
        ({"files": ["x.safetensors", "x.safetensors"]}, "named twice: 'x.safetensors'"),
        ({"size": 3}, "unknown keys 'size'; known are step, run, digest, files"),
    ],
)
def test_a_field_that_cannot_be_is_named(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        VersionFile.parse(yaml.safe_dump(GOOD | changes).encode())


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/x.safetensors",
        "..",
        ".safetensors",
        ".hidden.safetensors",
        "a\\x.safetensors",
        "x\x00.safetensors",
        "x\n.safetensors",
        "version.yaml",
        "x" * 250 + ".safetensors",
        "",
        None,
        3,
        ["x.safetensors"],
    ],
)
def test_a_name_that_is_no_file_of_the_folder_is_refused(file: object) -> None:
    with pytest.raises(ValueError, match=r"is not the name of a \.safetensors file in this folder"):
        VersionFile.parse(yaml.safe_dump(GOOD | {"files": ["x.safetensors", file]}).encode())


def test_every_mistake_is_named_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        VersionFile.parse(b"stp: 3\nrun: 7\ndigest: x\nfiles: [a, b.safetensors, /c.safetensors]\n")
    for part in ("no step", "unknown keys 'stp'", "run:", "digest:", "'a'", "'/c.safetensors'"):
        assert part in str(caught.value)
    assert "b.safetensors" not in str(caught.value)


def test_an_integer_that_cannot_be_written_in_decimal_is_named_by_its_type() -> None:
    with pytest.raises(ValueError, match=r"step: .* got a int"):
        VersionFile.parse(yaml.safe_dump(GOOD).replace("step: 3", "step: 0x" + "f" * 9000).encode())


def parsed(data: bytes) -> VersionFile | None:
    """None for the one error that a caller sees, which is never the whole of what was wrong."""
    try:
        return VersionFile.parse(data)
    except ValueError as error:
        said = str(error)
    assert len(said) < 3000
    return None


@settings(max_examples=400)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_version_or_one_error(data: bytes) -> None:
    parsed(data)


@settings(max_examples=400)
@given(st.text("{}[],:&*!<>|-?#'\"%@` \n\tab01.ex~=_/", max_size=80))
def test_any_yaml_is_a_version_or_one_error(text: str) -> None:
    parsed(text.encode())


@settings(max_examples=300)
@given(
    st.sampled_from(["step", "run", "digest", "files"]),
    st.sampled_from(
        ["int", "float", "bool", "null", "timestamp", "binary", "set", "omap", "pairs", "str", "seq", "map"]
    ),
    st.sampled_from(["", "x", "''", "[]", "{}", "[x]", "{x: y}", "[[1]]", "1:2", "0x", "-", "2020-99-99", ".inf"]),
)
def test_a_value_under_a_tag_that_it_does_not_deserve_is_one_error(key: str, tag: str, value: str) -> None:
    others = "".join(f"{name}: {plain}\n" for name, plain in GOOD.items() if name != key)
    parsed(f"{others}{key}: !!{tag} {value}\n".encode())


@settings(max_examples=150)
@given(anything, st.sampled_from(["step", "run", "digest", "files", None]))
def test_a_mapping_with_anything_in_it_is_a_version_or_one_error(value: object, key: str | None) -> None:
    plain = value if key is None else GOOD | {key: value}
    said = parsed(yaml.safe_dump(plain, allow_unicode=True).encode("utf-8", "surrogatepass"))
    if said is not None:
        assert said.to_yaml()


@settings(max_examples=300)
@given(st.data())
def test_a_version_with_a_byte_changed_is_a_version_or_one_error(data: st.DataObject) -> None:
    whole = bytearray(yaml.safe_dump(GOOD).encode())
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    said = parsed(bytes(whole))
    if said is not None:
        assert all("/" not in file for file in said.files)
