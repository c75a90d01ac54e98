"""A process that becomes a host or a learner: it warms up first, so that a struck one is replaced at once."""

import logging
import os
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from ordeal.gpu.host import Host
from ordeal.gpu.learner import Learner
from ordeal.gpu.model import Model
from ordeal.gpu.terms import Terms
from weights.bucket import pack
from weights.delivery import Delivery
from weights.held import Held
from weights.payload import in_slots
from weights.placement import Placement


def run(connection: Connection, device: str, wire: bool) -> None:
    """The process: says "warm", takes a role, then answers one request after the other."""
    torch.set_num_threads(1)
    logging.getLogger("weights").setLevel(logging.ERROR)  # that learners are lost is what happens here
    model = Model(torch.device(device))
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)
        warm_up(model)
        if wire:
            warm_up_nccl(model.device)
    connection.send({"event": "warm", "process": os.getpid()})
    try:
        _serve(connection, model)
    except EOFError:  # nobody speaks to it any more
        os._exit(0)


def _serve(connection: Connection, model: Model) -> None:
    role = connection.recv()
    terms: Terms = role["terms"]
    if role["as"] == "host":
        actor: Any = Host(role["name"], terms, model)
    else:

        def gate() -> None:
            connection.send({"event": "gate"})
            assert connection.recv()["do"] == "go"

        actor = Learner(terms, model, gate)
    connection.send({"event": "ready"})
    while True:
        request = connection.recv()
        name = request.pop("do")
        if name == "publish":
            connection.send(actor.publish(**request | {"delivery": Delivery(request["delivery"])}))
        elif name == "device":
            connection.send({"event": "device", "result": device_bytes(model.device)})
        else:
            connection.send({"event": name, "result": getattr(actor, name)(**request)})


def device_bytes(device: torch.device) -> dict[str, int]:
    """What this process's PyTorch holds of the device, and what all processes do."""
    if device.type == "cpu":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    return {"reserved": torch.cuda.memory_reserved(device), "used": total - free}


def warm_up(model: Model) -> None:
    """Every kernel of an update, at both ends, is compiled or loaded after this."""
    state = model.content(1)
    bucket_bytes = model.sizes.bucket_bytes
    held = Held(state, {})
    held.digests()
    slots = [torch.empty(bucket_bytes, dtype=torch.uint8, device=model.device) for _ in range(2)]
    parameters = model.storage()
    placement = Placement(held.catalogue, model.layout(parameters), parameters)
    held._laid.ready(placement)
    held._laid.copy_to(placement)
    placement.ready()
    buckets = pack(held.catalogue, bucket_bytes)
    lanes_N2 = held.catalogue.headers.to(model.device)
    for index, part in enumerate(in_slots(placement, buckets, slots)):
        held.fill(index, bucket_bytes, slots[index % 2])
        part.add_lanes(lanes_N2)
        part.copy_to(placement)
    torch.cuda.synchronize(model.device)


def warm_up_nccl(device: torch.device) -> None:
    """Loads the library and looks at the machine, which the first communicator of a process does."""
    from weights.cuda_library import cuda_library
    from weights.wires.nccl import CudaLane, NcclChannel
    from weights.wires.nccl_library import nccl_library

    library = nccl_library()
    channel = NcclChannel(library, CudaLane(device, cuda_library()), library.unique_id(), rank=0, size=1)
    while not channel.idle():
        time.sleep(0.001)
    channel.stop()
