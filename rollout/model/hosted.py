"""A model in this process: its spec, its parameters, and where each tensor of the wire lies in them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rollout.model.batch import KvCache
from rollout.model.certification import Certification, certified
from rollout.model.checkpoint import load_checkpoint, read_config
from rollout.model.families import decoder_spec, hosted_layout
from rollout.model.random_weights import fill_at_random
from rollout.model.rehearsal import naming_what_fails, rehearse
from rollout.model.router import Hosting
from rollout.model.spec import DecoderSpec
from rollout.model.storage import allocate
from weights.catalogue import Catalogue, TensorSpec
from weights.naming import HostedLayout
from weights.placement import Placement
from weights.version import WeightVersion


@dataclass(frozen=True, kw_only=True, slots=True)
class HostedModel:
    """What an engine runs and a receiver writes to."""

    spec: DecoderSpec
    parameters: dict[str, Tensor]
    """By hosted name; allocated once, never moved."""
    layout: HostedLayout
    """By wire name."""
    wire_dtypes: Mapping[str, torch.dtype]
    """Of the tensors in the checkpoint, by wire name: narrower than the hosted ones where those widen them."""
    certification: Certification
    """What was found about the bits of its routers on this device."""

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        hosting: Hosting | None = None,
        device: torch.device | str,
        at_random: bool = False,
    ) -> "HostedModel":
        """Hosts a Hugging Face checkpoint folder.

        Args:
            folder: config.json and safetensors files.
            hosting: trainer, gate, dtype, platform; None takes the defaults. Its platform must be the device's.
            device: where the parameters live.
            at_random: weights are drawn, and no safetensors files are read.

        Raises:
            ValueError: the config describes what is not supported, all offending keys are named; or an operation of the
                model cannot be computed in this process on this device, which is named; or a router has not the
                trainer's bits here (ParityRefused), and the operation that differs is named.
            CheckpointError: files or tensors are missing, broken or do not fit; all are named.
        """
        hosting, kind = Hosting() if hosting is None else hosting, torch.device(device).type
        if hosting.platform != kind:
            raise ValueError(f"hosting.platform={hosting.platform!r}, but the model goes to {device}: they must agree")
        asked = decoder_spec(read_config(folder), hosting)
        with naming_what_fails(torch.device(device)):
            certification = certified(asked, torch.device(device), refuses=hosting.certify)
        spec = certification.spec
        parameters = allocate(spec, device)
        layout = hosted_layout(spec, parameters)
        if at_random:
            fill_at_random(parameters)
            wire_dtypes = {name: where.dtype for name, where in layout.items()}
        else:
            wire_dtypes = load_checkpoint(folder, spec, layout, parameters)
        model = cls(
            spec=spec,
            parameters=parameters,
            layout=layout,
            wire_dtypes=wire_dtypes,
            certification=certification,
        )
        rehearse(spec, parameters, model.kv_cache(blocks=1, block_size=1))
        return model

    def version(self, run: str) -> WeightVersion:
        """The checkpoint that was loaded, as step 0 of `run`; whoever publishes its very tensors gets the same digest.

        Read from the parameters and digested in the checkpoint's own dtypes, so it holds until something else is
        written to them.
        """
        catalogue = Catalogue(
            TensorSpec(name=name, shape=where.shape, dtype=self.wire_dtypes[name])
            for name, where in self.layout.items()
        )
        live = Placement(catalogue, self.layout, self.parameters).live()
        return WeightVersion(run=run, step=0, digest=live.total)

    def kv_cache(self, *, blocks: int, block_size: int) -> KvCache:
        """An empty cache of the model's shape, dtype and device.

        Args:
            blocks: of all sequences together.
            block_size: tokens per block.
        """
        spec = self.spec
        return KvCache(
            layers=len(spec.layers),
            blocks=blocks,
            block_size=block_size,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            dtype=spec.dtype,
            device=self.parameters["embed.weight"].device,
        )
