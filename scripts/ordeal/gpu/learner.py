"""A learner that stops where it is told, with tensors that stay in one place from update to update."""

import gc
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ordeal.gpu.memory import FileMemory, Handleless, exporter_of
from ordeal.gpu.model import Model
from ordeal.gpu.stop import Stop, nth
from ordeal.gpu.terms import Terms
from weights.cargo import Cargo, Loader, Segment
from weights.codec import encode
from weights.delivery import Delivery
from weights.errors import CommitIncomplete, UpdateAborted
from weights.lease_loader import LeaseLoader
from weights.messages import Deliver, Request, Stage
from weights.publisher import Publisher
from weights.source import Source
from weights.transports.nccl import NcclTransport
from weights.transports.shared_memory import SharedMemoryTransport, SocketLink


class StoppingLoader:
    """Comes to its stop where a learner loads, meets its hosts on a wire, or is about to send them bytes."""

    def __init__(self, loader: Loader, stop: Stop, transport: "Stopping") -> None:
        self._loader = loader
        self._stop = stop
        self._transport = transport

    def load(self, source: Source, tied: Mapping[str, str]) -> Cargo:
        self._stop.at("greeted")
        cargo = self._loader.load(source, tied)
        self._stop.at("loaded")
        transmit, parts = cargo.transmit, cargo.stages or cargo.buckets
        kind = "Stage" if cargo.stages else "Deliver"
        self._transport.parts = parts

        def stopping(part: int) -> None:
            self._stop.at(f"{kind} {nth(part, parts)} sent")
            transmit(part)

        cargo.transmit = stopping  # type: ignore[method-assign]
        return cargo

    def unload(self, *, complete: bool) -> None:
        self._loader.unload(complete=complete)

    def doubt(self) -> None:
        self._loader.doubt()

    def close(self) -> None:
        self._loader.close()


class Stopping:
    """What a transport does more than others: it comes to its stop before and after messages."""

    parts = 0
    """Of the update that is under way."""
    _stop: Stop

    def hosts(self) -> tuple[str, ...]:
        raise NotImplementedError

    def stopping(self, link: SocketLink) -> SocketLink:
        send, stop = link.send, self._stop

        def stopping(request: Request, segment: Segment | None, within_s: float) -> None:
            hosts = self.hosts()
            index, kind = hosts.index(link.host), type(request).__name__
            if isinstance(request, Stage | Deliver):
                kind = f"{kind} {nth(request.bucket, self.parts)}".strip()
            stop.at(f"{kind} to host {index}")
            if stop.phase == f"half of the {kind} to host {index}":
                frame = encode(request)
                link._stream._socket.send(frame[: len(frame) // 2])
                stop.at(f"half of the {kind} to host {index}")
            send(request, segment, within_s)
            if index == len(hosts) - 1 and not isinstance(request, Stage | Deliver):
                stop.at(f"{kind} sent")

        link.send = stopping  # type: ignore[method-assign]
        return link


class StoppingMemory(Stopping, SharedMemoryTransport):
    """cuda_ipc, or shared files."""

    def __init__(self, name: str, stop: Stop, exporter: Any) -> None:
        SharedMemoryTransport.__init__(self, name)
        self._stop = stop
        self._exporter = exporter

    def hosts(self) -> tuple[str, ...]:
        return SharedMemoryTransport.hosts(self)

    def connect(self, host: str, deadline_s: float) -> SocketLink:
        return self.stopping(super().connect(host, deadline_s))

    def loader(self, bucket_bytes: int) -> Loader:
        inner = LeaseLoader(self._exporter, super().loader(bucket_bytes), bucket_bytes)
        return StoppingLoader(inner, self._stop, self)


class StoppingWire(Stopping, NcclTransport):
    """nccl, or gloo."""

    def __init__(self, name: str, stop: Stop, **arguments: Any) -> None:
        NcclTransport.__init__(self, name, **arguments)
        self._stop = stop

    def hosts(self) -> tuple[str, ...]:
        return NcclTransport.hosts(self)

    def connect(self, host: str, deadline_s: float) -> SocketLink:
        return self.stopping(super().connect(host, deadline_s))

    def loader(self, bucket_bytes: int) -> Loader:
        return StoppingLoader(super().loader(bucket_bytes), self._stop, self)


class Learner:
    """One, until its process ends. A version's step is the seed of its content."""

    def __init__(self, terms: Terms, model: Model, wait: Callable[[], None]) -> None:
        """wait: returns when the judge lets it through a gate."""
        terms.enter()
        self._terms = terms
        self._model = model
        self._run = f"learner-{os.getpid()}"
        self._files = FileMemory(terms.folder)
        self._stop = Stop({"gate": wait, "source changed": self._change, "source freed": self._free})
        self._publisher: Publisher | None = None
        self._kind = ""
        self._tensors = self._allocated()

    def publish(
        self,
        *,
        step: int,
        streams: bool,
        delivery: Delivery,
        phase: str | None,
        blow: str,
        fresh: bool,
        deadline_s: float | None,
    ) -> dict[str, Any]:
        """What came of it. streams: its memory has no handle, though the buckets have. fresh: as a learner that was
        never here, else over the connections of the update before. deadline_s: for an answer; None: the fleet's."""
        kind = f"{delivery} {streams}"
        if fresh or kind != self._kind or self._publisher is None:
            self.close()
            self._publisher, self._kind = self._connected(delivery, streams), kind
        self._publisher._links._deadline_s = self._terms.message_s if deadline_s is None else deadline_s
        if phase == "between updates":
            self._free()
        if not self._tensors:
            self._tensors = self._allocated()
        for name, tensor in self._model.content(step).items():
            self._tensors[name].copy_(tensor)
        self._stop.arm(phase, blow)
        try:
            report = self._publisher.publish(self._tensors, step)
            self._stop.at("published")
        except (UpdateAborted, CommitIncomplete) as error:
            return {"event": "failed", "error": type(error).__name__, "text": str(error), "run": self._run}
        finally:
            self._stop.arm(None, "")
        return {"event": "published", "hosts": sorted(report.hosts), "run": self._run, "seconds": report.seconds}

    def close(self) -> None:
        """Leaves the hosts, so that another learner can come."""
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None

    def _connected(self, delivery: Delivery, streams: bool) -> Publisher:
        terms = self._terms
        if terms.transport == "nccl":
            shadow = delivery is Delivery.SHADOW
            backend = "gloo" if terms.on_cpu else "nccl"
            transport: Any = StoppingWire(
                terms.fleet, self._stop, backend=backend, shadow=shadow, deadline_s=terms.message_s
            )
        else:
            exporter = exporter_of(self._model.device, self._files)
            transport = StoppingMemory(terms.fleet, self._stop, Handleless(exporter) if streams else exporter)
        return Publisher(transport, run=self._run, deadline_s=terms.message_s, bucket_bytes=terms.bucket_bytes)

    def _allocated(self) -> dict[str, Tensor]:
        if self._model.device.type == "cpu":
            return self._files.tensors(self._model.shapes().items())
        return {
            name: torch.zeros(shape, dtype=torch.bfloat16, device=self._model.device)
            for name, shape in self._model.shapes().items()
        }

    def _change(self) -> None:
        """As an optimizer that does not wait for its hosts: one element, in the last tensor that is sent."""
        self._tensors["model.block.weight"].view(torch.int16)[-1, -1] += 1
        self._settle()

    def _free(self) -> None:
        """The memory goes back to the device while somebody still refers to the tensors, and others take it."""
        tensors, self._tensors = self._tensors, {}
        if self._model.device.type == "cpu":
            del tensors
            self._files.free()
            return
        sizes = [tensor.untyped_storage().nbytes() for tensor in tensors.values()]
        for tensor in tensors.values():
            tensor.untyped_storage().resize_(0)
        del tensors
        gc.collect()
        torch.cuda.empty_cache()
        others = [torch.full((size,), 255, dtype=torch.uint8, device=self._model.device) for size in sizes]
        self._settle()
        del others

    def _settle(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
