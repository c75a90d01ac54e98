"""Specs, rows that routers get wrong, and bit-exact comparison. T tokens, E experts, K slots of a token."""

import math

import torch
from router_specs import BF16, FP64, FP64_CHAIN, SPECS, make_spec, sigmoid_spec
from torch import Tensor

from routing import Assignment, RouterSpec

__all__ = [
    "BF16",
    "FP64",
    "FP64_CHAIN",
    "SPECS",
    "bias_rows",
    "bits",
    "boundary_ties",
    "has_distinct_ids",
    "logit_rows",
    "make_spec",
    "operands",
    "sigmoid_spec",
    "ulps",
]


def logit_rows(spec: RouterSpec) -> dict[str, Tensor]:
    """Families of rows [T, E] by name, in fp32 or rounded to the spec's gate output dtype."""
    E, K = spec.num_experts, spec.top_k
    random = torch.Generator().manual_seed(E * 100 + K)
    normal = torch.randn(12, E, generator=random)
    above, below = min(K, E - 1), max(K - 1, 0)
    levels = torch.arange(E).float()

    def row(fill: float, **at: float) -> Tensor:
        """One row of `fill`, with values at positions: first, middle, last, boundary (the k-th)."""
        places = {"first": 0, "middle": E // 2, "last": E - 1, "boundary": below}
        filled = torch.full((1, E), fill)
        for name, value in at.items():
            filled[0, places[name]] = value
        return filled

    families = {
        "normal": normal[:6] * 1.5,
        "near uniform": normal[6:8] * 0.02,
        "peaked": normal[8:10] * 8,
        "one hot": row(0.0, middle=50.0),
        "all equal": torch.cat([row(0.0), row(1.0), row(-3.5), row(1e30)]).clamp(max=_largest(spec)),
        "two-valued": torch.stack([(levels % 2), (levels % 3 == 1).float(), (levels >= E - above).float()]),
        "tie across the boundary": torch.stack([-levels.clamp(below - 1), levels.clamp(max=E - K - 1).flip(0)]),
        "one tie, across the boundary": boundary_ties(normal[:4], K, more=1),
        "two ties, across the boundary": boundary_ties(normal[4:8], K, more=2),
        "ties above the boundary": torch.stack([-(levels // 2), (levels // 3), -(levels // 4)]),
        "ties above the boundary only": torch.stack([-levels.clamp(min=below), levels.clamp(max=E - K)]),
        "first and last tie": row(-1.0, first=2.0, last=2.0),
        "ties between groups": _group_ties(spec),
        "quantised": normal[:4].to(BF16).float() * 1.5,
        "equal in fp32": 1.0 + levels.double().view(1, E) * 1e-12,
        "saturated sigmoid": 16.0 + levels.view(1, E) * 0.125,
        "softplus threshold": torch.stack(
            [normal[10] * 1e-4 + 20, normal[11] * 4 + 20, torch.where(levels % 2 == 0, 20.0, 20.0001)]
        ),
        "overflowing exp": torch.stack([normal[0] * 0.1 + 95, normal[2] * 5 - 150]),
        "denormal sigmoid": torch.linspace(-88.72, -87.34, E).view(1, E),
        "zero denominator": torch.cat([row(-120.0), -88.73 - levels.view(1, E)]),
        "small denominators": _small_denominators(normal, K),
        "underflowing softmax": torch.stack([-levels * 60, -levels * 30, -levels * 13]),
        "denormal softmax": torch.cat([torch.zeros(1), torch.linspace(-87.3, -103.9, E - 1)]).view(1, E),
        "nan": torch.cat([row(0.5, middle=math.nan), row(math.nan), torch.where(levels < K, math.nan, levels)[None]]),
        "nan with a payload": row(0.25, first=_nan(0x7FC00123), last=_nan(0x7FA00001)),
        "negative nan": row(-math.nan, first=1.0, last=-math.inf),
        "inf": torch.cat([row(0.0, last=math.inf), row(1.0, first=math.inf, last=math.inf), row(math.inf)]),
        "minus inf": torch.cat([row(0.25, first=-math.inf), row(-math.inf, last=1.0), row(-math.inf)]),
        "nan and inf": row(0.0, first=math.nan, middle=math.inf, last=-math.inf),
        "signed zeros": torch.where(levels % 2 == 0, 0.0, -0.0).view(1, E).repeat(2, 1),
    }
    return {name: rows.to(spec.gate.output_dtype) for name, rows in families.items()}


def _group_ties(spec: RouterSpec) -> Tensor:
    """Groups that score alike, and one value in every group; groups of four where the spec has none."""
    E = spec.num_experts
    size = 4 if spec.groups is None else E // spec.groups.count
    place = torch.arange(E).float() % size
    return torch.stack([place, -place, (place == size - 1).float(), torch.where(place == 0, 3.0, torch.arange(E) / E)])


def _small_denominators(normal: Tensor, K: int) -> Tensor:
    """Rows whose K largest sigmoids sum to a little less and a little more than each epsilon in use."""
    targets = torch.tensor([[1.6e-13], [3.4e-13], [1e-12], [1.2e-7], [1e-6]])
    rows = [normal[:5] * 1e-3 + torch.log(targets * factor / K) for factor in (0.98, 1.02)]
    return torch.cat([*rows, normal[:4] * 0.1 - torch.tensor([[14.0], [21.0], [29.0], [30.5]])])


def _nan(pattern: int) -> float:
    return torch.tensor(pattern, dtype=torch.int32).view(torch.float32).item()


def boundary_ties(rows: Tensor, k: int, *, more: int) -> Tensor:
    """The rows with their k-th best value in the places of the next best as well, `more` of them."""
    best = rows.argsort(dim=1, descending=True)
    last, rivals = best[:, k - 1 : k], best[:, k : k + more]
    return rows.scatter(1, rivals, rows.gather(1, last).expand(-1, rivals.shape[1]))


def bias_rows(E: int) -> dict[str, Tensor]:
    """Biases [E] by name: some hide the score's last bits, some turn the order around, one makes it negative."""
    random = torch.Generator().manual_seed(E)
    small = torch.randn(E, generator=random) * 0.05
    odd = torch.arange(E) % 2 == 1
    return {
        "small": small,
        "zero": torch.zeros(E),
        "rounded": small.to(BF16).float(),
        "large": small.to(BF16).float() + 8,
        "negative": -1.5 - small.abs(),
        "reversing": torch.linspace(4, -4, E),
        "nan": torch.where(torch.arange(E) == 1, math.nan, small),
        "half of it minus inf": torch.where(odd, -math.inf, small),
    }


def operands(spec: RouterSpec, bias: str = "small") -> dict[str, Tensor]:
    """The keyword operands that a spec asks for."""
    found = {}
    if spec.has_bias:
        found["bias_E"] = bias_rows(spec.num_experts)[bias]
    if spec.expert_scale:
        found["expert_scale_E"] = torch.linspace(0.3, 1.7, spec.num_experts).to(spec.chain_dtype)
    return found


def _largest(spec: RouterSpec) -> float:
    return 6e4 if spec.gate.output_dtype == torch.float16 else 1e30


def has_distinct_ids(assignment: Assignment, num_experts: int) -> bool:
    """Whether no token has an id out of range or twice."""
    rows = assignment.expert_ids_TK.tolist()
    return all(len(set(row)) == len(row) and set(row) <= set(range(num_experts)) for row in rows)


def bits(x: Tensor) -> Tensor:
    """int64 bit patterns, with one pattern for every NaN."""
    pattern = x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]).long()
    return torch.where(x.isnan(), 0x7FF8 << 48 if x.dtype == torch.float64 else 1 << 40, pattern)


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers lie between, elementwise; NaN is next to nothing but NaN.

    Of fp64 numbers: how many in fp32, but at least one where they differ.
    """

    def ordinal(x: Tensor) -> Tensor:
        pattern = bits(x)
        lowest = -(1 << (8 * x.element_size() - 1))
        return torch.where(pattern < 0, lowest - pattern, pattern)

    differs = (bits(a) != bits(b)).long()
    a, b = (x.float() if x.dtype == FP64 else x for x in (a, b))
    return torch.maximum((ordinal(a) - ordinal(b)).abs(), differs)
