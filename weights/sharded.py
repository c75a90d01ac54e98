"""Gathers a learner whose ranks hold shards (FSDP2, or any state dict of DTensors), tensor by tensor.

    rank 0:        with gathered(model) as pairs:          every other rank:   take_part(model)
                       publisher.publish(pairs, step)

Both walk the same state dict in the same order. The full tensors that a rank holds at any time are at most three: one
that its caller still looks at, the next, and one that is on its way. The model must not train meanwhile: its
collectives would mix with these. After take_part has returned it may, whatever the publisher does next.

What does not hang: a publishing rank that fails between two tensors, or before the first, ends all others at the next
layer with UpdateAborted (leave the `with`, or call close()) and the ranks stay in step. A rank that dies, stops or
never comes ends the others in a TransportError; `roll_call.py` says after how long.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import groupby
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeGuard

import torch
from torch import Tensor

from weights.dtypes import WIRE_DTYPES, fits
from weights.errors import TransportError
from weights.naming import to_wire
from weights.roll_call import RollCall

if TYPE_CHECKING:  # it takes a second to import, and who has a sharded tensor has it already
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

DEFAULT_RANKS_DEADLINE_S = 180.0
"""How long a rank waits for the others before a layer: they may be held up by what the publisher does with the last
one. Shorter than NCCL's own ten minutes, after which its watchdog ends the process."""

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # activation checkpointing, torch.compile
_DTYPES = tuple(WIRE_DTYPES.values())


def gathered(
    source: torch.nn.Module | Mapping[str, Tensor],
    *,
    dtypes: Mapping[str, torch.dtype] | None = None,
    deadline_s: float = DEFAULT_RANKS_DEADLINE_S,
) -> "Gathering":
    """(name, full tensor) of everything in `source`, detached, in the order of its state dict: on the publishing rank.

    Collective: every other rank of the learner calls `take_part` on its own shards. Names are the state dict's, without
    the prefixes of activation checkpointing and torch.compile. Tensors that are no DTensors are passed through as they
    are here, without a copy. To be closed, or used in a `with`.

    dtypes: what the hosts store, by wire name: a wider master is rounded as in `rounded`, but before it travels.

    ValueError for a name given twice and for what is no tensor; iterating raises RollCall.call's errors.
    """
    return Gathering(source, publishing=True, dtypes=dtypes or {}, deadline_s=deadline_s)


def take_part(source: torch.nn.Module | Mapping[str, Tensor], *, deadline_s: float = DEFAULT_RANKS_DEADLINE_S) -> None:
    """This rank's share in what another gathers: keeps nothing, and returns when all of it is gathered everywhere.

    At once if nothing in `source` is sharded. UpdateAborted if the publishing rank gave up; other errors as
    `gathered`'s.
    """
    deque(Gathering(source, publishing=False, dtypes={}, deadline_s=deadline_s), maxlen=0)


def rounded(pairs: Iterable[tuple[str, Tensor]], dtypes: Mapping[str, torch.dtype]) -> Iterator[tuple[str, Tensor]]:
    """The same pairs, float32 masters rounded to the bfloat16 or float16 that the hosts store (nearest, ties to even,
    as Tensor.to: in float16, what is too large becomes infinite).

    dtypes: by name. A tensor that it does not name, that is as wanted already, or that would not be rounded but
    widened or turned into another kind is passed through: the host says what it makes of it.
    """
    for name, tensor in pairs:
        dtype = _narrower(tensor.dtype, dtypes.get(name))
        yield name, tensor if dtype is None else tensor.detach().to(dtype)


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether this rank holds the tensor together with others: a DTensor, replicated ones too."""
    return hasattr(tensor, "full_tensor")


class Gathering(Iterator[tuple[str, Tensor]]):
    """One rank's walk through a learner's state dict. Not for several threads."""

    def __init__(
        self,
        source: torch.nn.Module | Mapping[str, Tensor],
        *,
        publishing: bool,
        dtypes: Mapping[str, torch.dtype],
        deadline_s: float,
    ) -> None:
        if not deadline_s > 0:
            raise ValueError(f"a deadline is positive, got {deadline_s} s")
        tensors = _listed(source)
        self._publishing = publishing
        self._layers = deque(deque(layer) for _, layer in groupby(tensors.items(), key=lambda item: _layer(item[0])))
        self._layer: deque[tuple[str, Tensor]] = deque()
        self._ahead: tuple[str, Tensor, Callable[[], bool]] | None = None
        """On its way: name, full tensor, and whether it is there."""
        self._ended = False
        self._codes: dict[str, int] = {
            name: 0 if dtype is None else 1 + _DTYPES.index(dtype)
            for name, tensor in tensors.items()
            for dtype in [_narrower(tensor.dtype, _asked(name, tensor, dtypes) if dtypes else None)]
        }
        """Per tensor, what it is rounded to; the publishing rank's word holds."""
        self._agreed = False
        mesh = _mesh_of_all(tensors)
        self._ranks = (
            None
            if mesh is None
            else RollCall(
                mesh,
                publishing=publishing,
                tensors=len(tensors),
                fingerprint=_fingerprint(tensors),
                deadline_s=deadline_s,
            )
        )

    def __next__(self) -> tuple[str, Tensor]:
        if self._ended:
            raise StopIteration
        try:
            while self._ahead is None:
                self._meet()
                if not self._layers:
                    raise StopIteration  # after the last layer's roll call: all ranks are through
                self._layer = self._layers.popleft()
                self._ahead = self._send_for()
            name, tensor, arrived = self._ahead
            self._ahead = self._send_for()
            if self._ranks is not None:
                self._ranks.wait(arrived, name)
            return name, tensor
        except BaseException:  # the ranks are through, or no longer in step: either way, no more collectives
            self._ended = True
            self._ahead = None
            raise

    def close(self) -> None:
        """Gives up unless all is gathered: the other ranks end with UpdateAborted, and all of them stay in step."""
        if self._ended:
            return
        self._ended = True
        self._ahead = None
        with suppress(TransportError, ValueError):  # whoever does not hear of it has a deadline of its own
            while self._layer:
                self._send_for()  # they are gathering the layer to its end
            self._meet(off=self._publishing)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _meet(self, *, off: bool = False) -> None:
        """All ranks meet before a layer; the first time, they learn what is rounded too."""
        if self._ranks is None:
            return
        what = self._layers[0][0][0] if self._layers else "the end"
        self._ranks.call(what, off=off)
        if not self._agreed and not off:
            agreed = self._ranks.largest(list(self._codes.values()), what)
            self._codes = dict(zip(self._codes, agreed, strict=True))
            self._agreed = True

    def _send_for(self) -> tuple[str, Tensor, Callable[[], bool]] | None:
        """The next tensor of this layer; None after its last. A GPU's comes later than this returns."""
        if not self._layer:
            return None
        name, tensor = self._layer.popleft()
        try:
            tensor = tensor.detach()
            if self._codes[name]:
                tensor = tensor.to(_DTYPES[self._codes[name] - 1])
            full = _full(tensor) if is_sharded(tensor) else tensor
            return name, full, _arrival(full)
        except RuntimeError as error:
            raise TransportError(
                f"{name} could not be gathered: a rank of the learner is gone, or too slow for its process group, or "
                f"out of memory; the ranks are out of step from here on: {error}"
            ) from error


def _full(shard: "DTensor") -> Tensor:
    device = shard.device_mesh.device_type
    if shard.to_local().device.type == device:
        return shard.full_tensor()
    offloaded: Tensor = shard.to(device)  # the mesh's groups reach only its own devices
    assert is_sharded(offloaded)
    return offloaded.full_tensor()


def _arrival(tensor: Tensor) -> Callable[[], bool]:
    """Whether everything that was asked of the tensor's device so far is done."""
    if not tensor.is_cuda:
        return lambda: True
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(tensor.device))
    return event.query


def _listed(source: torch.nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name, without wrappers' prefixes; ValueError for a name given twice and for what is no tensor."""
    tensors: dict[str, Tensor] = {}
    faults = []
    for full_name, tensor in (source.state_dict() if isinstance(source, torch.nn.Module) else source).items():
        name = full_name
        for prefix in _WRAPPERS:
            name = name.replace(prefix, "")
        if name in tensors:
            faults.append(f"{full_name}: {name} is there already")
        if not isinstance(tensor, Tensor):
            faults.append(f"{full_name}: {type(tensor).__name__}, expected a tensor")
        tensors[name] = tensor
    if faults:
        raise ValueError("this state dict cannot be published:\n  " + "\n  ".join(faults))
    return tensors


def _layer(name: str) -> str:
    """What is gathered between two roll calls: model.layers.3; everything outside numbered layers is one layer."""
    words = name.split(".")
    numbers = [at for at, word in enumerate(words) if word.isdecimal()]
    return ".".join(words[: numbers[0] + 1]) if numbers else ""


def _mesh_of_all(tensors: Mapping[str, Tensor]) -> "DeviceMesh | None":
    """The largest mesh: the roll is called there. None if nothing is sharded, ValueError if it lacks a rank."""
    meshes = {name: tensor.device_mesh for name, tensor in tensors.items() if is_sharded(tensor)}
    if not meshes:
        return None
    largest = max(meshes.values(), key=lambda mesh: mesh.size())  # the first of equals, so the same on every rank
    known: dict[DeviceMesh, frozenset[int]] = {
        mesh: frozenset(mesh.mesh.flatten().tolist()) for mesh in meshes.values()
    }
    outside = [f"{name}: {sorted(known[mesh])}" for name, mesh in meshes.items() if not known[mesh] <= known[largest]]
    if outside:
        raise ValueError(
            f"these tensors lie on ranks outside of the largest mesh, {sorted(known[largest])}, and no roll can be "
            f"called over both; publish each mesh's tensors by themselves:\n  " + "\n  ".join(outside)
        )
    return largest


def _fingerprint(tensors: Mapping[str, Tensor]) -> int:
    """62 bits of what must be equal on all ranks: names in order, full shapes, dtypes, placements, mesh shapes."""
    lines = [
        f"{name}\t{tuple(tensor.shape)}\t{tensor.dtype}\t"
        + (f"{tensor.placements}\t{tuple(tensor.device_mesh.shape)}" if is_sharded(tensor) else "here")
        for name, tensor in tensors.items()
    ]
    return int.from_bytes(hashlib.blake2b("\n".join(lines).encode(), digest_size=8).digest(), "little") >> 2


def _asked(name: str, tensor: Tensor, dtypes: Mapping[str, torch.dtype]) -> torch.dtype | None:
    """What the hosts store a tensor as: stacked experts as the first of their wire tensors."""
    if name in dtypes:
        return dtypes[name]
    stand_in = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    first = next(iter(to_wire([(name, stand_in)])), None)
    return None if first is None else dtypes.get(first[0])


def _narrower(held: torch.dtype, wanted: torch.dtype | None) -> torch.dtype | None:
    """`wanted` where rounding `held` gives it, else None."""
    return wanted if wanted is not None and wanted != held and fits(wanted, held) else None
