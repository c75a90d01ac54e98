"""Dataclasses from the plain mappings that YAML gives, with every mistake named at once."""

import difflib
import types
import typing
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar

import yaml

from rollout.errors import ConfigError

Config = TypeVar("Config")
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
"""What safe_load raises: besides its own errors those of scalars that their tag misnames (`!!int ""`), of keys that are
no keys, and of nesting without end."""


class _UniqueKeys(yaml.SafeLoader):
    """safe_load's loader, but a key that is given twice is an error and not the last of the two."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"the key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(content: bytes) -> Any:
    """Plain values from YAML. Raises one of YAML_ERRORS for anything else."""
    return yaml.load(content.decode("utf-8"), Loader=_UniqueKeys)


def from_mapping(cls: type[Config], data: Mapping[str, Any], what: str) -> Config:
    """A frozen dataclass from a mapping, dataclasses inside it from mappings inside.

    Raises:
        ConfigError: names every unknown key (and the nearest that exists), missing key and value of the wrong type.
    """
    wrong: list[str] = []
    config = _build(cls, data, "", wrong)
    if config is None:
        raise ConfigError(f"{what}: " + "; ".join(wrong))
    return config


def _build(cls: type[Config], data: Mapping[str, Any], where: str, wrong: list[str]) -> Config | None:
    """A config dataclass from a mapping; None, with every offender added to `wrong`, where that cannot be."""
    before = len(wrong)
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(typing.cast(Any, cls))}
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            wrong.append(
                f"unknown key {where}{key}; did you mean {where}{near[0]}?" if near else f"unknown key {where}{key}"
            )
    values: dict[str, Any] = {}
    for name, entry in known.items():
        if name in data:
            values[name] = _convert(hints[name], data[name], where + name, wrong)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            wrong.append(f"missing key {where}{name}")
    if len(wrong) > before:
        return None
    try:
        return cls(**values)
    except ConfigError as error:
        wrong.append(str(error))
        return None


def _convert(hint: Any, value: Any, name: str, wrong: list[str]) -> Any:
    """`value` as the field's type, or a line in `wrong`."""
    if isinstance(hint, type) and is_dataclass(hint):
        if isinstance(value, Mapping):
            return _build(hint, value, name + ".", wrong)
        wrong.append(f"{name}: got {value!r}, expected a mapping")
    elif not _fits(hint, value):
        wrong.append(f"{name}: got {value!r}, expected {_described(hint)}")
    return value


def _fits(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint))
    if origin in (types.UnionType, typing.Union):
        return any(_fits(part, value) for part in typing.get_args(hint))
    if origin is Mapping:
        return isinstance(value, Mapping)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return " or ".join(str(choice) for choice in typing.get_args(hint))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_described(part) for part in typing.get_args(hint))
    if origin is Mapping:
        return "a mapping"
    if hint is type(None):
        return "null"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}.get(hint, str(hint))


def require_positive(config: object, where: str, *names: str) -> None:
    """Raises ConfigError that names every one of these fields that is set and not above 0."""
    got = {name: getattr(config, name) for name in names}
    wrong = [
        f"{where + '.' if where else ''}{name}: got {value!r}, must be above 0"
        for name, value in got.items()
        if value is not None and not value > 0
    ]
    if wrong:
        raise ConfigError("; ".join(wrong))


def check_types(config: Any) -> None:
    """Raises ConfigError that names every field whose value is not of the field's type, as from_mapping does.

    For dataclasses that are built in Python: nothing else checks a Literal there.
    """
    hints = typing.get_type_hints(type(config))
    wrong: list[str] = []
    for entry in fields(config):
        value = getattr(config, entry.name)
        if not _fits(hints[entry.name], value):
            wrong.append(f"{entry.name}: got {value!r}, expected {_described(hints[entry.name])}")
    if wrong:
        raise ConfigError("; ".join(wrong))
