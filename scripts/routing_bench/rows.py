"""Logits and biases to route: the families that routers get wrong, and random ones. T tokens, E experts."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from router_rows import bias_rows, logit_rows
from torch import Tensor

from routing import RouterSpec

SMALL_TOKENS = 33
"""Up to which every row is routed in batches of that size; beyond it they are repeated and mixed."""
STRIDE_GAP = 16
"""Columns between strided rows; a multiple of 16, so that Triton compiles no other kernel for them."""
DISTRIBUTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "N(0, 1.5)": lambda noise: noise * 1.5,
    "N(0, 0.02)": lambda noise: noise * 0.02,
    "N(0, 8)": lambda noise: noise * 8,
    "N(0, 1.5) rounded to bf16": lambda noise: (noise * 1.5).bfloat16().to(noise.dtype),
}
"""Standard normal noise [T, E] -> logits [T, E]."""
BIASES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "N(0, 0.05)": lambda noise: noise * 0.05,
    "N(0, 1)": lambda noise: noise,
    "8 + N(0, 0.05)": lambda noise: noise * 0.05 + 8,
    "N(0, 0.001)": lambda noise: noise * 1e-3,
    "N(0, 0.05) rounded to bf16": lambda noise: (noise * 0.05).bfloat16().float(),
}
"""Standard normal noise [E] -> a correction bias [E]."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Operands of one call."""

    logits_TE: Tensor
    bias_E: Tensor | None

    @property
    def operands(self) -> dict[str, Tensor]:
        """Those that route takes by keyword."""
        return {} if self.bias_E is None else {"bias_E": self.bias_E}


def families(spec: RouterSpec) -> Tensor:
    """[T, E]: every family of rows that routers get wrong, in the gate's output dtype, on the CPU."""
    return torch.cat(list(logit_rows(spec).values()))


def corpus(spec: RouterSpec, device: torch.device, sizes: list[int]) -> Iterator[Batch]:
    """Families and random rows in batches of these sizes.

    Small batches take every row in turn, under the first bias; a large one holds every family again and again among
    random rows, in no order, once under each bias.
    """
    special_TE = families(spec).to(device)
    random = torch.Generator(device=device).manual_seed(spec.num_experts * 100 + spec.top_k)
    biases = [bias_E.to(device) for bias_E in bias_rows(spec.num_experts).values()] if spec.has_bias else [None]
    rows_TE = torch.cat([special_TE, mixed(spec, 64, random)])
    for size in sizes:
        if size <= SMALL_TOKENS:
            for part_TE in rows_TE.split(size):
                yield Batch(logits_TE=part_TE.clone(), bias_E=biases[0])  # at an address as aligned as any other
            continue
        for bias_E in biases:
            many_TE = mixed(spec, size, random)
            if size > len(special_TE):
                repeated = torch.arange(size // 2 + 1, device=device) % len(special_TE)
                many_TE[: len(repeated)] = special_TE[repeated]
            order = torch.randperm(size, generator=random, device=device)
            yield Batch(logits_TE=many_TE[order], bias_E=bias_E)


def bulk(spec: RouterSpec, device: torch.device, *, batches: int, tokens: int, seed: int = 0) -> Iterator[Batch]:
    """Random rows: distributions and biases in turn."""
    random = torch.Generator(device=device).manual_seed(seed)
    draws, biases = list(DISTRIBUTIONS.values()), list(BIASES.values())
    for index in range(batches):
        noise_E = _noise(random, spec.num_experts)
        logits_TE = draws[index % len(draws)](_noise(random, tokens, spec.num_experts, dtype=_wide(spec)))
        yield Batch(
            logits_TE=logits_TE.to(spec.gate.output_dtype),
            bias_E=biases[index % len(biases)](noise_E) if spec.has_bias else None,
        )


def mixed(spec: RouterSpec, tokens: int, random: torch.Generator) -> Tensor:
    """[tokens, E] in the gate's output dtype: the distributions row by row."""
    logits_TE = _noise(random, tokens, spec.num_experts, dtype=_wide(spec))
    for index, draw in enumerate(DISTRIBUTIONS.values()):
        logits_TE[index :: len(DISTRIBUTIONS)] = draw(logits_TE[index :: len(DISTRIBUTIONS)])
    return logits_TE.to(spec.gate.output_dtype)


def strided(logits_TE: Tensor) -> Tensor:
    """The same rows, further apart, with NaN between them."""
    T, E = logits_TE.shape
    wide = logits_TE.new_full((T, E + STRIDE_GAP), torch.nan)
    wide[:, :E] = logits_TE
    return wide[:, :E]


def odd_strides(logits_TE: Tensor) -> dict[str, Tensor]:
    """The same rows at addresses and strides that no vector load fits, and column by column."""
    T, E = logits_TE.shape
    wide = logits_TE.new_full((T, E + 3), torch.nan)
    wide[:, 3:] = logits_TE
    return {"three columns in": wide[:, 3:], "transposed": logits_TE.t().contiguous().t()}


def _wide(spec: RouterSpec) -> torch.dtype:
    """In which logits are drawn, before they are rounded to the gate's output dtype."""
    return torch.promote_types(torch.float32, spec.gate.output_dtype)


def _noise(random: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=random, device=random.device, dtype=dtype)
