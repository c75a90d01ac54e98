"""Routing: token -> experts, with the trainer's own bits."""

from routing.assignment import Assignment, Chosen
from routing.comparison import ReplayReport
from routing.completion_record import packed_record, padded_record
from routing.expert_counts import expert_counts
from routing.fusion import certify_reduce
from routing.gate import gate_logits
from routing.installed_gate import InstalledGate, install_gate
from routing.kernel import kernel_chosen, kernel_route, kernel_route_from_scores
from routing.model_routers import RouterClass
from routing.parity import ParityRefused, ParityReport, certify, examine
from routing.permute import ExpertGroups, gather_tokens, group_by_expert
from routing.record import RoutingRecord
from routing.reduce_function import ReduceFunction, probe_digest, resolve, returns_weights
from routing.reference import reference, reference_chosen, reference_from_scores
from routing.replay import Replay, observe, replay
from routing.route import route
from routing.spec import RouterSpec
from routing.terms import (
    GateSpec,
    GroupScore,
    GroupSpec,
    Platform,
    ReduceKind,
    ScoreFunction,
    SlotOrder,
    SumOrder,
    TopkReduce,
)

__all__ = [
    "Assignment",
    "Chosen",
    "ExpertGroups",
    "GateSpec",
    "GroupScore",
    "GroupSpec",
    "InstalledGate",
    "ParityRefused",
    "ParityReport",
    "Platform",
    "ReduceFunction",
    "ReduceKind",
    "Replay",
    "ReplayReport",
    "RouterClass",
    "RouterSpec",
    "RoutingRecord",
    "ScoreFunction",
    "SlotOrder",
    "SumOrder",
    "TopkReduce",
    "certify",
    "certify_reduce",
    "examine",
    "expert_counts",
    "gate_logits",
    "gather_tokens",
    "group_by_expert",
    "install_gate",
    "kernel_chosen",
    "kernel_route",
    "kernel_route_from_scores",
    "observe",
    "packed_record",
    "padded_record",
    "probe_digest",
    "reference",
    "reference_chosen",
    "reference_from_scores",
    "replay",
    "resolve",
    "returns_weights",
    "route",
]
