"""How many rows of the corpus the kernel gets wrong: prints [rows, wrong ids, wrong weights] for a spec by name.

Run in a process of its own, with the routing package to be judged first on PYTHONPATH. On a GPU the judge is eager
PyTorch; elsewhere the reference, and the kernel is interpreted and given the scores, so that no exponential of the
interpreter's is in the way.
"""

import dataclasses
import json
import sys

import torch
from router_rows import SPECS, bits, boundary_ties, logit_rows, operands
from torch import Tensor

from routing import (
    Assignment,
    RouterSpec,
    kernel_route,
    kernel_route_from_scores,
    reference,
    reference_from_scores,
)
from routing.reference import scores


def wrong_rows(name: str) -> list[int]:
    spec = SPECS[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    random = torch.randn(512, spec.num_experts, generator=torch.Generator().manual_seed(5)).to(spec.gate.output_dtype)
    logits_TE = torch.cat([random, *logit_rows(spec).values()]).to(device)
    pairs = []
    for bias in ("small", "negative") if spec.has_bias else ("small",):
        given = {key: tensor.to(device) for key, tensor in operands(spec, bias).items()}
        if device.type == "cuda":
            found = kernel_route(logits_TE, spec, **given)
            pairs.append((found, reference(logits_TE, dataclasses.replace(spec, platform="cpu"), **given)))
        pairs.append(from_scores(scores(logits_TE, spec), spec, given))
    given = {key: torch.zeros_like(tensor) for key, tensor in operands(spec).items()}
    for more in (1, 2):
        pairs.append(from_scores(boundary_ties(scores(random, spec), spec.top_k, more=more), spec, given))
    if spec.groups is not None:
        pairs.append(from_scores(tied_groups(spec.num_experts, spec.groups.count), spec, given))
    rows = sum(len(found.expert_ids_TK) for found, _ in pairs)
    ids = sum(int((a.expert_ids_TK != b.expert_ids_TK).any(dim=1).sum()) for a, b in pairs)
    weights = sum(int((bits(a.weights_TK) != bits(b.weights_TK)).any(dim=1).sum()) for a, b in pairs)
    return [rows, ids, weights]


def from_scores(scores_TE: Tensor, spec: RouterSpec, given: dict[str, Tensor]) -> tuple[Assignment, Assignment]:
    """The kernel's and the reference's."""
    if torch.cuda.is_available():
        scores_TE, given = scores_TE.cuda(), {key: tensor.cuda() for key, tensor in given.items()}
    return kernel_route_from_scores(scores_TE, spec, **given), reference_from_scores(scores_TE, spec, **given)


def tied_groups(num_experts: int, count: int) -> Tensor:
    """[1, E]: scores that are all different, in groups whose two best have one sum."""
    size = num_experts // count
    scores_GS = torch.arange(num_experts).view(count, size) / 4096 / num_experts
    group = torch.arange(count)
    scores_GS[group, 2 * group % size] = 0.5 + (group + 1) / 64  # in other columns of the kernel's tiles
    scores_GS[group, 2 * group % size + 1] = 0.5 - (group + 1) / 64
    return scores_GS.view(1, num_experts)


if __name__ == "__main__":
    print(json.dumps(wrong_rows(sys.argv[1])))
