"""The one operation of a router that replay replaces: its torch.topk over all experts.

Every other operation (scores, groups, reduce, scale, casts) stays the router's own, so its weights have the learner's
own bits and gradients. T tokens, E experts, K slots.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TOPK = (torch.topk, Tensor.topk)


class ChoiceReplaced(TorchFunctionMode):
    """Inside the block, a top-k of K out of rows [T, E] yields the ids that `decide` makes of its own.

    Args:
        decide: own ids [T, K] int64 in, ids [T, K] int64 out; the very tensor where nothing is to change.
    """

    def __init__(self, num_experts: int, top_k: int, decide: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = top_k
        self.decide = decide
        self.own: list[Tensor] = []
        """What each such top-k would have yielded."""
        self.chosen: list[Tensor] = []
        """What it yielded."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        result = func(*args, **kwargs)
        if func not in TOPK:
            return result
        rows = args[0] if args else kwargs["input"]
        own = result.indices
        if rows.ndim != 2 or (rows.shape[1], own.shape[-1]) != (self.num_experts, self.top_k):
            return result  # of groups of experts, or within one
        ids_TK = self.decide(own)
        self.own.append(own)
        self.chosen.append(ids_TK)
        return result if ids_TK is own else torch.return_types.topk((rows.gather(1, ids_TK), ids_TK))
