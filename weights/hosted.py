"""Hosted: a host's parameters, the version that they hold, and the only code that changes either."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weights.digest import Digest, tensor_digest
from weights.errors import UpdateAborted, WeightsError
from weights.naming import HostedLayout
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
        self._wire_dtypes = {name: where.dtype for name, where in layout.items()} | dict(wire_dtypes or {})
        """Of the last committed manifest: what the version's digest was taken over."""

    def content(self) -> tuple[WeightVersion, Iterator[tuple[str, Tensor]]]:
        """The version, and (wire name, tensor in its wire dtype), read as it is iterated.

        A commit meanwhile makes it a mixture, which shows in its digest. UpdateAborted if there is no version.
        """
        version, dtypes = self.version, self._wire_dtypes
        if version is None:
            raise UpdateAborted(f"{self._host} has no version to share: it serves nothing until a complete commit", {})
        return version, ((name, view.to(dtypes[name])) for name, view in self._layout.state_dict(self._parameters))

    def digest(self) -> Digest:
        """Worked out from the parameters as they are; equal to the version's digest if they are whole."""
        named = self._layout.state_dict(self._parameters)
        return Digest.total(tensor_digest(name, view, self._wire_dtypes[name]) for name, view in named)

    def write(self, update: StagedUpdate, paused: Callable[[], None]) -> Written | str:
        """Pauses, overwrites, verifies, and flips the version; a text says why the host is torn instead.

        paused: called inside the pause, before the first byte. DeadlineExceeded before that if no pause can be had.
        """
        with self._serving.paused():
            began = self._clock()
            paused()
            done = self._overwrite(update)
        pause_s = self._clock() - began
        return done if isinstance(done, str) else Written(pause_s=pause_s, copy_s=done[0], verify_s=done[1])

    def stop(self, reason: str) -> None:
        """Serves nothing until a complete commit, though nothing was written."""
        self.version = None
        self._serving.torn(reason)

    def _overwrite(self, update: StagedUpdate) -> tuple[float, float] | str:
        """Seconds of the copy and of verifying it. However this is left, the version is the content's or None."""
        reason = "the commit was interrupted"
        self.version = None
        try:
            begun = self._clock()
            update.write(self._parameters)
            copied = self._clock()
            faults = list(update.live_faults(self._parameters))
            verified = self._clock()
            if faults:
                reason = "\n  ".join(["the parameters do not hold the update after its copy:", *faults])
            else:
                self._serving.committed(update.version)
                self._wire_dtypes = {entry.name: entry.dtype for entry in update.offer.manifest.entries}
                self.version = update.version
                return copied - begun, verified - copied
        except (RuntimeError, OSError, WeightsError) as error:
            reason = f"the commit failed: {error}"
        finally:
            if self.version is None:
                self._serving.torn(reason)
        return reason
