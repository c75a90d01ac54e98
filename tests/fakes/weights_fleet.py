"""A small hosted model, a host that counts what it is told, and fleets of them in memory."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from weights.cargo import Loader
from weights.delivery import Delivery
from weights.digest import Digest, tensor_digest
from weights.errors import DeadlineExceeded
from weights.manifest import Manifest
from weights.messages import Offer
from weights.naming import ExpertRows, HostedLayout, Rows, Rule, Whole
from weights.publisher import Publisher
from weights.reach import Reach
from weights.receiver import Receiver
from weights.transports.memory import MemoryTransport, SimulatedClock
from weights.version import WeightVersion

EXPERTS, HIDDEN, WIDTH, VOCABULARY = 3, 32, 16, 160

RULES: tuple[Rule, ...] = (
    Whole(parameter="embed", name="model.embed_tokens.weight"),
    Rows(
        parameter="layers.0.qkv",
        names=tuple(f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"),
        rows=(HIDDEN, 8, 8),
    ),
    Whole(parameter="layers.0.gate", name="model.layers.0.mlp.gate.weight"),
    ExpertRows(
        parameter="layers.0.w13",
        patterns=(
            "model.layers.0.mlp.experts.{expert}.gate_proj.weight",
            "model.layers.0.mlp.experts.{expert}.up_proj.weight",
        ),
    ),
    ExpertRows(parameter="layers.0.w2", patterns=("model.layers.0.mlp.experts.{expert}.down_proj.weight",)),
    Whole(parameter="norm", name="model.norm.weight"),
)
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
BUCKET_BYTES = 4096
"""The small model fills six of them, and its embedding is cut over three."""
SILENCE_S, DELIVERY_S = 30.0, 5.0
"""Of the hosts of a fleet in memory: while requests run, and while they are paused."""


def storage(device: str = "cpu") -> dict[str, Tensor]:
    """Hosted storage, all zeros: bf16, with the gate in fp32 as RL mode has it."""
    bf16, fp32 = torch.bfloat16, torch.float32
    zeros = {
        "embed": torch.zeros(VOCABULARY, HIDDEN, dtype=bf16),
        "layers.0.qkv": torch.zeros(HIDDEN + 16, HIDDEN, dtype=bf16),
        "layers.0.gate": torch.zeros(EXPERTS, HIDDEN, dtype=fp32),
        "layers.0.w13": torch.zeros(EXPERTS, 2 * WIDTH, HIDDEN, dtype=bf16),
        "layers.0.w2": torch.zeros(EXPERTS, HIDDEN, WIDTH, dtype=bf16),
        "norm": torch.zeros(HIDDEN, dtype=bf16),
    }
    return {name: tensor.to(device) for name, tensor in zeros.items()}


def layout(parameters: Mapping[str, Tensor]) -> HostedLayout:
    return HostedLayout(RULES, parameters, tied=TIED)


def learner_state(seed: int) -> dict[str, Tensor]:
    """A trainer's state dict as transformers 5 has it: experts stacked, lm_head tied, everything bf16."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    embed = normal(VOCABULARY, HIDDEN)
    return {
        "model.embed_tokens.weight": embed,
        "model.layers.0.self_attn.q_proj.weight": normal(HIDDEN, HIDDEN),
        "model.layers.0.self_attn.k_proj.weight": normal(8, HIDDEN),
        "model.layers.0.self_attn.v_proj.weight": normal(8, HIDDEN),
        "model.layers.0.mlp.gate.weight": normal(EXPERTS, HIDDEN),
        "model.layers.0.mlp.experts.gate_up_proj": normal(EXPERTS, 2 * WIDTH, HIDDEN),
        "model.layers.0.mlp.experts.down_proj": normal(EXPERTS, HIDDEN, WIDTH),
        "model.norm.weight": normal(HIDDEN),
        "lm_head.weight": embed,
    }


def hosted_from(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What storage must hold after `state` was committed, by plain torch and no code of ours."""
    layer = "model.layers.0."
    return {
        "embed": state["model.embed_tokens.weight"],
        "layers.0.qkv": torch.cat([state[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"]),
        "layers.0.gate": state[f"{layer}mlp.gate.weight"].float(),
        "layers.0.w13": state[f"{layer}mlp.experts.gate_up_proj"],
        "layers.0.w2": state[f"{layer}mlp.experts.down_proj"],
        "norm": state["model.norm.weight"],
    }


def same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(
        first[name].dtype == second[name].dtype and torch.equal(_bits(first[name]), _bits(second[name]))
        for name in first.keys() | second.keys()
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def content_digest(parameters: Mapping[str, Tensor]) -> Digest:
    """Of storage as hosted, which is how a host that loaded a checkpoint labels itself."""
    hosted = layout(parameters).state_dict(parameters)
    return Digest.total(tensor_digest(name, tensor) for name, tensor in hosted)


def offer_of(
    manifest: Manifest,
    *,
    sequence: int = 2,
    update: str = "u",
    run: str = "run",
    step: int = 1,
    base: Digest | None = None,
    delivery: Delivery = Delivery.SEGMENTS,
    bucket_bytes: int = BUCKET_BYTES,
) -> Offer:
    """An offer as a publisher makes it to a host that knows nothing."""
    return Offer(
        sequence=sequence,
        update=update,
        run=run,
        step=step,
        base=base,
        delivery=delivery,
        bucket_bytes=bucket_bytes,
        catalogue=manifest.catalogue.id,
        tensors=manifest.catalogue,
        digests=manifest.digests,
    )


class FakeServing:
    """A host's side: what it serves (None: nothing), and gates for its pause."""

    def __init__(self, version: WeightVersion) -> None:
        self.serves: WeightVersion | None = version
        self.torn_because: str | None = None
        self.pauses = 0
        self.is_paused = False
        self.busy = False
        """A step that does not end: the pause misses its deadline."""
        self.misses = 0
        """So many pauses miss their deadline, and the next one does not."""
        self.in_pause = threading.Event()
        self.may_write = threading.Event()
        self.may_write.set()

    @contextmanager
    def paused(self) -> Iterator[None]:
        if self.busy or self.misses:
            self.misses = max(self.misses - 1, 0)
            raise DeadlineExceeded("the running step did not end within 1 s")
        self.pauses += 1
        self.is_paused = True
        self.in_pause.set()
        assert self.may_write.wait(30)
        try:
            yield
        finally:
            self.is_paused = False

    def committed(self, version: WeightVersion) -> None:
        assert self.is_paused
        self.serves = version
        self.torn_because = None

    def torn(self, reason: str) -> None:
        self.serves = None
        self.torn_because = reason


class FakeHost:
    """One host: storage, serving, receiver."""

    def __init__(
        self,
        name: str,
        *,
        silence_s: float = SILENCE_S,
        delivery_s: float | None = None,
        clock: Callable[[], float] | None = None,
        device: str = "cpu",
        reach: Reach | None = None,
        torn: bool = False,
    ) -> None:
        """torn: it begins without a version to serve."""
        self.parameters = storage(device)
        clock = SimulatedClock() if clock is None else clock
        self.initial = WeightVersion(run="checkpoint", step=0, digest=content_digest(self.parameters))
        self.serving = FakeServing(self.initial)
        if torn:
            self.serving.torn("it began so")
        self.receiver = Receiver(
            host=name,
            layout=layout(self.parameters),
            parameters=self.parameters,
            serving=self.serving,
            version=None if torn else self.initial,
            reach=reach,
            silence_s=silence_s,
            delivery_s=delivery_s,
            clock=clock,
            wait=clock.advance if isinstance(clock, SimulatedClock) else time.sleep,
        )

    def holds(self, state: Mapping[str, Tensor]) -> bool:
        here = {name: tensor.cpu() for name, tensor in self.parameters.items()}
        return same_bits(here, hosted_from(state))


class MemoryFleet:
    """Hosts a, b, ... and a publisher, in memory and in simulated time."""

    def __init__(
        self,
        hosts: int = 2,
        *,
        device: str = "cpu",
        reach: Reach | None = None,
        load: Callable[[MemoryTransport, int], Loader] | None = None,
        clock: SimulatedClock | None = None,
    ) -> None:
        self.clock = SimulatedClock() if clock is None else clock
        self.hosts = {
            name: FakeHost(name, delivery_s=DELIVERY_S, clock=self.clock, device=device, reach=reach)
            for name in "abcdefgh"[:hosts]
        }
        self.transport = MemoryTransport(
            {name: host.receiver for name, host in self.hosts.items()}, self.clock, silence_s=SILENCE_S, load=load
        )
        self.publisher = Publisher(
            self.transport, run="run", deadline_s=5.0, bucket_bytes=BUCKET_BYTES, clock=self.clock
        )
