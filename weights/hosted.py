"""Hosted: a host's parameters, the version that they hold, and the only code that changes either."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from weights.aside import settled
from weights.catalogue import Catalogue, TensorSpec
from weights.digest import Digest, narrowed
from weights.errors import ManifestError, UpdateAborted, WeightsError
from weights.manifest import Manifest
from weights.naming import HostedLayout
from weights.placement import Placement
from weights.serving import Serving
from weights.staging import StagedUpdate
from weights.version import WeightVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """How long a commit took, in seconds."""

    pause_s: float
    copy_s: float
    verify_s: float


class Hosted:
    """What a host serves. Not for several threads, apart from `version`."""

    def __init__(
        self,
        *,
        host: str,
        layout: HostedLayout,
        parameters: Mapping[str, Tensor],
        serving: Serving,
        version: WeightVersion | None,
        wire_dtypes: Mapping[str, torch.dtype] | None,
        clock: Callable[[], float],
    ) -> None:
        """wire_dtypes: by wire name, what `version`'s digest was taken over; left out, the hosted dtypes.

        ValueError if the parameters are not the layout's, or not contiguous."""
        faults = [
            f"{name}: {tuple(view.shape)} {view.dtype}, expected {layout[name].shape} {layout[name].dtype}"
            for name, view in layout.state_dict(parameters)
            if view.shape != layout[name].shape or view.dtype != layout[name].dtype
        ]
        faults += [f"{name}: not contiguous" for name, tensor in parameters.items() if not tensor.is_contiguous()]
        if faults:
            raise ValueError("these parameters are not the layout's:\n  " + "\n  ".join(faults))
        self.version = version
        """What the parameters hold, whole; None while and after they hold anything else, or may not be served."""
        self._host = host
        self._layout = layout
        self._parameters = parameters
        self._serving = serving
        self._clock = clock
        dtypes = {name: where.dtype for name, where in layout.items()} | dict(wire_dtypes or {})
        catalogue = Catalogue(TensorSpec(name=name, shape=layout[name].shape, dtype=dtypes[name]) for name in layout)
        self._placement = Placement(catalogue, layout, parameters)
        """Of all hosted tensors, in the wire dtypes that the version's digest was taken over."""
        self._next_placement: Placement | None = None
        self._manifest: Manifest | None = None
        """Of `version`, as it was committed; None for what was loaded."""

    def content(self) -> tuple[WeightVersion, Iterator[tuple[str, Tensor]]]:
        """The version, and (wire name, tensor in its wire dtype), read as it is iterated.

        A commit meanwhile makes it a mixture, which shows in its digest. UpdateAborted if there is no version.
        """
        version, placement = self.version, self._placement
        if version is None:
            raise UpdateAborted(f"{self._host} has no version to share: it serves nothing until a complete commit", {})
        named = enumerate(placement.catalogue.tensors)
        return version, ((tensor.name, as_on_the_wire(placement.view(place), tensor.dtype)) for place, tensor in named)

    def digest(self) -> Digest:
        """Worked out from the parameters as they are; equal to the version's digest if they are whole."""
        return self._placement.live().total

    def after(self, subset: Manifest, base: Digest) -> Manifest:
        """What the parameters will hold when a subset was written over `base`.

        ManifestError if they hold anything else, or have not all of its tensors.
        """
        if self.version is None or self.version.digest != base:
            serves = "nothing, and heals only by a full update" if self.version is None else str(self.version)
            raise ManifestError(f"the subset builds on content {base}, and this host serves {serves}")
        if self._manifest is None:
            loaded = Manifest(self._placement.catalogue, self._placement.live())
            if loaded.digest != base:
                raise ManifestError(f"the parameters have digest {loaded.digest}, and {self.version} is served")
            self._manifest = loaded
        patched = self._manifest.patched(subset)
        if patched.catalogue is not self._placement.catalogue:  # other dtypes on the wire; planned before any pause
            self._next_placement = Placement(patched.catalogue, self._layout, self._parameters)
        return patched

    def overwriting(self, update: StagedUpdate) -> "Overwriting":
        """A commit of `update`, to be entered as a context."""
        return Overwriting(self, update, self._serving, self._clock)

    def stop(self, reason: str) -> None:
        """Serves nothing until a complete commit, though nothing was written."""
        self.version = None
        self._serving.torn(reason)

    def hold(self, update: StagedUpdate) -> None:
        """The parameters were verified to hold `update`."""
        self._manifest = update.content
        if update.offer.base is None:
            self._placement = update.placement
        elif self._next_placement is not None and self._next_placement.catalogue is update.content.catalogue:
            self._placement = self._next_placement
        self.version = update.version


def as_on_the_wire(held: Tensor, dtype: torch.dtype) -> Tensor:
    """A hosted tensor in its wire dtype, bit for bit what came: a rounding cast would rewrite the payloads of NaNs."""
    return held if held.dtype == dtype else narrowed(held, dtype)


class Overwriting(AbstractContextManager["Overwriting"]):
    """A commit on its way: a pause, bytes, a verdict. However it is left, the version is the content's or None.

    Entering waits for the pause (DeadlineExceeded: nothing was written). Left before `open`, nothing has happened; left
    after it without `verified`, the host is torn.
    """

    def __init__(self, hosted: Hosted, update: StagedUpdate, serving: Serving, clock: Callable[[], float]) -> None:
        self._hosted = hosted
        self._update = update
        self._serving = serving
        self._clock = clock
        self._pause = serving.paused()
        self._began = self._opened = self._copied = 0.0
        self.is_open = False
        """The first byte is or was about to be written."""
        self.reason = "the commit was interrupted"
        """Why the host is torn, if it is."""
        self.written: Written | None = None
        """After it was left, verified."""
        self._verified_at: float | None = None

    def __enter__(self) -> Self:
        self._pause.__enter__()
        self._began = self._clock()
        return self

    def open(self) -> None:
        """Bytes follow: the parameters hold no version from here on."""
        settled(self._update.placement.device)  # whatever the engine has launched reads the old weights
        self.is_open = True
        self._hosted.version = None
        self._opened = self._clock()

    def write(self) -> bool:
        """Copies what is staged, or was delivered, and verifies the live parameters; False if they do not hold the
        update, with the reason.
        """
        try:
            self._update.payload.write()
            settled(self._update.placement.device)
            self._copied = self._clock()
            faults = self._update.live_faults()
            if faults:
                self.reason = "\n  ".join(["the parameters do not hold the update after its copy:", *faults])
                return False
            self._verified_at = self._clock()
            self._serving.committed(self._update.version)
            self._hosted.hold(self._update)
        except (RuntimeError, OSError, WeightsError) as error:
            self.reason = f"the commit failed: {error}"
        return self._hosted.version is not None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.is_open and self._hosted.version is None:
                self._serving.torn(self.reason)
        finally:
            self._pause.__exit__(kind, error, trace)
        if self._verified_at is not None and self._hosted.version is not None:
            self.written = Written(
                pause_s=self._clock() - self._began,
                copy_s=self._copied - self._opened,
                verify_s=self._verified_at - self._copied,
            )
