# mypy: allow-untyped-calls
"""Where the kernels of this package run: on CUDA memory, or anywhere under Triton's interpreter."""

import contextlib

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton interprets: TRITON_INTERPRET=1 was set when it was imported."""


def check_device(device: torch.device) -> None:
    """ValueError where a kernel cannot run."""
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"the kernel runs on CUDA memory, or anywhere with TRITON_INTERPRET=1; got {device}")


def device_of(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launches in it go to `device`."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
