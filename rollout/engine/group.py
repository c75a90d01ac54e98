"""The n samples of one prompt: it is read once, and every sample goes on from there."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rollout.request import VersionSpan


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadPrompt:
    """A prompt whose keys and values are in the cache, held until its last sample has begun. V vocabulary."""

    blocks: list[int]
    """Held for the group: full ones are shared with the samples, the last one is copied where it is not full."""
    logits_V: Tensor
    """Of the prompt's last token: every sample draws its first token from them."""
    kv_version_spans: tuple[VersionSpan, ...]
    expert_ids: tuple[NDArray[np.unsignedinteger], ...]
    expert_weights: tuple[NDArray[np.float32], ...]


class Group:
    """Samples of a prompt that have not begun, and what they will begin with."""

    def __init__(self, samples: int) -> None:
        self.to_begin = samples
        self.reader: tuple[str, str, int] | None = None
        """Key of the sample that runs the prompt now; the others wait for it rather than run it again."""
        self.read: ReadPrompt | None = None
