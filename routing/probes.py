"""The rows that parity tries a router on: ordinary ones, and those that routers get wrong.

All are drawn on the device from a seed. T tokens, E experts, K slots of a token; noise is standard normal.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from routing.spec import RouterSpec

CHUNK = 8192
"""Tokens routed at once, at most."""
SMALL_BATCHES = (1, 2, 7, 33, 257)
"""Tokens of the first batches: eager PyTorch and kernels may launch differently for few rows."""
SPECIALS = (math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e30, -1e30)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Operands of one call."""

    logits_TE: Tensor
    bias_E: Tensor | None
    expert_scale_E: Tensor | None


def batches(spec: RouterSpec, device: torch.device, tokens: int, seed: int = 0) -> Iterator[Batch]:
    """At least `tokens` tokens: small batches first, then chunks that hold every family, each under its own bias."""
    random = torch.Generator(device=device).manual_seed(seed)
    biases = list(bias_vectors(spec.num_experts, random).values())
    left = max(tokens - sum(SMALL_BATCHES), 1)
    chunk = min(CHUNK, max(-(-left // len(biases)), len(FAMILIES)))
    sizes = [*SMALL_BATCHES, *[chunk] * -(-left // chunk)]
    for index, size in enumerate(sizes):
        scale_E = torch.linspace(0.3, 1.7, spec.num_experts, device=device).to(spec.chain_dtype)
        yield Batch(
            logits_TE=logit_rows(spec, size, random),
            bias_E=biases[index % len(biases)] if spec.has_bias else None,
            expert_scale_E=scale_E if spec.expert_scale else None,
        )


def logit_rows(spec: RouterSpec, tokens: int, random: torch.Generator) -> Tensor:
    """[tokens, E] in the gate's output dtype: the families in turn, row by row, so that few rows show several."""
    wide = torch.promote_types(spec.gate.output_dtype, torch.float32)
    noise_TE = torch.randn(tokens, spec.num_experts, generator=random, device=random.device, dtype=wide)
    rows_TE = torch.empty_like(noise_TE)
    for index, family in enumerate(FAMILIES.values()):
        rows_TE[index :: len(FAMILIES)] = family(noise_TE[index :: len(FAMILIES)])
    return rows_TE.to(spec.gate.output_dtype)


def bias_vectors(num_experts: int, random: torch.Generator) -> dict[str, Tensor]:
    """fp32 [E] by name: some hide the score's last bits, one turns the order around, one makes it negative."""
    small = torch.randn(num_experts, generator=random, device=random.device) * 0.05
    return {
        "small": small,
        "zero": torch.zeros_like(small),
        "large": small.bfloat16().float() + 8,
        "negative": -1.5 - small.abs(),
        "reversing": torch.linspace(4, -4, num_experts, device=random.device),
        "nan": torch.where(torch.arange(num_experts, device=random.device) == 1, math.nan, small),
    }


def _cycled(values: tuple[float, ...], noise_TE: Tensor) -> Tensor:
    """[T, 1]: the values in turn, one a row."""
    rows = torch.arange(len(noise_TE), device=noise_TE.device)
    return torch.tensor(values, device=noise_TE.device, dtype=noise_TE.dtype)[rows % len(values)][:, None]


def _sprinkled(noise_TE: Tensor) -> Tensor:
    """A special value in about one place of forty, another in each row; every other row two of them."""
    other = _cycled(SPECIALS[3:] + SPECIALS[:3], noise_TE)
    rows_TE = torch.where(noise_TE > 2.0, _cycled(SPECIALS, noise_TE), noise_TE)
    return torch.where(noise_TE < _cycled((-math.inf, -2.0), noise_TE), other, rows_TE)


def _mostly_special(noise_TE: Tensor) -> Tensor:
    """More than K special values in a row, up to all of them."""
    share = _cycled((-0.5, 0.5, math.inf), noise_TE)
    return torch.where(noise_TE < share, _cycled(SPECIALS, noise_TE), noise_TE)


FAMILIES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "ordinary": lambda noise: noise * 1.5,
    "rounded to bfloat16": lambda noise: (noise * 1.5).bfloat16().to(noise.dtype),  # a tenth of the rows tie
    "rounded to float32": lambda noise: noise.float().to(noise.dtype) + 1e-12 * noise.round(),  # ties in fp32 only
    "near uniform": lambda noise: noise * 0.02,
    "peaked": lambda noise: noise * 8,
    "many ties": lambda noise: (noise * 1.5).round(),
    "two-valued": lambda noise: (noise > _cycled((0.0, 1.0, 2.0), noise)).to(noise.dtype),
    "all equal": lambda noise: noise[:, :1].expand_as(noise),
    "saturated sigmoid": lambda noise: noise + _cycled((16.64, 20.0, 95.0), noise),
    "vanishing sigmoid": lambda noise: noise * _cycled((0.02, 0.5), noise) - _cycled((87.4, 88.0, 88.7, 103.0), noise),
    "softplus threshold": lambda noise: noise * _cycled((1e-4, 4.0), noise) + 20,
    "small denominators": lambda noise: noise * 0.1 - _cycled((14.0, 21.0, 29.0, 30.5, 40.0, 46.0), noise),
    "zero denominators": lambda noise: -110 - noise.abs(),
    "underflowing softmax": lambda noise: noise * _cycled((20.0, 40.0, 100.0), noise),
    "special values": _sprinkled,
    "mostly special values": _mostly_special,
    "signed zeros": lambda noise: torch.where(noise > 0.5, 0.0, torch.where(noise > -2.0, -0.0, noise)),
}
"""Noise [T, E] -> logits [T, E], in fp32 or fp64."""


def score_rows(K: int, dtype: torch.dtype, rows: int, eps: tuple[float, ...], random: torch.Generator) -> Tensor:
    """About `rows` rows [.., K] of raw scores in the chain dtype, for a reduce: every magnitude, sums around every eps.

    Some rows hold what no score function gives (negative numbers, say): they tell formulas apart that agree elsewhere.
    """
    device, share = random.device, max(rows // 4, 8 * max(len(eps), 1))
    wide = torch.promote_types(dtype, torch.float32)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random, device=device, dtype=wide)

    ordinary = uniform(share, K) ** 3
    probabilities = torch.softmax(torch.randn(share, K, generator=random, device=device, dtype=wide) * 3, dim=-1)
    magnitude = torch.exp2(uniform(share, 1) * 170 - 150)
    parts = [ordinary, probabilities * uniform(share, 1), ordinary.flip(0) * magnitude]
    if eps:
        at = torch.tensor(eps, dtype=torch.float64, device=device)[torch.arange(share, device=device) % len(eps)]
        distance = torch.tensor([1.0, 8.0, 2.0**22, 2.0**26, 2.0**-22], dtype=torch.float64, device=device)
        spread = (uniform(share) + 0.5) * distance[torch.randint(5, (share,), generator=random, device=device)]
        parts.append((probabilities * (at * spread)[:, None]).to(wide))
    return torch.cat([*parts, _special_scores(ordinary[: share // 8])]).to(dtype)


def _special_scores(ordinary: Tensor) -> Tensor:
    first = torch.arange(ordinary.shape[1], device=ordinary.device) == 0
    whole = _cycled((0.0, -0.0, 1.0, 2.0**-149, 2.0**-126, math.nan, math.inf, 1e-30), ordinary).expand_as(ordinary)
    lonely = torch.where(first, ordinary, torch.where(ordinary < 0.1, -0.0, 0.0))
    broken = torch.where(first, _cycled((math.nan, math.inf, -math.inf, 3e38), ordinary), ordinary)
    return torch.cat([whole, lonely, broken, broken.flip(1), ordinary - 0.3, -ordinary])
