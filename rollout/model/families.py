"""Which architectures can be hosted, and what each of them is translated by."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from rollout.model import glm4_moe, qwen3_moe, wire_names
from rollout.model.router import Hosting
from rollout.model.spec import DecoderSpec
from weights.naming import HostedLayout

FAMILIES: Mapping[str, Callable[[Mapping[str, Any], Hosting], DecoderSpec]] = {
    qwen3_moe.ARCHITECTURE: qwen3_moe.decoder_spec,
    glm4_moe.ARCHITECTURE: glm4_moe.decoder_spec,
}
"""Architecture, as config.json names it -> its translation."""


def decoder_spec(config: Mapping[str, Any], hosting: Hosting | None = None) -> DecoderSpec:
    """What a checkpoint's config.json describes, as the Decoder takes it.

    Args:
        config: the content of config.json.
        hosting: the host's own choices; None takes the defaults.

    Raises:
        ValueError: the architecture is none of ours, or keys are missing, malformed or beyond what is supported; all of
            them are named.
    """
    architectures = config.get("architectures")
    named = architectures if isinstance(architectures, list) else [architectures]
    found = [name for name in named if isinstance(name, str) and name in FAMILIES]
    if len(found) != 1 or len(named) != 1:
        raise ValueError(f"architectures={architectures!r} in config.json: supported is one of {', '.join(FAMILIES)}")
    return FAMILIES[found[0]](config, Hosting() if hosting is None else hosting)


def hosted_layout(spec: DecoderSpec, parameters: Mapping[str, Tensor]) -> HostedLayout:
    """Where each tensor of the checkpoint lies in the hosted parameters.

    Args:
        spec: the decoder.
        parameters: as `storage.allocate` makes them for it.
    """
    return HostedLayout(wire_names.rules(spec), parameters, tied=wire_names.tied(spec))
