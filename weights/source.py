"""Source: what a learner may publish, and its tensors by name."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from weights.sharded import gathered, is_sharded

Source = torch.nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
"""A module, a state dict, or pairs of name and tensor that are gathered one by one. A module or a state dict may hold
sharded tensors: they are gathered from the learner's other ranks, which call `take_part`."""

Named = Mapping[str, Tensor]
"""A learner's tensors where they stay, by its own names."""


def in_place(source: Source) -> Named | None:
    """The tensors of a module or a state dict that stay where they are; None for those that come one by one, which
    sharded ones do."""
    tensors = source.state_dict() if isinstance(source, torch.nn.Module) else source
    if not isinstance(tensors, Mapping) or any(is_sharded(tensor) for tensor in tensors.values()):
        return None
    return tensors


@contextmanager
def named_pairs(source: Source) -> Iterator[Iterable[tuple[str, Tensor]]]:
    """(name, tensor) of whatever may be published. Left early, the learner's other ranks are told."""
    tensors = source.state_dict() if isinstance(source, torch.nn.Module) else source
    if not isinstance(tensors, Mapping):
        yield tensors
    elif any(is_sharded(tensor) for tensor in tensors.values()):
        with gathered(tensors) as pairs:
            yield pairs
    else:
        yield tensors.items()


class Reading:
    """Whether a source is read."""

    def __init__(self) -> None:
        self.begun = False

    def begins(self) -> None:
        """From here on whoever reads it answers to the learner's other ranks."""
        self.begun = True


@contextmanager
def declined_unless_read(source: Source) -> Iterator[Reading]:
    """If nobody begins to read a sharded source inside, the learner's other ranks are told not to wait for it."""
    reading = Reading()
    try:
        yield reading
    finally:
        if not reading.begun:
            with named_pairs(source):
                pass
