"""vLLM's routing kernels, called from its compiled library alone. T tokens, E experts, K slots of a token."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from routing import ReduceKind, RouterSpec, ScoreFunction

Answer = tuple[Tensor, Tensor]
"""Ids [T, K] and weights [T, K]."""


class Rival:
    """The operations topk_softmax and grouped_topk, as vLLM's own Python calls them.

    Args:
        library: vllm/_moe_C*.so of an installed vLLM, or of its wheel; built for the PyTorch release that runs.
    """

    def __init__(self, library: Path) -> None:
        torch.cuda.init()  # the library links to what this loads
        torch.ops.load_library(str(library))

    def call(self, spec: RouterSpec, logits_TE: Tensor, bias_E: Tensor | None) -> Callable[[], Answer] | None:
        """One call, outputs included as vLLM makes them; None for a router that it has no kernel for."""
        if spec.score is ScoreFunction.SOFTMAX and spec.reduce.kind is ReduceKind.SUM and bias_E is None:
            call = self._softmax(spec, logits_TE)
        elif spec.score is ScoreFunction.SIGMOID and bias_E is not None:
            call = self._sigmoid(spec, logits_TE, bias_E)
        else:
            return None
        try:
            call()
        except RuntimeError as error:
            print(f"the rival refuses {spec.num_experts} experts, {spec.top_k} slots, {logits_TE.dtype}: {error}")
            return None
        return call

    def _softmax(self, spec: RouterSpec, logits_TE: Tensor) -> Callable[[], Answer]:
        T, K, device = len(logits_TE), spec.top_k, logits_TE.device
        weights_TK = torch.empty(T, K, device=device)
        ids_TK, sources_TK = (torch.empty(T, K, dtype=torch.int32, device=device) for _ in range(2))

        def call() -> Answer:
            torch.ops._moe_C.topk_softmax(weights_TK, ids_TK, sources_TK, logits_TE, True, None)
            return ids_TK, weights_TK

        return call

    def _sigmoid(self, spec: RouterSpec, logits_TE: Tensor, bias_E: Tensor) -> Callable[[], Answer]:
        count, kept = (1, 1) if spec.groups is None else (spec.groups.count, spec.groups.kept)
        scale = 1.0 if spec.scale is None else spec.scale

        def call() -> Answer:
            weights_TK, ids_TK = torch.ops._moe_C.grouped_topk(
                logits_TE, count, kept, spec.top_k, True, scale, bias_E, 1
            )
            return ids_TK, weights_TK

        return call
