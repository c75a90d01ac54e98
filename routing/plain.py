"""Plain mappings, as YAML and JSON hold them: read with every offender named, dtypes by name, a digest of the text."""

import difflib
import hashlib
import json
from collections.abc import Collection, Mapping

import torch

FLOAT_DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.float32` -> "float32"."""
    return str(dtype).removeprefix("torch.")


def dtype_named(value: object) -> torch.dtype:
    """A floating-point dtype from its name ("float32", "torch.float32") or itself; ValueError for anything else."""
    if isinstance(value, torch.dtype) and value in FLOAT_DTYPES.values():
        return value
    name = str(value).removeprefix("torch.")
    if name not in FLOAT_DTYPES:
        raise ValueError(f"not a floating-point dtype: {value!r}; {nearest(name, FLOAT_DTYPES)}")
    return FLOAT_DTYPES[name]


def nearest(word: str, known: Collection[str]) -> str:
    """The end of an error message: the known word that `word` resembles, or all of them."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def check_keys(
    what: str, mapping: object, *, known: Collection[str], required: Collection[str]
) -> Mapping[str, object]:
    """`mapping`, if it has all required and only known keys; else one ValueError naming every offender."""
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{what}: expected a mapping of {', '.join(sorted(known))}; got {mapping!r}")
    keys = {str(key) for key in mapping}
    faults = [f"unknown key {key!r}, {nearest(key, known)}" for key in sorted(keys - set(known))]
    faults += [f"missing key {key!r}" for key in sorted(set(required) - keys)]
    if faults:
        raise ValueError(f"{what}: {'; '.join(faults)}")
    return mapping


def digest_of(plain: Mapping[str, object]) -> str:
    """128 bits, in hex, over the canonical JSON text. Floats are written as Python's shortest exact text."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def integer(name: str, value: object) -> int:
    """A whole number under that name, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: a whole number expected, got {value!r}")
    return value


def real(name: str, value: object) -> float:
    """A number under that name, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{name}: a number expected, got {value!r}")
    try:
        return float(value)  # YAML 1.1 reads 1e-20 as text
    except ValueError:
        raise ValueError(f"{name}: a number expected, got {value!r}") from None


def truth(name: str, value: object) -> bool:
    """A truth value under that name, or ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: true or false expected, got {value!r}")
    return value
