"""Rows that stand on an edge: experts around the boundary, or groups, a few roundings apart. T tokens, E experts."""

import math

import torch
from torch import Tensor

from routing import GroupSpec, RouterSpec, ScoreFunction

LEVELS = (1.0, 1 - 2**-24, 0.25, 0.37, 0.75, 0.0, -0.6, 1e-39, 5e-20, 3.0)
"""What nearly equal experts are near to: powers of two, where steps change their size; the number below one, whose bits
are ones; others; and what is no normal number, or whose square is none."""
STEPS = (0, 1, 2, 3, 17, 90, 400)
"""Representable numbers between two of them, besides what the index takes in a word."""


def near_ties(spec: RouterSpec, T: int, *, bias_E: Tensor | None, of_logits: bool, seed: int) -> Tensor:
    """[T, E] given scores, or logits whose scores are about that. `bias_E` is taken off, so that sums nearly tie."""
    random = torch.Generator().manual_seed(seed)
    E = spec.num_experts
    choice_TE = torch.rand(T, E, generator=random) * torch.tensor([1.0, 0.02, 1e-6])[torch.arange(T) % 3, None]
    choice_TE += _levels(T, random) - choice_TE.topk(spec.top_k + 1, dim=1).values[:, -1:]
    if spec.groups is None:
        _tie_experts(choice_TE, spec, random)
    else:
        _tie_groups(choice_TE[::2], spec.groups, random)
        _leave_few_above_zero(choice_TE[::8], spec.groups, random)
        _tie_experts(choice_TE[1::2], spec, random)
    given_TE = choice_TE if bias_E is None else choice_TE - bias_E
    return _logits(given_TE, spec.score) if of_logits else given_TE


def _tie_experts(choice_TE: Tensor, spec: RouterSpec, random: torch.Generator) -> None:
    """About K experts of each row get values near its next best, or all in one column and near its best."""
    T, E = choice_TE.shape
    best_T, next_T = choice_TE.topk(spec.top_k + 1, dim=1).values[:, [0, -1]].unbind(1)
    rank_TE = torch.rand(T, E, generator=random)
    column_T1 = torch.randint(32, (T, 1), generator=random)
    in_column_T = torch.arange(T) % 3 == 0
    rank_TE += in_column_T.unsqueeze(1) & (torch.arange(E) % 32 != column_T1)
    is_tied_TE = rank_TE.argsort(1).argsort(1) < torch.randint(2, spec.top_k + 4, (T, 1), generator=random)
    level_T1 = torch.where(in_column_T, best_T, next_T).unsqueeze(1)
    choice_TE[:] = torch.where(is_tied_TE, _near(level_T1, E, E, random), choice_TE)


def _leave_few_above_zero(choice_TE: Tensor, groups: GroupSpec, random: torch.Generator) -> None:
    """The groups to be kept have their best above zero and nothing else; in the others all are, a little."""
    T, E = choice_TE.shape
    is_kept_TG1 = torch.rand(T, groups.count, 1, generator=random).argsort(1) < groups.kept
    value_TGS = torch.rand(T, groups.count, E // groups.count, generator=random)
    is_best_S = torch.arange(E // groups.count) < groups.top
    kept_TGS = torch.where(is_best_S, 0.5 + value_TGS / 4, -value_TGS)
    choice_TE[:] = torch.where(is_kept_TG1, kept_TGS, value_TGS / 8).view(T, E)


def _tie_groups(choice_TE: Tensor, groups: GroupSpec, random: torch.Generator) -> None:
    """Every group's best add up to nearly the same, or one alone is nearly that; the other members are less."""
    T, E = choice_TE.shape
    G, size = groups.count, E // groups.count
    sum_TG = _near(_levels(T, random), G, size, random)
    first_TG = sum_TG * 0.5 + torch.rand(T, G, generator=random) * 0.25
    best = torch.stack([first_TG, sum_TG - first_TG], dim=2) if groups.top == 2 else sum_TG.unsqueeze(2)
    others = torch.minimum(choice_TE.view(T, G, size), best.amin(dim=2, keepdim=True) - 1e-3)
    place = torch.rand(T, G, size, generator=random).argsort(2)[:, :, : groups.top]
    choice_TE[:] = others.scatter(2, place, best).view(T, E)


def _levels(T: int, random: torch.Generator) -> Tensor:
    return torch.tensor(LEVELS)[torch.randint(len(LEVELS), (T, 1), generator=random)]


def _near(level_T1: Tensor, width: int, words: int, random: torch.Generator) -> Tensor:
    """[T, width] numbers a few steps from each level, or a few roundings of what an index leaves in a word."""
    T = len(level_T1)
    steps = torch.tensor((*STEPS, words // 2, words - 1, words, words + 1))
    count = steps[torch.randint(len(steps), (T, width), generator=random)]
    count *= torch.randint(2, (T, width), generator=random) * 2 - 1
    slack = torch.randint(-2, 3, (T, width), generator=random) * 4e-6 * (torch.rand(T, 1, generator=random) < 0.3)
    return number_at(place_of(level_T1.expand(T, width)) + count) + slack * (1.0 + level_T1.abs())


def place_of(x: Tensor) -> Tensor:
    """int64: where fp32 numbers stand among all of them; +0.0 at 0, -0.0 at -1."""
    bits = x.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -1 - (bits ^ -(2**31)), bits)


def number_at(place: Tensor) -> Tensor:
    """The inverse of place_of."""
    return torch.where(place < 0, (-1 - place) ^ -(2**31), place).int().view(torch.float32)


def _logits(scores_TE: Tensor, score: ScoreFunction) -> Tensor:
    """Logits with about those scores, in fp32; a softmax's up to a constant."""
    exact = scores_TE.double()
    if score is ScoreFunction.SIGMOID:
        exact = exact.clamp(1e-38, 1 - 1e-7).logit()
    elif score is ScoreFunction.SQRT_SOFTPLUS:
        softplus = exact.clamp(min=math.sqrt(2e-45)).square()
        exact = torch.where(softplus > 30, softplus, torch.expm1(softplus).log())
    elif score is ScoreFunction.SOFTMAX:
        exact = exact.clamp(1e-38, 10).log()
    return exact.float()
