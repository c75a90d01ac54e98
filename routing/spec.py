"""RouterSpec: everything between the hidden states and the combine weights that changes a bit."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Self, TypeVar

import torch

from routing.plain import check_keys, digest_of, dtype_name, dtype_named, integer, real, truth
from routing.terms import (
    GateSpec,
    GroupSpec,
    Platform,
    ReduceKind,
    ScoreFunction,
    SlotOrder,
    SumOrder,
    TopkReduce,
    member,
)
from routing.trainers import preset

MAX_CUDA_TOP_K = 32
"""Of experts, and of those that score their group: beyond it torch.topk sorts by another network."""
MAX_CUDA_EXPERTS = 1024
"""Beyond it eager softmax runs another kernel, with another order of summation."""

CHAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

V = TypeVar("V")


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """What a trainer computes to route a token, as data. Equal digests give equal bits from equal logits.

        logits = gate(hidden)                       gate
        scores = score(logits)                      chain_dtype
        choice = scores + bias, groups masked       at least fp32 with a bias, else chain_dtype
        ids    = topk(choice)                       slot_order
        w      = reduce(scores[ids])                chain_dtype
        w      = w * scale * expert_scale[ids]      from the left; never gated by the reduce
        w      = w.to(weight_dtype)

    For SOFTMAX_TOPK experts are chosen by their logits, and the softmax runs over the chosen ones before the reduce.
    Scores are never computed in fp64: an fp64 chain holds the fp32 scores of `logits.float()`, as in Megatron-Core. Its
    bias, comparisons, sums, quotients and products are fp64, and so are the logits that SOFTMAX_TOPK chooses by.
    """

    num_experts: int
    top_k: int
    score: ScoreFunction
    has_bias: bool = False
    """An fp32 bias per expert takes part in the choice, and in nothing else."""
    groups: GroupSpec | None = None
    slot_order: SlotOrder
    reduce: TopkReduce
    scale: float | None = None
    """Multiplies every weight after the reduce. A double, rounded once, as PyTorch does with a Python number."""
    expert_scale: bool = False
    """A factor per expert multiplies the weights last."""
    chain_dtype: torch.dtype = torch.float32
    """Every step from scores to scaled weights is rounded to it."""
    sum_order: SumOrder = SumOrder.HALVING
    """Of the slots, and of a group's best, on platform "cuda". On "cpu" PyTorch has one order and this says nothing."""
    weight_dtype: torch.dtype
    gate: GateSpec = field(default_factory=GateSpec)
    platform: Platform
    """Whose order of summation, slots and ties: eager PyTorch's on "cuda", or on "cpu" this machine's PyTorch's."""

    def __post_init__(self) -> None:
        faults = []
        if not 1 <= self.top_k <= self.num_experts:
            faults.append(f"1 <= top_k <= num_experts expected; top_k={self.top_k}, num_experts={self.num_experts}")
        if self.groups is not None:
            faults += self._group_faults(self.groups)
        if self.scale is not None and not abs(self.scale) < float("inf"):
            faults.append(f"scale={self.scale}; a finite number or None expected")
        for name, dtype in (("chain_dtype", self.chain_dtype), ("weight_dtype", self.weight_dtype)):
            if dtype not in CHAIN_DTYPES:
                faults.append(f"{name}={dtype}; float32, bfloat16, float16 or float64 expected")
        if self.chain_dtype == torch.float64 and self.reduce.kind is ReduceKind.SOFTMAX:
            faults.append("reduce=softmax in chain_dtype=torch.float64: no trainer's; softmax is computed in fp32 only")
        if self.platform == "cpu" and self.sum_order is not SumOrder.HALVING:
            faults.append(f"sum_order={self.sum_order} on platform 'cpu', where PyTorch has one order; leave it out")
        if self.platform not in ("cpu", "cuda"):
            faults.append(f"platform={self.platform!r}; 'cpu' or 'cuda' expected")
        if self.platform == "cuda" and (self.top_k > MAX_CUDA_TOP_K or self.num_experts > MAX_CUDA_EXPERTS):
            faults.append(
                f"top_k={self.top_k}, num_experts={self.num_experts}; PyTorch's order on CUDA is established"
                f" for top_k <= {MAX_CUDA_TOP_K} and num_experts <= {MAX_CUDA_EXPERTS} only"
            )
        if faults:
            raise ValueError(f"RouterSpec: {'; '.join(faults)}")

    def _group_faults(self, groups: GroupSpec) -> list[str]:
        if self.num_experts % groups.count != 0:
            return [f"num_experts={self.num_experts} is no multiple of groups.count={groups.count}"]
        size = self.num_experts // groups.count
        faults = []
        if groups.top > size:
            faults.append(f"groups.top={groups.top} of a group of {size} experts")
        if self.platform == "cuda" and groups.top > MAX_CUDA_TOP_K:
            faults.append(
                f"groups.top={groups.top}; PyTorch's order on CUDA is established for top <= {MAX_CUDA_TOP_K} only"
            )
        if groups.kept * size < self.top_k:
            faults.append(f"{groups.kept} kept groups of {size} experts hold fewer than top_k={self.top_k}")
        return faults

    @property
    def choice_dtype(self) -> torch.dtype:
        """In which experts and groups are compared."""
        return torch.promote_types(self.chain_dtype, torch.float32) if self.has_bias else self.chain_dtype

    @cached_property
    def digest(self) -> str:
        """128 bits, in hex, over everything in the spec."""
        return digest_of(self.to_plain())

    def to_plain(self) -> dict[str, object]:
        """A mapping of texts, numbers, truth values and such mappings, for YAML and JSON."""
        return {
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "score": str(self.score),
            "has_bias": self.has_bias,
            "groups": None if self.groups is None else self.groups.to_plain(),
            "slot_order": str(self.slot_order),
            "reduce": self.reduce.to_plain(),
            "scale": self.scale,
            "expert_scale": self.expert_scale,
            "chain_dtype": dtype_name(self.chain_dtype),
            "sum_order": str(self.sum_order),
            "weight_dtype": dtype_name(self.weight_dtype),
            "gate": self.gate.to_plain(),
            "platform": self.platform,
        }

    @classmethod
    def from_plain(cls, plain: object) -> Self:
        """Inverse of to_plain. Defaults may be left out; an unknown key is a ValueError that names the nearest."""
        fields = {entry.name: entry for entry in dataclasses.fields(cls)}
        required = {
            name
            for name, entry in fields.items()
            if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        }
        mapping = check_keys("RouterSpec", plain, known=fields, required=required)
        return cls(**{name: READERS[name](name, mapping[name]) for name in mapping})  # type: ignore[arg-type]

    @classmethod
    def from_trainer(
        cls,
        trainer: str,
        hf_config: object,
        *,
        dtype: torch.dtype | None = None,
        platform: Platform | None = None,
        gate: Literal["fp32", "trainer"] = "fp32",
    ) -> Self:
        """What `trainer` computes for the checkpoint with this config (a config.json mapping, or transformers' object).

        trainer: a name in routing.trainers.TRAINERS. dtype: the model's; None takes the config's. platform: None takes
        "cuda" where there is a GPU, else "cpu". gate: "fp32", as RL mode has it (fp64 where that is the trainer's), or
        "trainer": operands and logits as the trainer's modules compute them in `dtype`. ValueError for an unknown
        trainer or family, for a config that leaves a number open or asks for what the family's row cannot do, and for a
        router that no spec describes, with the operation that stands in the way.
        """
        plain = preset(trainer, hf_config, model_dtype=None if dtype is None else dtype_name(dtype), gate=gate)
        here: Platform = "cuda" if torch.cuda.is_available() else "cpu"
        return cls.from_plain({**plain, "platform": here if platform is None else platform})


def _optional(read: Callable[[str, object], V]) -> Callable[[str, object], V | None]:
    return lambda name, value: None if value is None else read(name, value)


READERS: Mapping[str, Callable[[str, object], object]] = {
    "num_experts": integer,
    "top_k": integer,
    "score": lambda _, value: member(ScoreFunction, value),
    "has_bias": truth,
    "groups": _optional(lambda _, value: GroupSpec.from_plain(value)),
    "slot_order": lambda _, value: member(SlotOrder, value),
    "reduce": lambda _, value: TopkReduce.from_plain(value),
    "scale": _optional(real),
    "expert_scale": truth,
    "chain_dtype": lambda _, value: dtype_named(value),
    "sum_order": lambda _, value: member(SumOrder, value),
    "weight_dtype": lambda _, value: dtype_named(value),
    "gate": lambda _, value: GateSpec.from_plain(value),
    "platform": lambda _, value: value,
}
