"""Compiles the gate's kernel for an NVIDIA GPU, which needs none: argument 1 is a JSON list of [GateSpec, the number of
tokens whose tile it takes, D]. Prints a JSON list of their PTX.

Run in a process of its own, because Triton decides at import whether it compiles or interprets.
"""

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from routing import GateSpec
from routing.gate_reference import CHUNK
from routing.gate_tiles import Arithmetic, Walk, tile_for
from routing.kernel_gate import _gate_kernel, gate_constants
from routing.kernel_gate_fp32 import LAUNCH_OPTIONS, _lanes_kernel, _tile_kernel

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}


def ptx(gate: GateSpec, tokens: int, D: int) -> str:
    """The PTX for compute capability 9.0, assembled as well."""
    tile = tile_for(Arithmetic.of(gate), tokens)
    wide = gate.operand_dtype == torch.float64
    pointers = {
        "hidden_ptr": POINTERS[torch.float64 if wide else torch.bfloat16],
        "weight_ptr": POINTERS[gate.operand_dtype],
        "logits_ptr": POINTERS[gate.output_dtype],
        "out_ptr": "*fp32",
        "chunks_ptr": "*fp32",
    }
    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages}
    if Arithmetic.of(gate) is not Arithmetic.FP32:
        kernel, constants = _gate_kernel, gate_constants(gate, tile, D) | {"INTERPRETED": False}
    elif tile.walk is Walk.LANES:
        kernel, options = _lanes_kernel, {"num_warps": 1, **LAUNCH_OPTIONS}
        chunks = -(-D // CHUNK)
        constants = {
            "D": D, "CHUNK": CHUNK, "IS_WHOLE": D % CHUNK == 0, "CHUNKS": chunks, "LANES": 32,
            "BLOCK_D": tile.depth, "STAGES": tile.stages,
        }  # fmt: skip
        assert chunks <= 32, "more lanes than one warp"
    else:
        kernel, options = _tile_kernel, options | LAUNCH_OPTIONS
        constants = {
            "D": D, "CHUNK": CHUNK, "IS_CHUNK": tile.walk is Walk.CHUNKS, "IS_TRANSPOSED": tile.is_transposed,
            "IS_WHOLE": D % CHUNK == 0, "BLOCK_T": tile.tokens, "BLOCK_E": tile.experts, "BLOCK_D": tile.depth,
        }  # fmt: skip
    constants |= {"HAS_BIAS": False, "bias_ptr": None}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if name not in constants and name != "T" and D % 16 == 0
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert len(compiled.asm["cubin"]) > 0
    return str(compiled.asm["ptx"])


if __name__ == "__main__":
    print(json.dumps([ptx(GateSpec.from_plain(gate), tokens, D) for gate, tokens, D in json.loads(sys.argv[1])]))
