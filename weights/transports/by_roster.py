"""Which transport a fleet's roster names."""

from weights.rendezvous import Roster
from weights.transports.cuda_ipc import CudaIpcTransport
from weights.transports.nccl import NcclTransport
from weights.transports.seam import Transport
from weights.transports.shared_memory import SharedMemoryTransport


def transport_of(roster: Roster) -> Transport:
    """How a publisher reaches the fleet of this roster."""
    match roster.transport:
        case "cuda_ipc":
            return CudaIpcTransport(roster.name)
        case "nccl":
            return NcclTransport(
                roster.name,
                backend="gloo" if roster.backend == "gloo" else "nccl",
                shadow=roster.shadow,
                deadline_s=roster.deadline_s,
            )
        case _:
            return SharedMemoryTransport(roster.name)
