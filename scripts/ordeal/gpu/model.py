"""A small hosted model whose content is a function of a seed: whoever judges works it out again.

Rows of odd lengths put tensors at any even address, and every other tensor is aligned: both kinds of copies run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor

from weights.naming import ExpertRows, HostedLayout, Rows, Rule, Whole

LAYERS = 2
_MIX = -7046029254386353131  # 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the model, in elements; `bucket_bytes` cuts it into at least five."""

    hidden: int
    experts: int
    width: int
    vocabulary: int
    block: tuple[int, int]
    bucket_bytes: int


ON_GPU = Sizes(hidden=193, experts=5, width=71, vocabulary=12_001, block=(2048, 1024), bucket_bytes=2 << 20)
"""10 MB. A bucket is too large for PyTorch's pool of small blocks, so that a full device has no room for one."""
ON_CPU = Sizes(hidden=37, experts=3, width=11, vocabulary=401, block=(64, 128), bucket_bytes=12 << 10)


class Model:
    """Names, storage and content.

    Legend: E experts, D hidden size, I width of an expert.
    """

    def __init__(self, device: torch.device) -> None:
        """device: where storage and learner's tensors lie; it decides how large they are."""
        self.device = device
        self.sizes = ON_CPU if device.type == "cpu" else ON_GPU
        self._parts = (self.sizes.hidden, 8, 7)
        """Rows of q, k and v."""
        rules: list[Rule] = [Whole(parameter="embed", name="model.embed_tokens.weight")]
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}"
            experts = f"{prefix}.mlp.experts.{{expert}}"
            rules += [
                Rows(
                    parameter=f"{layer}.qkv",
                    names=tuple(f"{prefix}.self_attn.{part}_proj.weight" for part in "qkv"),
                    rows=self._parts,
                ),
                Whole(parameter=f"{layer}.gate", name=f"{prefix}.mlp.gate.weight"),
                ExpertRows(
                    parameter=f"{layer}.w13",
                    patterns=(f"{experts}.gate_proj.weight", f"{experts}.up_proj.weight"),
                ),
                ExpertRows(parameter=f"{layer}.w2", patterns=(f"{experts}.down_proj.weight",)),
            ]
        rules.append(Whole(parameter="block", name="model.block.weight"))
        rules.append(Whole(parameter="norm", name="model.norm.weight"))
        self._rules = rules

    def storage(self) -> dict[str, Tensor]:
        """What a host serves from: bf16, the gates in fp32; all of it NaN, which is no version's content."""
        return {name: torch.full_like(tensor, float("nan")) for name, tensor in self.hosted(0).items()}

    def layout(self, parameters: Mapping[str, Tensor]) -> HostedLayout:
        return HostedLayout(self._rules, parameters)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of a learner's state dict: experts stacked, everything bf16."""
        sizes, shapes = self.sizes, {}
        shapes["model.embed_tokens.weight"] = (sizes.vocabulary, sizes.hidden)
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}"
            for part, rows in zip("qkv", self._parts, strict=True):
                shapes[f"{prefix}.self_attn.{part}_proj.weight"] = (rows, sizes.hidden)
            shapes[f"{prefix}.mlp.gate.weight"] = (sizes.experts, sizes.hidden)
            shapes[f"{prefix}.mlp.experts.gate_up_proj"] = (sizes.experts, 2 * sizes.width, sizes.hidden)
            shapes[f"{prefix}.mlp.experts.down_proj"] = (sizes.experts, sizes.hidden, sizes.width)
        shapes["model.block.weight"] = sizes.block
        shapes["model.norm.weight"] = (sizes.hidden,)
        return shapes

    def content(self, seed: int) -> dict[str, Tensor]:
        """A learner's state dict, on the device, by integers alone: the same on every device.

        Any bits at all, NaN among them, but in the gates, which are widened.
        """
        drawn = {}
        for place, (name, shape) in enumerate(self.shapes().items()):
            mixed = (_counts(prod(shape), self.device) + (1_000_003 * seed + place)) * _MIX
            if ".gate." in name:
                flat = (((mixed >> 40) % 4096 - 2048).float() / 1024).to(torch.bfloat16)
            else:
                flat = (mixed >> 37 ^ mixed >> 21).to(torch.int16).view(torch.bfloat16)
            drawn[name] = flat.view(shape)
        return drawn

    def hosted(self, seed: int) -> dict[str, Tensor]:
        """What storage holds after that content was committed: by plain torch, no code of the update's."""
        state = self.content(seed)
        found = {"embed": state["model.embed_tokens.weight"]}
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}"
            found[f"{layer}.qkv"] = torch.cat([state[f"{prefix}.self_attn.{part}_proj.weight"] for part in "qkv"])
            found[f"{layer}.gate"] = state[f"{prefix}.mlp.gate.weight"].float()
            found[f"{layer}.w13"] = state[f"{prefix}.mlp.experts.gate_up_proj"]
            found[f"{layer}.w2"] = state[f"{prefix}.mlp.experts.down_proj"]
        return found | {"block": state["model.block.weight"], "norm": state["model.norm.weight"]}


def same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two storages are equal in every bit."""
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(_words(tensor), _words(second[name]))
        for name, tensor in first.items()
    )


def checksum(parameters: Mapping[str, Tensor]) -> int:
    """Of all bits and their places, by none of the digest's code; waits for the device."""
    sums = [
        (_words(tensor).long() * (_counts(tensor.numel(), tensor.device) * 2 + 1)).sum()
        for tensor in parameters.values()
    ]
    return hash(tuple(torch.stack(sums).tolist()))


def _words(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.int16 if tensor.itemsize == 2 else torch.int32)


@cache
def _counts(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)
