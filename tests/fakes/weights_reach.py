"""A learner's memory and wires within this process: what a GPU's handles and NCCL are to real ones."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import count

import torch
from torch import Tensor

from weights.cargo import Cargo, Loader
from weights.errors import DeadlineExceeded, TransportError
from weights.lease import Memory, WireTerms
from weights.lease_loader import LeaseLoader
from weights.source import Source, in_place
from weights.transports.memory import SimulatedClock
from weights.wire_loader import Sender, WireLoader


class ProcessMemory:
    """Gives out and opens handles to ordinary memory: an Exporter and a Reach at once."""

    def __init__(self) -> None:
        self._shared: dict[str, Tensor] = {}
        self._numbers: Iterator[int] = count()
        self.opened: list[str] = []
        """Handles that were opened and not closed."""
        self.opens = 0
        self.hidden = False
        """No memory has a handle: the learner's allocator does not let it be shared."""
        self.unreachable = False
        """No handle can be opened: the learner's device is not visible."""
        self.short: set[str] = set()
        """Handles that lead to less memory than it was said to be."""

    def share(self, state: Mapping[str, Tensor]) -> None:
        """The storages of these tensors have handles from now on."""
        known = {whole.data_ptr() for whole in self._shared.values()}
        for tensor in state.values():
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                self._keep(torch.empty(0, dtype=torch.uint8).set_(storage))

    def around(self, address: int, device: torch.device) -> tuple[Memory, int]:
        if not self.hidden:
            for handle, whole in self._shared.items():
                if 0 <= address - whole.data_ptr() < whole.numel():
                    return Memory(handle, handle, whole.numel()), address - whole.data_ptr()
        raise TransportError("this memory has no handle")

    def serves(self, device: torch.device) -> bool:
        return True

    def buffer(self, size: int, device: torch.device) -> "ProcessBuffer":
        data = torch.zeros(size, dtype=torch.uint8)
        handle = self._keep(data)
        return ProcessBuffer(Memory(handle, handle, size), data)

    def open(self, memory: Memory) -> "OpenedMemory":
        if self.unreachable or memory.handle not in self._shared:
            raise TransportError("the learner's device is not visible here")
        self.opens += 1
        self.opened.append(memory.handle)
        data = self._shared[memory.handle]
        return OpenedMemory(self, memory.handle, data[:-1] if memory.handle in self.short else data)

    def join(self, terms: WireTerms, host: str) -> "HostEnd":
        raise TransportError("no wire here")

    def _keep(self, whole: Tensor) -> str:
        handle = f"memory {next(self._numbers)}"
        self._shared[handle] = whole
        return handle


class ProcessBuffer:
    def __init__(self, memory: Memory, data: Tensor) -> None:
        self.memory = memory
        self.data = data

    def close(self) -> None:
        """Nothing to do."""


class OpenedMemory:
    def __init__(self, owner: ProcessMemory, handle: str, data: Tensor) -> None:
        self._owner = owner
        self._handle = handle
        self.data = data

    def close(self) -> None:
        self._owner.opened.remove(self._handle)


class ProcessLeaseLoader(LeaseLoader):
    """Every tensor of this process lies in memory that has a handle, unless that is hidden."""

    def __init__(self, memory: ProcessMemory, segments: Loader, bucket_bytes: int) -> None:
        super().__init__(memory, segments, bucket_bytes)
        self._memory = memory

    def load(self, source: Source, tied: Mapping[str, str]) -> Cargo:
        self._memory.share(dict(in_place(source) or ()))
        return super().load(source, tied)


class Slots(tuple[Tensor, ...]):
    """Buckets; it knows which of them was touched last."""

    last = 0

    def __getitem__(self, slot: int) -> Tensor:  # type: ignore[override]
        self.last = slot
        return super().__getitem__(slot)


class ProcessWires:
    """Wires in one thread. Hosts take a bucket where the learner has just filled it, while they are told of it; that
    all have taken it shows when the learner sends. As on a real wire nothing says which bucket it is: a host that
    missed one takes the next in its place.
    """

    def __init__(self, clock: SimulatedClock) -> None:
        self._clock = clock
        self._meetings: dict[str, dict[str, HostEnd]] = {}
        self._opened: dict[str, LearnerEnd] = {}
        self.eager = False
        """A sender never notices that a host takes nothing: the bytes are on their way, somewhere."""
        self.damaged: set[str] = set()
        """Hosts at which the first bit of the next bucket arrives wrong."""
        self.absent: set[str] = set()
        """Hosts that never come to a meeting."""

    def open(self, memory: Memory) -> OpenedMemory:
        raise TransportError("no memory is shared here")

    def join(self, terms: WireTerms, host: str) -> "HostEnd":
        ends = self._meetings.setdefault(terms.name, {})
        if host in self.absent:
            self._clock.advance(1.0)
            raise DeadlineExceeded(f"{host} did not meet the others within 1.0 s")
        if host in ends:
            raise ValueError(f"{host} came to the meeting {terms.name} before")
        ends[host] = HostEnd(self, terms.name, host)
        return ends[host]

    def meet(self, terms: WireTerms, slots: Slots, deadline_s: float) -> "LearnerEnd":
        if terms.name in self._opened:
            raise ValueError(f"the learner came to the meeting {terms.name} before")
        ends = self._meetings.setdefault(terms.name, {})
        missing = [host for host in terms.hosts if host not in ends]
        self._opened[terms.name] = LearnerEnd(self, list(ends.values()), slots)
        if missing:
            self._clock.advance(deadline_s)
            for end in (self._opened[terms.name], *ends.values()):
                end.alive = False
            raise DeadlineExceeded(f"{', '.join(missing)} did not come within {deadline_s} s")
        return self._opened[terms.name]

    def learner(self, name: str) -> "LearnerEnd":
        return self._opened[name]

    def wait(self, seconds: float) -> None:
        self._clock.advance(seconds)

    def cut(self, host: str) -> None:
        """This host's ends of all wires are dead, and nobody has noticed."""
        for ends in self._meetings.values():
            if host in ends:
                ends[host].alive = False

    def lose_learner(self) -> None:
        """The learner's process ends: nothing comes over its wires any more."""
        for end in self._opened.values():
            end.alive = False


class LearnerEnd:
    """Rank 0."""

    def __init__(self, wires: ProcessWires, ends: "Sequence[HostEnd]", slots: Slots) -> None:
        self._wires = wires
        self._ends = ends
        self._slots = slots
        self.sent: list[Tensor] = []
        self.alive = True

    def broadcast(self, data: Tensor, root: int, deadline_s: float) -> None:
        assert root == 0
        self.sent.append(data.clone())
        late = [end.host for end in self._ends if end.received < len(self.sent)]
        if late and not self._wires.eager:
            self._wires.wait(deadline_s)
            self.alive = False
            raise DeadlineExceeded(f"{', '.join(late)} took no bucket within {deadline_s} s")

    def at_hand(self, number: int) -> Tensor:
        """The bytes of a broadcast, which may be about to be sent."""
        return self.sent[number] if number < len(self.sent) else tuple.__getitem__(self._slots, self._slots.last)

    def close(self) -> None:
        self.alive = False


class HostEnd:
    """One of the other ranks."""

    def __init__(self, wires: ProcessWires, name: str, host: str) -> None:
        self._wires = wires
        self._name = name
        self.host = host
        self.received = 0
        self.alive = True

    def receive(self, data: Tensor) -> None:
        if not self.alive:
            raise TransportError("the wire has ended")
        learner = self._wires.learner(self._name)
        if not learner.alive:
            self._wires.wait(1.0)
            self.alive = False
            raise DeadlineExceeded(f"nothing came to {self.host} within 1.0 s")
        source = learner.at_hand(self.received)
        self.received += 1
        data.zero_()
        arrived = min(data.numel(), source.numel())
        data[:arrived] = source[:arrived]
        if self.host in self._wires.damaged:
            self._wires.damaged.remove(self.host)
            data[0] ^= 1

    def close(self) -> None:
        self.alive = False


class ProcessStore:
    """Where nobody has to meet."""

    port = 1

    def close(self) -> None:
        """Nothing to do."""


class ProcessSender(Sender):
    """A learner's end of wires in this process."""

    def __init__(self, wires: ProcessWires, bucket_bytes: int, deadline_s: float) -> None:
        super().__init__("gloo", bucket_bytes, deadline_s, "here")
        self._wires = wires
        self._store = ProcessStore()  # type: ignore[assignment]
        self.slots = Slots(self.slots)

    def open(self) -> None:
        assert self._terms is not None
        self.close_wire(keep_terms=True)
        self._wire = self._wires.meet(self._terms, self.slots, self._deadline_s)  # type: ignore[assignment]


class ProcessWireLoader(WireLoader):
    """Broadcasts within this process."""

    def __init__(self, wires: ProcessWires, *, shadow: bool, bucket_bytes: int) -> None:
        super().__init__("gloo", shadow=shadow, bucket_bytes=bucket_bytes, deadline_s=5.0)
        self._make_sender = lambda: ProcessSender(wires, bucket_bytes, 5.0)
