"""The operations of a router whose bits depend on the platform, and their two fills.

Elementwise sums, products and quotients of tensors are IEEE on every platform and need no seam. With a Python number
and a bfloat16 tensor they do: the CPU may round the number to bfloat16 first, CUDA takes it in fp32. Each operation
takes and returns the dtype of its argument, as eager PyTorch does: fp32 inside, rounded once; sums, products and
rankings of fp64 stay in fp64. W is the length of a row.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from routing import cuda_order
from routing.spec import RouterSpec
from routing.terms import SumOrder


class Arithmetic(Protocol):
    """What eager PyTorch computes on one platform."""

    def softmax(self, rows_TW: Tensor) -> Tensor: ...

    def sigmoid(self, rows_TW: Tensor) -> Tensor: ...

    def sqrt_softplus(self, rows_TW: Tensor) -> Tensor: ...

    def sum(self, rows_TW: Tensor) -> Tensor:
        """[T, 1]"""
        ...

    def abs_sum(self, rows_TW: Tensor) -> Tensor:
        """[T, 1]: torch.norm(p=1)"""
        ...

    def largest(self, rows_TW: Tensor) -> Tensor:
        """[T, 1]"""
        ...

    def plus(self, rows_TW: Tensor, number: float) -> Tensor: ...

    def times(self, rows_TW: Tensor, number: float) -> Tensor: ...

    def topk(self, rows_TW: Tensor, k: int, *, is_sorted: bool) -> Tensor:
        """[T, k] int64: which, in slot order"""
        ...


class EagerArithmetic:
    """Eager PyTorch itself, called the way the trainers call it: the CPU's bits on CPU tensors."""

    def softmax(self, rows_TW: Tensor) -> Tensor:
        return torch.softmax(rows_TW, dim=-1)

    def sigmoid(self, rows_TW: Tensor) -> Tensor:
        return rows_TW.sigmoid()

    def sqrt_softplus(self, rows_TW: Tensor) -> Tensor:
        return softplus(rows_TW).sqrt()

    def sum(self, rows_TW: Tensor) -> Tensor:
        return rows_TW.sum(dim=-1, keepdim=True)

    def abs_sum(self, rows_TW: Tensor) -> Tensor:
        total: Tensor = torch.linalg.vector_norm(rows_TW, ord=1, dim=-1, keepdim=True)
        return total

    def largest(self, rows_TW: Tensor) -> Tensor:
        return rows_TW.amax(dim=1, keepdim=True)

    def plus(self, rows_TW: Tensor, number: float) -> Tensor:
        return rows_TW + number

    def times(self, rows_TW: Tensor, number: float) -> Tensor:
        return rows_TW * number

    def topk(self, rows_TW: Tensor, k: int, *, is_sorted: bool) -> Tensor:
        return torch.topk(rows_TW, k, dim=-1, sorted=is_sorted).indices


@dataclass(frozen=True)
class CudaArithmetic:
    """Eager PyTorch on CUDA, written out; runs anywhere. Its exponentials are those of the device it runs on."""

    sum_order: SumOrder = SumOrder.HALVING

    def softmax(self, rows_TW: Tensor) -> Tensor:
        return cuda_order.softmax(rows_TW.float()).to(rows_TW.dtype)

    def sigmoid(self, rows_TW: Tensor) -> Tensor:
        return (1.0 / (1.0 + torch.exp(-rows_TW.float()))).to(rows_TW.dtype)

    def sqrt_softplus(self, rows_TW: Tensor) -> Tensor:
        x = rows_TW.float()
        inner = torch.where(x > 20.0, x, torch.log1p(torch.exp(x))).to(rows_TW.dtype)
        return inner.float().sqrt().to(rows_TW.dtype)

    def sum(self, rows_TW: Tensor) -> Tensor:
        return self._add(_wide(rows_TW)).to(rows_TW.dtype)

    def abs_sum(self, rows_TW: Tensor) -> Tensor:
        return self._add(_wide(rows_TW).abs()).to(rows_TW.dtype)

    def _add(self, rows_TW: Tensor) -> Tensor:
        add = cuda_order.halving_sum if self.sum_order is SumOrder.HALVING else cuda_order.adjacent_sum
        return add(rows_TW)

    def largest(self, rows_TW: Tensor) -> Tensor:
        return rows_TW.gather(1, self.topk(rows_TW, 1, is_sorted=False))

    def plus(self, rows_TW: Tensor, number: float) -> Tensor:
        return (_wide(rows_TW) + number).to(rows_TW.dtype)

    def times(self, rows_TW: Tensor, number: float) -> Tensor:
        return (_wide(rows_TW) * number).to(rows_TW.dtype)

    def topk(self, rows_TW: Tensor, k: int, *, is_sorted: bool) -> Tensor:
        slots = cuda_order.topk_unsorted(_wide(rows_TW), k)
        return cuda_order.sort_slots(_wide(rows_TW), slots) if is_sorted else slots


def _wide(rows_TW: Tensor) -> Tensor:
    return rows_TW.to(torch.promote_types(rows_TW.dtype, torch.float32))


def arithmetic_of(spec: RouterSpec) -> Arithmetic:
    """What a spec's platform computes, in its order of summation."""
    return CudaArithmetic(spec.sum_order) if spec.platform == "cuda" else EagerArithmetic()
