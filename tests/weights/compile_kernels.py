"""Compiles the kernels of weights for an NVIDIA GPU of compute capability 9.0, which needs none. Prints, as JSON, how
often each machine instruction stands in each kernel.

Run in a process of its own, because Triton decides at import whether it compiles or interprets.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from weights.kernel_copy import BYTEWISE_COPY_TILE, DEFAULT_COPY_TILE, _copy_kernel
from weights.kernel_digest import DEFAULT_TILE, _digest_kernel, tile_for
from weights.spans import Form

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"table_ptr": "*i64", "rows_ptr": "*i32", "keys_ptr": "*i32", "seeds_ptr": "*i64", "sums_ptr": "*i64"}


def instructions(kernel: Any, constants: dict[str, Any], warps: int) -> Counter[str]:
    """Machine instructions of the kernel, each with its modifiers."""
    signature = {name: POINTERS.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind in ("*i32", "*i64")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    return Counter(
        re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]+)", done.stdout, re.MULTILINE)
    )


def digest(form: Form, is_aligned: bool) -> Counter[str]:
    tile = tile_for(form, is_aligned, DEFAULT_TILE)
    constants = {
        "FORM": form.value, "IS_ALIGNED": is_aligned, "BLOCKS": tile.blocks, "UNIT_BLOCKS": tile.unit_blocks
    }  # fmt: skip
    return instructions(_digest_kernel, constants, tile.warps)


def copy(form: Form, is_rounded: bool, is_aligned: bool) -> Counter[str]:
    tile = DEFAULT_COPY_TILE if is_aligned else BYTEWISE_COPY_TILE
    constants = {
        "FORM": form.value, "IS_ROUNDED": is_rounded, "IS_ALIGNED": is_aligned, "TILE_BYTES": tile.tile_bytes,
        "UNIT_BYTES": tile.unit_bytes, "LOADED": "", "STORED": "",
    }  # fmt: skip
    return instructions(_copy_kernel, constants, tile.warps)


def main() -> None:
    found = {}
    for form in Form:
        for is_aligned in (True, False):
            placed = "aligned" if is_aligned else "anywhere"
            found[f"digest {form.name} {placed}"] = digest(form, is_aligned)
            found[f"copy {form.name} {placed}"] = copy(form, False, is_aligned)
            found[f"pack {form.name} {placed}"] = copy(form, True, is_aligned)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
