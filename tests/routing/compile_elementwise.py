"""Compiles the elementwise probe for an NVIDIA GPU, which needs none, and prints the PTX. In a process of its own,
because Triton decides at import whether it compiles or interprets."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from routing.kernel_elementwise import BLOCK, _elementwise_kernel

if __name__ == "__main__":
    pointers = dict.fromkeys(("x_ptr", "y_ptr", "out_ptr"), "*fp32")
    source = ASTSource(
        fn=_elementwise_kernel,
        signature={**pointers, "N": "i32", "BLOCK": "constexpr"},
        constexprs={"BLOCK": BLOCK},
    )
    options = {"enable_fp_fusion": False, "enable_reflect_ftz": False}
    print(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"])
