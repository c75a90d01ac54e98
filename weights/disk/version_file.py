"""version.yaml: which version a step folder holds, and in which files. Whatever it contains is data and stays data."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import yaml

from weights.digest import Digest
from weights.version import RUN_PATTERN, WeightVersion

VERSION_FILE = "version.yaml"
MAX_VERSION_FILE_BYTES = 64 << 10
"""Room for two thousand files; PyYAML takes a second for as much."""

_KEYS = ("step", "run", "digest", "files")
_MAX_STEP = (1 << 63) - 1
_MAX_NAME_BYTES = 255
_MAX_DEPTH = 4  # a list in a mapping is 2

_LOAD_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError)
"""What safe_load raises: besides its own errors, those of the constructors of scalars that their tag misnames
(`!!int ""` is an IndexError, `!!timestamp x` an AttributeError)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionFile:
    """The content of a version.yaml."""

    version: WeightVersion
    """Its digest is that of the manifest over all tensors in `files`."""
    files: tuple[str, ...]
    """Safetensors files of the same folder."""

    def to_yaml(self) -> str:
        """`parse` is its inverse."""
        plain = {
            "step": self.version.step,
            "run": self.version.run,
            "digest": self.version.digest.hex,
            "files": list(self.files),
        }
        return yaml.safe_dump(plain, sort_keys=False)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """ValueError that names everything that is wrong with these bytes."""
        if len(data) > MAX_VERSION_FILE_BYTES:
            raise ValueError(f"more than {MAX_VERSION_FILE_BYTES} bytes")
        plain = _load(data)
        if not isinstance(plain, Mapping):
            raise ValueError(f"expected a mapping of {', '.join(_KEYS)}, got {_shown(plain)}")
        faults = list(_faults(plain))
        if faults:
            raise ValueError("; ".join(faults))
        return cls(
            version=WeightVersion(run=plain["run"], step=plain["step"], digest=Digest.from_hex(plain["digest"])),
            files=tuple(plain["files"]),
        )


def _load(data: bytes) -> object:
    try:
        text = data.decode("utf-8")
        _check_events(yaml.parse(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except _LOAD_ERRORS as error:
        raise ValueError(f"not YAML of plain values: {error}") from error


def _check_events(events: Iterator[yaml.Event]) -> None:
    """ValueError for what makes a few bytes cost minutes or gigabytes: aliases, and nesting."""
    depth = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it uses aliases (*name)")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ValueError("it is nested deeper than a list in a mapping")


def _faults(plain: Mapping[object, object]) -> Iterator[str]:
    """A line for each thing that is wrong."""
    missing = [key for key in _KEYS if key not in plain]
    if missing:
        yield f"no {', no '.join(missing)}"
    unknown = [_shown(key) for key in plain if key not in _KEYS]
    if unknown:
        yield f"unknown keys {', '.join(unknown)}; known are {', '.join(_KEYS)}"
    if "step" in plain:
        step = plain["step"]
        if type(step) is not int or not 0 <= step <= _MAX_STEP:
            yield f"step: expected a whole number in [0, 2^63), got {_shown(step)}"
    if "run" in plain:
        run = plain["run"]
        if not isinstance(run, str) or not RUN_PATTERN.fullmatch(run):
            yield f"run: expected text of 1 to 128 of A-Z a-z 0-9 . _ : + -, in quotes, got {_shown(run)}"
    if "digest" in plain:
        yield from _digest_faults(plain["digest"])
    if "files" in plain:
        yield from _file_faults(plain["files"])


def _digest_faults(digest: object) -> Iterator[str]:
    if isinstance(digest, str):
        try:
            Digest.from_hex(digest)
            return
        except ValueError:
            pass
    yield f"digest: expected 32 lower-case hexadecimal digits, in quotes, got {_shown(digest)}"


def _file_faults(files: object) -> Iterator[str]:
    if not isinstance(files, list) or not files:
        yield f"files: expected a list of names, at least one, got {_shown(files)}"
        return
    for file in files:
        if not is_file_name(file):
            yield f"files: {_shown(file)} is not the name of a .safetensors file in this folder"
    names = [file for file in files if isinstance(file, str)]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        yield f"files: named twice: {', '.join(_shown(name) for name in twice)}"


def is_file_name(file: object) -> bool:
    """Whether this names a safetensors file of the folder itself: no way out of it, nothing hidden."""
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and not file.startswith(".")
        and "/" not in file
        and "\\" not in file
        and file.isprintable()
        and len(file.encode()) <= _MAX_NAME_BYTES
    )


def _shown(value: object) -> str:
    """For a message: never the whole of something deep or long."""
    if isinstance(value, str):
        return f"{value[:80]!r}" + ("..." if len(value) > 80 else "")
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 1 << 64):
        return repr(value)
    if isinstance(value, Mapping | list) and not value:
        return repr(value)
    return f"a {type(value).__name__}"
