"""Are ids and weights the trainer's, bit for bit? Against eager PyTorch's operations on the same device.

What is served is routing.route: the kernel on CUDA, the reference on a CPU. T tokens, K slots of a token.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from certainty_kernel import certain_rows

from routing import ReduceFunction, RouterSpec, expert_counts, route
from routing.kernel import is_bounded
from routing.oracle import EagerOracle
from routing_bench.rows import Batch, bulk, corpus, odd_strides, strided
from routing_bench.tally import Count, Tally, poisoned_memory

DOUBT_TOKENS = 65536
FUNCTIONS: Mapping[str, ReduceFunction] = {
    "sum + 1e-20": lambda scores_TK: scores_TK.sum(dim=-1, keepdim=True) + 1e-20,
    "sum": lambda scores_TK: scores_TK.sum(dim=-1, keepdim=True),
    "largest": lambda scores_TK: scores_TK.amax(dim=-1, keepdim=True),
    "length": lambda scores_TK: scores_TK.square().sum(dim=-1, keepdim=True).sqrt(),
}
"""Denominators that a user may pass."""


@dataclass(frozen=True, kw_only=True)
class SpecResult:
    """What was found for one spec."""

    corpus: Count
    bulk: Count
    exact_share: float | None
    """Of random rows, those that bounds leave to the exact path. None where every row takes it, and on a CPU."""

    @property
    def count(self) -> Count:
        return self.corpus + self.bulk


def examine(spec: RouterSpec, device: torch.device, *, sizes: list[int], batches: int, batch_tokens: int) -> SpecResult:
    """The corpus in batches of `sizes`, contiguous and strided; then random rows in bulk."""
    return SpecResult(
        corpus=compared(spec, with_strides(corpus(spec, device, sizes)), device),
        bulk=compared(spec, bulk(spec, device, batches=batches, tokens=batch_tokens), device),
        exact_share=exact_share(spec, device),
    )


def compared(
    spec: RouterSpec, batches: Iterable[Batch], device: torch.device, *, function: ReduceFunction | None = None
) -> Count:
    """What is served beside eager PyTorch."""
    tally, oracle = Tally(device), EagerOracle(spec=spec, function=function)
    for batch in batches:
        expected = oracle(batch.logits_TE.contiguous(), bias_E=batch.bias_E, expert_scale_E=None)
        with poisoned_memory():
            found = route(batch.logits_TE, spec, **batch.operands, topk_reduce_func=function)
        tally.add(found, expected.ids_TK, expected.weights_TK)
    return tally.count()


def with_strides(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Each batch twice, the second time with a gap between the rows."""
    for batch in batches:
        yield batch
        yield Batch(logits_TE=strided(batch.logits_TE), bias_E=batch.bias_E)


def at_odd_strides(spec: RouterSpec, device: torch.device, sizes: tuple[int, ...] = (257, 4096)) -> Count:
    """Rows at addresses that no vector load fits, and stored column by column."""
    batches = (
        Batch(logits_TE=logits_TE, bias_E=batch.bias_E)
        for batch in corpus(spec, device, list(sizes))
        for logits_TE in odd_strides(batch.logits_TE).values()
    )
    return compared(spec, batches, device)


def with_functions(spec: RouterSpec, device: torch.device, *, tokens: int) -> dict[str, Count]:
    """The raw scores of the chosen, normalised by Python functions."""
    return {
        name: compared(spec, bulk(spec, device, batches=1, tokens=tokens, seed=1), device, function=function)
        for name, function in FUNCTIONS.items()
    }


def counts_and_padding(spec: RouterSpec, device: torch.device, *, tokens: int) -> Count:
    """With a count of each expert's tokens, and a part of the rows marked as padding by a number on the device.

    A wrong number of tokens at an expert counts as a token with wrong ids.
    """
    (batch,) = bulk(spec, device, batches=1, tokens=tokens, seed=2)
    real = tokens - tokens // 3
    expected = EagerOracle(spec=spec)(batch.logits_TE, bias_E=batch.bias_E, expert_scale_E=None)
    ids_TK, weights_TK = expected.ids_TK.clone(), expected.weights_TK.clone()
    ids_TK[real:], weights_TK[real:] = -1, 0.0
    counts_E = expert_counts(spec.num_experts, device)
    num_tokens = torch.tensor(real, dtype=torch.int32, device=device)
    with poisoned_memory():
        found = route(batch.logits_TE, spec, **batch.operands, num_tokens=num_tokens, counts_E=counts_E)
    tally = Tally(device)
    tally.add(found, ids_TK, weights_TK)
    wrong = (counts_E - torch.bincount(ids_TK[:real].flatten(), minlength=spec.num_experts)).abs().sum()
    return tally.count() + Count(ids_rows_wrong=int(wrong))


def exact_share(spec: RouterSpec, device: torch.device) -> float | None:
    """Of ordinary random rows, those that the bounds leave to the exact path."""
    if not is_bounded(spec) or device.type != "cuda":
        return None
    (batch,) = bulk(spec, device, batches=1, tokens=DOUBT_TOKENS, seed=3)
    return 1.0 - certain_rows(batch.logits_TE, spec, bias_E=batch.bias_E).float().mean().item()
