"""Reads a Hugging Face config.json, in the form of transformers 5 and of the released checkpoints before it.

A key that is missing, of the wrong type or beyond what is supported is noted, not raised: one error names them all.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from rollout.model.spec import RopeSpec

DtypeChoice = torch.dtype | Literal["checkpoint"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ConfigReader:
    """One config.json; collects what is wrong with it. Call `check` before using what was read."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.offenders: list[str] = []

    def check(self) -> None:
        """Raises ValueError that names every key noted so far."""
        if self.offenders:
            raise ValueError("config.json cannot be hosted: " + "; ".join(self.offenders))

    def whole(self, key: str, *, alias: str | None = None, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`; `alias` is the key's other name, which may not contradict it."""
        value = self._named(key, alias, default)
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            return value
        self._note(key, value, f"a whole number of at least {least}")
        return least

    def real(self, key: str, *, default: float | None = None) -> float:
        """A number above 0."""
        return self._positive(key, self._named(key, None, default))

    def flag(self, key: str, *, default: bool | None = None) -> bool:
        """true or false."""
        value = self._named(key, None, default)
        if isinstance(value, bool):
            return value
        self._note(key, value, "true or false")
        return False

    def layer_indices(self, key: str) -> frozenset[int]:
        """A list of layer numbers; null and a missing key mean none."""
        value = self._named(key, None, [])
        if isinstance(value, list) and all(isinstance(index, int) and not isinstance(index, bool) for index in value):
            return frozenset(value)
        self._note(key, value, "a list of layer numbers")
        return frozenset()

    def only(self, key: str, supported: object) -> None:
        """Notes the key unless its value is `supported`; None: unless it is null or missing."""
        value = self.config.get(key)
        if value != supported:
            self._note(
                key, value, "none, not supported" if supported is None else f"{supported!r}, the only one supported"
            )

    def supported_only(self) -> None:
        """Notes what no family here supports: other activations, quantized checkpoints, other than full attention."""
        self.only("hidden_act", "silu")
        self.only("quantization_config", None)
        layer_types = self.config.get("layer_types")
        if layer_types is not None and set(layer_types) != {"full_attention"}:
            self._note("layer_types", layer_types, "'full_attention' in all layers, the only one supported")

    def dtype(self, choice: DtypeChoice) -> torch.dtype:
        """The hosted dtype: the config's own, unless one is chosen.

        Args:
            choice: "checkpoint", torch.float32 or torch.bfloat16.
        """
        if isinstance(choice, torch.dtype):
            if choice not in _DTYPES.values():
                self.offenders.append(f"dtype {choice}: supported are {', '.join(_DTYPES)}")
            return choice
        value = self._named("dtype", "torch_dtype", None)
        if value in _DTYPES:
            return _DTYPES[value]
        self._note("dtype", value, f"{' or '.join(_DTYPES)}; or choose one of them yourself")
        return torch.float32

    def attention_heads(self, hidden: int) -> tuple[int, int, int]:
        """Query heads, key/value heads and head size; the size is hidden / heads where the config does not say."""
        heads = self.whole("num_attention_heads")
        kv_heads = self.whole("num_key_value_heads")
        if heads % kv_heads:
            self.offenders.append(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
        return heads, kv_heads, self.whole("head_dim", default=hidden // heads)

    def rope(self, head_dim: int, *, default_fraction: float | None = None) -> RopeSpec:
        """The rotary embedding, from rope_parameters or, before transformers 5, rope_theta, rope_scaling and
        partial_rotary_factor.

        Args:
            head_dim: of attention.
            default_fraction: the share of a head that rotates where the config does not say. None: heads of this family
                rotate whole, and a config that says otherwise is noted (transformers ignores what it says).
        """
        self._named("rope_parameters", "rope_scaling", None)  # only to note that they contradict each other
        key = "rope_parameters" if self.config.get("rope_parameters") else "rope_scaling"
        nested = self.config.get(key) or {}
        if not isinstance(nested, Mapping):
            self._note(key, nested, "a mapping")
            nested = {}
        kind = nested.get("rope_type", nested.get("type", "default"))
        if kind != "default":
            self.offenders.append(f"{key}.rope_type={kind!r}: expected 'default', the only one supported")
        theta = self._positive("rope_theta", nested.get("rope_theta", self.config.get("rope_theta")))
        own, inner = self.config.get("partial_rotary_factor"), nested.get("partial_rotary_factor")
        if default_fraction is None:
            for name, said in (("partial_rotary_factor", own), (f"{key}.partial_rotary_factor", inner)):
                if said not in (None, 1.0):
                    self._note(name, said, "1.0, the only one supported for this architecture")
            own, inner, default_fraction = None, None, 1.0
        fraction = next((said for said in (inner, own) if said is not None), default_fraction)
        fraction = self._positive("partial_rotary_factor", fraction)
        rotary_dim = int(head_dim * fraction)
        if not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
            self.offenders.append(
                f"partial_rotary_factor={fraction!r}: {rotary_dim} of {head_dim} dimensions of a head rotate, "
                "expected an even number of them, at least 2"
            )
        return RopeSpec(theta=theta, rotary_dim=rotary_dim)

    def _named(self, key: str, alias: str | None, default: Any) -> Any:
        """The value under one of two names; null counts as missing."""
        names = (key,) if alias is None else (key, alias)
        said = {name: self.config[name] for name in names if self.config.get(name) is not None}
        values = list(said.values())
        if len(values) == 2 and values[0] != values[1]:
            self.offenders.append(
                " and ".join(f"{name}={value!r}" for name, value in said.items()) + " contradict each other"
            )
        return values[0] if values else default

    def _positive(self, key: str, value: Any) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf"):
            return float(value)
        self._note(key, value, "a number above 0")
        return 1.0

    def _note(self, key: str, value: object, expected: str) -> None:
        self.offenders.append(
            f"{key} is missing: expected {expected}" if value is None else f"{key}={value!r}: expected {expected}"
        )
