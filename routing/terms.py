"""The parts of a RouterSpec: score function, slot order, groups, reduce, gate."""

import dataclasses
import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Self, TypeVar

import torch

from routing.plain import check_keys, dtype_name, dtype_named, integer, nearest, real, truth
from routing.reduce_function import identify

Platform = Literal["cpu", "cuda"]
E = TypeVar("E", bound=StrEnum)


class ScoreFunction(StrEnum):
    """Logits -> the per-expert scores that combine weights are made of."""

    SOFTMAX = "softmax"
    """Over all experts."""
    SOFTMAX_TOPK = "softmax_topk"
    """Over the chosen experts only; experts are chosen by their logits."""
    SIGMOID = "sigmoid"
    SQRT_SOFTPLUS = "sqrt_softplus"


class SlotOrder(StrEnum):
    """The order of a token's K slots, which is the order of the sum over them."""

    SORTED = "sorted"
    """torch.topk(sorted=True): by the selection value, descending."""
    UNSORTED = "unsorted"
    """torch.topk(sorted=False). On CUDA: those above the k-th value by ascending expert index, then the k-th valued."""


class SumOrder(StrEnum):
    """In which order eager PyTorch adds K slots on CUDA; which one depends on its release. W is a power of two."""

    HALVING = "halving"
    """Padded with zeros to W >= K, x[i] + x[i + W/2] until one is left: PyTorch 2.11 and 2.13."""
    ADJACENT = "adjacent"
    """p[i] = x[i] + x[i + W] for the largest W <= K, then p[i] + p[i + 1], + 2, + 4 ...: PyTorch to 2.9, and ROCm."""


class GroupScore(StrEnum):
    """How a group of experts is scored."""

    TOP_SUM = "top_sum"
    """The sum of its `top` largest selection values."""
    MAX = "max"


class ReduceKind(StrEnum):
    """Chosen scores s -> combine weights w."""

    NONE = "none"
    """w = s"""
    SUM = "sum"
    """w = s / sum(s)"""
    SUM_EPS = "sum_eps"
    """w = s / (sum(s) + eps)"""
    CLAMPED_SUM = "clamped_sum"
    """w = s / max(sum(s), eps), NaN stays NaN"""
    SOFTMAX = "softmax"
    """w = softmax(s) over the slots"""
    L1 = "l1"
    """w = s / sum(|s|)"""
    CALLABLE = "callable"
    """Whatever the named function says; see routing.reduce_function."""


def member(kind: type[E], value: object) -> E:
    """The member of `kind` with that text; ValueError naming the nearest."""
    try:
        return kind(str(value))
    except ValueError:
        raise ValueError(f"{kind.__name__}: {value!r}; {nearest(str(value), [str(m) for m in kind])}") from None


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """Experts in `count` equal groups of consecutive indices, of which the `kept` best may be chosen from."""

    count: int
    kept: int
    score: GroupScore = GroupScore.TOP_SUM
    top: int = 2
    """How many of a group's best are summed; 1 for MAX."""
    mask_value: float = -math.inf
    """What replaces the selection value in other groups: -inf, or 0.0, which beats a negative biased score."""
    masks_scores: bool = False
    """Whether it replaces the score too: the weight of an expert that is chosen from another group all the same,
    because nothing in the kept ones beats 0.0."""

    def __post_init__(self) -> None:
        faults = []
        if not 1 <= self.kept <= self.count:
            faults.append(f"1 <= kept <= count expected; kept={self.kept}, count={self.count}")
        if self.top < 1 or (self.score is GroupScore.MAX and self.top != 1):
            faults.append(f"top={self.top} with score={self.score}; top_sum needs top >= 1, max needs top = 1")
        if self.mask_value not in (-math.inf, 0.0):
            faults.append(f"mask_value={self.mask_value}; -inf or 0.0 expected")
        if self.masks_scores and self.mask_value != 0.0:
            faults.append(f"masks_scores with mask_value={self.mask_value}; 0.0 expected, -inf is no weight")
        if faults:
            raise ValueError(f"GroupSpec: {'; '.join(faults)}")

    def to_plain(self) -> dict[str, object]:
        mask = "-inf" if self.mask_value == -math.inf else 0.0
        return {
            "count": self.count,
            "kept": self.kept,
            "score": str(self.score),
            "top": self.top,
            "mask_value": mask,
            "masks_scores": self.masks_scores,
        }

    @classmethod
    def from_plain(cls, plain: object) -> Self:
        """Inverse of to_plain; `score`, `top`, `mask_value` and `masks_scores` may be left out."""
        names = {field.name for field in dataclasses.fields(cls)}
        plain = check_keys("GroupSpec", plain, known=names, required={"count", "kept"})
        score = member(GroupScore, plain.get("score", GroupScore.TOP_SUM))
        return cls(
            count=integer("count", plain["count"]),
            kept=integer("kept", plain["kept"]),
            score=score,
            top=integer("top", plain.get("top", 2 if score is GroupScore.TOP_SUM else 1)),
            mask_value=real("mask_value", plain.get("mask_value", "-inf")),
            masks_scores=truth("masks_scores", plain.get("masks_scores", False)),
        )


@dataclass(frozen=True, kw_only=True)
class TopkReduce:
    """How the chosen scores become combine weights, before the scale."""

    kind: ReduceKind
    eps: float | None = None
    """For SUM_EPS and CLAMPED_SUM: a double, rounded once where it is used, as PyTorch does with a Python number."""
    path: str | None = None
    """For CALLABLE: `package.module:function`."""
    digest: str | None = None
    """For CALLABLE: what `routing.reduce_function.probe_digest` says of that function."""

    def __post_init__(self) -> None:
        faults = []
        wants_eps = self.kind in (ReduceKind.SUM_EPS, ReduceKind.CLAMPED_SUM)
        if wants_eps != (self.eps is not None):
            faults.append(f"kind {self.kind} {'needs' if wants_eps else 'takes no'} eps; eps={self.eps}")
        if self.eps is not None and not (math.isfinite(self.eps) and self.eps >= 0):
            faults.append(f"eps={self.eps}; a finite number >= 0 expected")
        wants_path = self.kind is ReduceKind.CALLABLE
        if (self.path is not None, self.digest is not None) != (wants_path, wants_path):
            need = "needs path and digest (use TopkReduce.of)" if wants_path else "takes neither path nor digest"
            faults.append(f"kind {self.kind} {need}; path={self.path}, digest={self.digest}")
        if faults:
            raise ValueError(f"TopkReduce: {'; '.join(faults)}")

    @classmethod
    def of(cls, path: str) -> Self:
        """The reduce of `package.module:function`; imports it and takes its identity. ValueError if it cannot."""
        return cls(kind=ReduceKind.CALLABLE, path=path, digest=identify(path))

    def to_plain(self) -> dict[str, object]:
        plain = {"kind": str(self.kind), "eps": self.eps, "path": self.path, "digest": self.digest}
        return {key: value for key, value in plain.items() if value is not None}

    @classmethod
    def from_plain(cls, plain: object) -> Self:
        """Inverse of to_plain; a kind's name alone, or `{path: package.module:function}` without digest, will do."""
        if isinstance(plain, str):
            plain = {"path": plain} if ":" in plain else {"kind": plain}
        plain = check_keys("TopkReduce", plain, known={"kind", "eps", "path", "digest"}, required=())
        path = plain.get("path")
        kind = member(ReduceKind, plain.get("kind", ReduceKind.CALLABLE if path is not None else None))
        digest = plain.get("digest")
        if kind is ReduceKind.CALLABLE and path is not None:
            found = identify(str(path))
            if digest is not None and digest != found:
                raise ValueError(
                    f"TopkReduce: {path} computes something else here than where this spec was written: its digest is"
                    f" {found}, the spec says {digest}. Install the same version of it, or drop the digest."
                )
            digest = found
        eps = plain.get("eps")
        return cls(
            kind=kind,
            eps=None if eps is None else real("eps", eps),
            path=None if path is None else str(path),
            digest=None if digest is None else str(digest),
        )


@dataclass(frozen=True, kw_only=True)
class GateSpec:
    """The product hidden @ weight.T that makes the logits."""

    operand_dtype: torch.dtype = torch.float32
    """Both operands are converted to it first."""
    accumulate_dtype: torch.dtype = torch.float32
    output_dtype: torch.dtype = torch.float32
    """The dtype of the logits: that of the operands, or that of the sum."""
    tf32: bool = False
    """Whether fp32 operands are rounded to TF32 (10 fraction bits) on the way into the tensor cores."""
    has_bias: bool = False
    """A bias per expert is added by the linear layer itself, so it is part of the logits."""

    def __post_init__(self) -> None:
        faults = []
        if self.accumulate_dtype not in (torch.float32, torch.float64):
            faults.append(f"accumulate_dtype={self.accumulate_dtype}; float32 or float64 expected")
        if (self.operand_dtype == torch.float64) != (self.accumulate_dtype == torch.float64):
            faults.append(f"{self.operand_dtype} operands do not accumulate in {self.accumulate_dtype}")
        if self.output_dtype not in (self.operand_dtype, self.accumulate_dtype):
            faults.append(
                f"output_dtype={self.output_dtype}: PyTorch has no product of {self.operand_dtype} operands with it;"
                f" {' or '.join(sorted({str(self.operand_dtype), str(self.accumulate_dtype)}))} expected"
            )
        if self.tf32 and self.operand_dtype != torch.float32:
            faults.append(f"tf32 is a rounding of float32 operands; operand_dtype={self.operand_dtype}")
        if faults:
            raise ValueError(f"GateSpec: {'; '.join(faults)}")

    def to_plain(self) -> dict[str, object]:
        return {
            "operand_dtype": dtype_name(self.operand_dtype),
            "accumulate_dtype": dtype_name(self.accumulate_dtype),
            "output_dtype": dtype_name(self.output_dtype),
            "tf32": self.tf32,
            "has_bias": self.has_bias,
        }

    @classmethod
    def from_plain(cls, plain: object) -> Self:
        """Inverse of to_plain; what is left out is fp32 without TF32 or bias."""
        names = {field.name for field in dataclasses.fields(cls)}
        plain = check_keys("GateSpec", plain, known=names, required=())
        return cls(
            operand_dtype=dtype_named(plain.get("operand_dtype", "float32")),
            accumulate_dtype=dtype_named(plain.get("accumulate_dtype", "float32")),
            output_dtype=dtype_named(plain.get("output_dtype", "float32")),
            tf32=truth("tf32", plain.get("tf32", False)),
            has_bias=truth("has_bias", plain.get("has_bias", False)),
        )
