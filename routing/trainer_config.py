"""A checkpoint's config, read alike from a config.json mapping and from transformers' config object."""

from collections.abc import Mapping, Sequence

from routing.trainer_row import Setting

_PARTS = ("thinker_config", "text_config")
"""Where multimodal models keep their language model's config."""
_ABSENT = object()


class CheckpointConfig:
    """Settings by name; those of the language model, where the config has several parts."""

    def __init__(self, hf_config: object) -> None:
        self._levels = [hf_config]
        for part in _PARTS:
            inner = _entry(self._levels[0], part)
            if inner is not _ABSENT and inner is not None:
                self._levels.insert(0, inner)

    @property
    def model_types(self) -> tuple[str, ...]:
        """Of the language model and of what it is a part of. ValueError if the config names none."""
        found = [_entry(level, "model_type") for level in self._levels]
        names = tuple(str(name) for name in found if name is not _ABSENT and name)
        if not names:
            raise ValueError("the config has no 'model_type'")
        return names

    def value(self, setting: Setting) -> object:
        """What the config says, or the default. ValueError where it says two things, or nothing and must."""
        found = {name: value for name in setting.names if (value := self._said(name, setting)) is not _ABSENT}
        if not found:
            if setting.default is None:
                raise ValueError(f"the config has none of {', '.join(setting.names)}")
            return setting.default
        first = next(iter(found.values()))
        if any(value != first for value in found.values()):
            raise ValueError(f"the config disagrees with itself: {found}")
        return first

    def dtype(self) -> str:
        """The model's, by name. ValueError if the config leaves it open."""
        for level in self._levels:
            for name in ("dtype", "torch_dtype"):
                value = _entry(level, name)
                if value is not _ABSENT and value is not None:
                    return str(value).removeprefix("torch.")
        raise ValueError(
            "the config names no dtype (neither 'dtype' nor 'torch_dtype'): pass dtype=torch.bfloat16, say"
        )

    def _said(self, name: str, setting: Setting) -> object:
        value: object = self._levels[0]
        for part in name.split("."):
            value = _entry(value, part)
            if value is _ABSENT:
                return _ABSENT
        if value is None and not setting.may_be_null:
            return _ABSENT
        if isinstance(value, Sequence) and not isinstance(value, str):
            if len(set(value)) != 1:
                raise ValueError(f"the config's {name} differs from layer to layer, and one spec is for all: {value}")
            return value[0]
        return value


def _entry(config: object, name: str) -> object:
    if isinstance(config, Mapping):
        return config.get(name, _ABSENT)
    return getattr(config, name, _ABSENT)
