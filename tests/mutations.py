"""Ways to get the top-k kernel wrong, as edits of its source: mistakes that rivals and trainers really make.

Fusing products into sums is not among them: in this kernel no product that is rounded is added to anything.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

ROUTING = Path(__file__).resolve().parent.parent / "routing"


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """Edits of files of routing/, each of which has to find its text exactly once."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    """(file, text, other text)"""
    spec: str
    """Of router_rows.SPECS, in whose rows it shows."""
    spec_on_gpu: str | None = None
    """The same on a GPU, if it is another one there."""
    needs_gpu: bool = False
    """Whether it is the same arithmetic under Triton's interpreter."""


SEQUENTIAL = """result = tl.zeros([BLOCK_T, 1], x.dtype)
        for index in tl.static_range(WIDTH):
            here = tl.arange(0, N)[None, :] == index
            result += tl.sum(tl.where(here, x, 0.0), axis=1)[:, None]
"""
QUOTIENT = "w = rounded(divided(w, tl.broadcast_to(total, [BLOCK_T, K_P])), CHAIN)"
BIASED = "choice = score + tl.load(bias_ptr + ids, mask=is_it, other=0.0)"
UNBIASED = BIASED + "\n        score = choice - tl.load(bias_ptr + ids, mask=is_it, other=0.0)"

MUTATIONS = (
    Mutation(
        name="Triton's own quotient, which is not IEEE's",
        edits=(("kernel_order.py", "result = tl.math.div_rn(x, y)", "result = x / y"),),
        spec="qwen3",
        needs_gpu=True,
    ),
    Mutation(
        name="Triton's own exponential, which is approximate",
        edits=(("kernel_order.py", "result = libdevice.exp(x)", "result = tl.exp(x)"),),
        spec="glm4",
        needs_gpu=True,
    ),
    Mutation(
        name="scaled before the quotient",
        edits=(
            ("kernel_order.py", QUOTIENT, QUOTIENT.replace("divided(w,", "divided(w * SCALE,")),
            ("kernel_order.py", "w = rounded(w * SCALE, CHAIN)", "w = rounded(w, CHAIN)"),
        ),
        spec="glm4",
    ),
    Mutation(
        name="a product with the reciprocal",
        edits=(("kernel_order.py", QUOTIENT, QUOTIENT.replace("divided(w, tl", "w * divided(total / total, tl")),),
        spec="glm4",
    ),
    Mutation(
        name="slots added one after another",
        edits=(("kernel_order.py", "result = halving_sum(x, BLOCK_T, N, LOG_N)\n", SEQUENTIAL),),
        spec="glm4",
    ),
    Mutation(
        name="adjacent slots added first",
        edits=(("kernel_order.py", "if ADJACENT:", "if not ADJACENT:"),),
        spec="glm4",
    ),
    Mutation(
        name="sorted slots for unsorted ones",
        edits=(("kernel.py", '"SORTED": spec.slot_order is SlotOrder.SORTED', '"SORTED": True'),),
        spec="glm4",
    ),
    Mutation(
        name="scores had back from biased ones",
        edits=(("kernel_bound.py", BIASED, UNBIASED),),
        spec="glm4",
    ),
    Mutation(
        name="groups masked with zeros",
        edits=(("kernel.py", '"MASK_VALUE": 0.0 if groups is None else groups.mask_value', '"MASK_VALUE": 0.0'),),
        spec="deepseek_v3",
    ),
    Mutation(
        name="the highest of tied experts",
        edits=(("kernel_exact.py", "tl.min(tl.where(key == best, index, N), axis=1)",
                "tl.max(tl.where(key == best, index, -1), axis=1)"),),
        spec="qwen3",
    ),
    Mutation(
        name="tied slots in the order in which they were found",
        edits=(("kernel_order.py", "if tl.max(tl.max(ties, axis=1), axis=0) > 0:",
                "if tl.max(tl.max(ties, axis=1), axis=0) > K_P:"),),
        spec="qwen3",
    ),
    Mutation(
        name="NaN ranked as its bits are",
        edits=(("kernel_order.py", "return tl.where(x != x, highest(bits), key)", "return key"),),
        spec="glm4",
        spec_on_gpu="gpt_oss",  # what a GPU computes is one NaN, and only logits bring others
    ),
    Mutation(
        name="candidates believed without a look at the rest",
        edits=(("kernel_bound.py", "tl.reshape(bound < least, [BLOCK_T])", "tl.reshape(least == least, [BLOCK_T])"),),
        spec="qwen3",
    ),
    Mutation(
        name="no slack for what approximate scores are off by",
        edits=(("kernel_bound.py", "bound = rest + BIAS_SLACK * (1.0 + tl.abs(rest))", "bound = rest - 0.01"),),
        spec="glm4",
    ),
    Mutation(
        name="groups kept by words that are too short",
        edits=(("kernel_bound.py", "certain = gap > (1.0 + size)", "certain = gap > -1.0 - (1.0 + size)"),),
        spec="deepseek_v3, groups of 32",
    ),
)  # fmt: skip


def mutated(mutation: Mutation | None, folder: Path) -> Path:
    """A copy of routing/ under `folder` with those edits, to be put before the real one on PYTHONPATH."""
    copy = folder / "routing"
    shutil.copytree(ROUTING, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for file, text, other in () if mutation is None else mutation.edits:
        source = (copy / file).read_text()
        assert source.count(text) == 1, f"{mutation}: {text!r} stands {source.count(text)} times in {file}"
        (copy / file).write_text(source.replace(text, other))
    return folder
