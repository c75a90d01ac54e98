"""One rank of a learner whose parameters are sharded (FSDP2), in a process of its own.

`python -m fakes.sharded_rank DEVICE RANK SIZE STORE TIMEOUT_S` makes a process group, then takes orders from stdin, one
JSON object a line, and answers each with one: `Order` says what may be asked, `Answer` what is told.
"""

import gc
import json
import os
import signal
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import islice

import torch
import torch.distributed as dist
from checkpoints import qwen3_config, tiny_model
from fakes.weights_fleet import MemoryFleet
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from weights.sharded import gathered, take_part

LAYERS = 3
EXPERTS = 5


@dataclass(frozen=True, kw_only=True)
class Order:
    """A gathering. Every rank gets the same order."""

    publishers: list[int] = field(default_factory=lambda: [0])
    """Ranks that call gathered; the others call take_part."""
    source: str = "module"
    """What is gathered: module, wrapped (activation checkpointing), hybrid, offloaded, used, or loose."""
    layers: list[int] = field(default_factory=lambda: [LAYERS, LAYERS])
    """Of the model, per rank."""
    experts: list[int] = field(default_factory=lambda: [EXPERTS, EXPERTS])
    """The same: five, which two ranks cannot share evenly, unless another number is given."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """Wire name -> what the hosts store, as torch spells it."""
    out: str = ""
    """Where the publishing rank saves what it gathered, as a safetensors file."""
    refused: str = ""
    """The publishing rank brings it to a fleet that takes no update, for want of a host, or of a good step."""
    fail_after: int | None = None
    """The publishing rank's caller raises after so many tensors."""
    deadline_s: float = 60.0
    signal: str = ""
    """SIGKILL or SIGSTOP, which rank 1 sends to itself ..."""
    signal_at: int = 0
    """... before it begins (0), or when it is about to gather its n-th tensor."""


@dataclass(kw_only=True)
class Answer:
    """What became of it on this rank."""

    error: str = ""
    """Type and text of what was raised."""
    seconds: float = 0.0
    names: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    """Of the full tensors that this rank gathered from shards, in order."""
    most_alive: int = 0
    """How many of those were alive at once."""
    left_alive: int = 0
    """And in the end."""


class Failed(Exception):
    """What the publishing rank's caller raises."""


def model(layers: int, experts: int = EXPERTS) -> nn.Module:
    """The same on every rank, and in the test."""
    return tiny_model(qwen3_config(num_hidden_layers=layers, num_experts=experts), seed=11)


def loose_tensors() -> dict[str, Tensor]:
    """Tensors of every rank count and of sizes that two ranks cannot share evenly."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"rows": (5, 3), "one.row": (1, 4), "columns": (3, 4), "copies": (2, 2), "plain": (3,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def sharded_module(
    device: str, learner: nn.Module, *, wrapped: bool = False, hybrid: bool = False, offloaded: bool = False
) -> nn.Module:
    """hybrid: every rank has a replica of its own, on a mesh of two dimensions."""
    size = dist.get_world_size()
    mesh = (
        init_device_mesh(device, (size, 1), mesh_dim_names=("replicas", "shards"))
        if hybrid
        else init_device_mesh(device, (size,))
    )
    policy = CPUOffloadPolicy() if offloaded else OffloadPolicy()
    learner = learner.to(device)
    for index, layer in enumerate(learner.model.layers):
        if wrapped:
            learner.model.layers[index] = layer = checkpoint_wrapper(layer)
        fully_shard(layer, mesh=mesh, offload_policy=policy)
    return fully_shard(learner, mesh=mesh, offload_policy=policy)


def used_module(device: str, learner: nn.Module) -> nn.Module:
    """One whose last forward left its root unsharded, as it does during a step."""
    learner = sharded_module(device, learner)
    learner(torch.arange(6, device=device)[None])
    return learner


def loose_shards(device: str) -> dict[str, Tensor]:
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    placements = {"rows": Shard(0), "one.row": Shard(0), "columns": Shard(1), "copies": Replicate()}
    return {
        name: distribute_tensor(tensor.to(device), mesh, [placements[name]]).requires_grad_()
        if name in placements
        else tensor
        for name, tensor in loose_tensors().items()
    }


def source_of(order: Order, device: str) -> nn.Module | Mapping[str, Tensor]:
    learner = model(order.layers[dist.get_rank()], order.experts[dist.get_rank()])
    match order.source:
        case "used":
            return used_module(device, learner)
        case "loose":
            return loose_shards(device)
        case "module":
            return sharded_module(device, learner)
        case kind:
            return sharded_module(device, learner, **{kind: True})


@contextmanager
def full_tensors_watched(order: Order, answer: Answer) -> Iterator[None]:
    """Counts what DTensor.full_tensor returns and is still alive; sends the order's signal."""
    alive: set[int] = set()
    original = DTensor.full_tensor

    def watched(shard: DTensor) -> Tensor:
        if dist.get_rank() == 1 and order.signal and len(answer.dtypes) + 1 == order.signal_at:
            os.kill(os.getpid(), signal.Signals[order.signal])
        full = original(shard)
        number = len(answer.dtypes)
        answer.dtypes.append(str(full.dtype))
        alive.add(number)
        weakref.finalize(full, alive.discard, number)
        answer.most_alive = max(answer.most_alive, len(alive))
        return full

    DTensor.full_tensor = watched  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        DTensor.full_tensor = original  # type: ignore[method-assign]
        gc.collect()
        answer.left_alive = len(alive)


def carry_out(order: Order, device: str) -> Answer:
    answer = Answer()
    rank = dist.get_rank()
    source = source_of(order, device)
    if rank == 1 and order.signal and order.signal_at == 0:
        os.kill(os.getpid(), signal.Signals[order.signal])
    began = time.monotonic()
    try:
        with full_tensors_watched(order, answer):
            if rank in order.publishers:
                saved = publish(order, source, answer)
            else:
                saved = {}
                take_part(source, deadline_s=order.deadline_s)
        if saved:
            save_file(saved, order.out)
    except Exception as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.seconds = time.monotonic() - began
    return answer


def publish(order: Order, source: nn.Module | Mapping[str, Tensor], answer: Answer) -> dict[str, Tensor]:
    """Copies of what comes, as a publisher makes them: the tensors themselves are let go."""
    if order.refused:
        publish_in_vain(order, source)
    dtypes = {name: getattr(torch, dtype) for name, dtype in order.dtypes.items()}
    saved: dict[str, Tensor] = {}
    with gathered(source, dtypes=dtypes, deadline_s=order.deadline_s) as pairs:
        for name, tensor in islice(pairs, order.fail_after):
            assert not tensor.requires_grad
            answer.names.append(name)
            saved[name] = tensor.to("cpu", copy=True)
            del tensor
        if order.fail_after is not None:
            raise Failed(f"after {order.fail_after} tensors")
    return saved


def publish_in_vain(order: Order, source: nn.Module | Mapping[str, Tensor]) -> None:
    fleet = MemoryFleet(1)
    if order.refused == "host":
        fleet.transport.end("a")
    fleet.publisher.publish(source, -1 if order.refused == "step" else 1)
    raise AssertionError("the update was taken")


def main(device: str, rank: str, size: str, store: str, timeout_s: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(int(rank))
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=int(rank),
        world_size=int(size),
        timeout=timedelta(seconds=float(timeout_s)),
    )
    for line in sys.stdin:
        print(json.dumps(asdict(carry_out(Order(**json.loads(line)), device))), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
