"""Trainer tensor -> hosted tensor: naming, manifests, digests, and the protocol between a learner and its hosts."""

from weights.catalogue import Catalogue, TensorSpec
from weights.digest import Digest, tensor_digest
from weights.digests import Digests
from weights.errors import (
    CommitIncomplete,
    DeadlineExceeded,
    FolderError,
    ManifestError,
    MessageError,
    RosterError,
    TransportError,
    UpdateAborted,
    WeightsError,
)
from weights.manifest import Manifest
from weights.naming import ExpertRows, HostedLayout, HostedSlice, Rows, Rule, Whole, to_wire
from weights.publisher import Publisher
from weights.publishing import Publishing
from weights.receiver import Receiver
from weights.rendezvous import Roster, RosterHost, runtime_directory
from weights.report import HostTimes, PublishReport
from weights.serving import Serving, Sibling
from weights.sharded import gathered, rounded, take_part
from weights.state import State
from weights.version import WeightVersion

__all__ = [
    "Catalogue",
    "CommitIncomplete",
    "DeadlineExceeded",
    "Digest",
    "Digests",
    "ExpertRows",
    "FolderError",
    "HostTimes",
    "HostedLayout",
    "HostedSlice",
    "Manifest",
    "ManifestError",
    "MessageError",
    "PublishReport",
    "Publisher",
    "Publishing",
    "Receiver",
    "Roster",
    "RosterError",
    "RosterHost",
    "Rows",
    "Rule",
    "Serving",
    "Sibling",
    "State",
    "TensorSpec",
    "TransportError",
    "UpdateAborted",
    "WeightVersion",
    "WeightsError",
    "Whole",
    "gathered",
    "rounded",
    "runtime_directory",
    "take_part",
    "tensor_digest",
    "to_wire",
]
