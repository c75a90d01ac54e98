"""Compiles the kernel for an NVIDIA GPU, which needs none: argument 1 is a spec as JSON, 2 the score, 3 which rows.

Rows are "bounded" (by bounds first) or "exact" (all of them by the definition). Prints the PTX.

Run in a process of its own, because Triton decides at import whether it compiles or interprets.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from routing import RouterSpec
from routing.kernel import LAUNCH_OPTIONS, _topk_kernel, kernel_constants, launch_shape

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}


def ptx(spec: RouterSpec, score: str, rows: str) -> str:
    """The PTX for compute capability 9.0, assembled as well."""
    shape = launch_shape(4096, spec, dtype=spec.gate.output_dtype)
    options = {**LAUNCH_OPTIONS, "num_warps": shape.pop("num_warps")}
    constants = {**kernel_constants(spec, score=score, is_raw=False), **shape, "BOUNDED": rows == "bounded"}
    arguments = {
        "values_ptr": POINTERS[spec.chain_dtype if score == "given" else spec.gate.output_dtype],
        "bias_ptr": "*fp32",
        "expert_scale_ptr": POINTERS[spec.chain_dtype],
        "num_tokens_ptr": "*i32",
        "counts_ptr": "*i32",
        "ids_ptr": "*i32",
        "weights_ptr": POINTERS[spec.weight_dtype],
        "T": "i32",
        "stride_t": "i32",
        "stride_e": "i32",
        "stride_c": "i32",
    }
    for name, is_given in (("bias_ptr", spec.has_bias), ("expert_scale_ptr", spec.expert_scale)):
        if not is_given:
            del arguments[name]
            constants[name] = None
    signature = {name: arguments.get(name, "constexpr") for name in _topk_kernel.arg_names}
    source = ASTSource(fn=_topk_kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert len(compiled.asm["cubin"]) > 0
    return str(compiled.asm["ptx"])


if __name__ == "__main__":
    print(ptx(RouterSpec.from_plain(json.loads(sys.argv[1])), sys.argv[2], sys.argv[3]))
