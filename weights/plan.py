"""Which wire tensor is copied where: decided for a whole update before the first byte is written."""

from collections import Counter
from dataclasses import dataclass

from weights.dtypes import dtype_name, fits
from weights.errors import ManifestError
from weights.manifest import Manifest, TensorEntry
from weights.naming import HostedLayout, HostedSlice


@dataclass(frozen=True, slots=True)
class PlannedCopy:
    """One wire tensor and its place."""

    entry: TensorEntry
    target: HostedSlice


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """Every tensor of the manifest, in its order; together they cover every element of every hosted parameter once."""

    copies: tuple[PlannedCopy, ...]


def plan(manifest: Manifest, layout: HostedLayout) -> CopyPlan:
    """Pairs every tensor of `manifest` with its place in `layout`.

    ManifestError, one for all offenders: tensors missing, unknown, given twice, of a wrong shape, or of a dtype that
    the host neither stores nor widens exactly.
    """
    counts = Counter(entry.name for entry in manifest.entries)
    faults = [f"{name}: given {count} times" for name, count in counts.items() if count > 1]
    faults += [f"{name}: missing" for name in layout if name not in counts]
    copies = []
    for entry in manifest.entries:
        target = layout.get(entry.name)
        if target is None:
            host = layout.tied.get(entry.name)
            faults.append(f"{entry.name}: unknown" + (f"; it is tied to {host} here, send only that" if host else ""))
            continue
        if entry.shape != target.shape:
            faults.append(f"{entry.name}: shape {list(entry.shape)}, hosted {list(target.shape)}")
        if not fits(entry.dtype, target.dtype):
            faults.append(f"{entry.name}: {dtype_name(entry.dtype)}, hosted {dtype_name(target.dtype)}")
        copies.append(PlannedCopy(entry, target))
    if faults:
        raise ManifestError(
            f"the update does not fit the hosted model ({len(manifest.entries)} tensors sent, {len(layout)} hosted, "
            f"{len(faults)} faults; a host takes its own dtype or one that it widens exactly):\n  "
            + "\n  ".join(faults)
        )
    return CopyPlan(tuple(copies))
