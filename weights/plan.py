"""Which wire tensor is copied where: decided for a whole update before the first byte is written."""

from collections.abc import Sequence

from weights.catalogue import Catalogue
from weights.dtypes import dtype_name, fits
from weights.errors import ManifestError
from weights.naming import HostedLayout, HostedSlice


def plan(catalogue: Catalogue, layout: HostedLayout, *, subset: bool = False) -> Sequence[HostedSlice]:
    """The place in `layout` of each tensor of `catalogue`, in its order.

    Together they cover every element of every hosted parameter once; with `subset`, of those that are in it.

    ManifestError, one for all offenders: tensors missing (unless it is a subset), unknown, given twice, of a wrong
    shape, or of a dtype that the host neither stores nor widens exactly.
    """
    faults = [f"{name}: given {count} times" for name, count in catalogue.repeated.items()]
    if not subset:
        faults += [f"{name}: missing" for name in layout if name not in catalogue.places]
    targets = []
    for tensor in catalogue.tensors:
        target = layout.get(tensor.name)
        if target is None:
            host = layout.tied.get(tensor.name)
            faults.append(f"{tensor.name}: unknown" + (f"; it is tied to {host} here, send only that" if host else ""))
            continue
        if tensor.shape != target.shape:
            faults.append(f"{tensor.name}: shape {list(tensor.shape)}, hosted {list(target.shape)}")
        if not fits(tensor.dtype, target.dtype):
            faults.append(f"{tensor.name}: {dtype_name(tensor.dtype)}, hosted {dtype_name(target.dtype)}")
        targets.append(target)
    if faults:
        raise ManifestError(
            f"the update does not fit the hosted model ({len(catalogue)} tensors sent, {len(layout)} hosted, "
            f"{len(faults)} faults; a host takes its own dtype or one that it widens exactly):\n  "
            + "\n  ".join(faults)
        )
    return tuple(targets)
