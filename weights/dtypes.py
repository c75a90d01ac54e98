"""The element types that a wire tensor may have, their names in manifests, and the one rule for hosting them."""

import torch

WIRE_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
"""Name in a manifest -> dtype. Anything else (complex, quantised) is refused."""

_NAMES = {dtype: name for name, dtype in WIRE_DTYPES.items()}

_EXACT_WIDENINGS = frozenset({(torch.bfloat16, torch.float32), (torch.float16, torch.float32)})


def dtype_name(dtype: torch.dtype) -> str:
    """The name of `dtype` in a manifest. ValueError if no wire tensor may have it."""
    if dtype not in _NAMES:
        raise ValueError(f"{dtype} cannot be sent; the wire knows {', '.join(WIRE_DTYPES)}")
    return _NAMES[dtype]


def fits(wire: torch.dtype, hosted: torch.dtype) -> bool:
    """Whether a host that stores `hosted` may take `wire`: the same dtype, or one that it widens exactly."""
    return wire == hosted or (wire, hosted) in _EXACT_WIDENINGS
