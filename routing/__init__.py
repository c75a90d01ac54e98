"""Routing: token -> experts, with the trainer's own bits."""

from routing.assignment import Assignment, Chosen
from routing.gate import gate_logits
from routing.kernel import kernel_chosen, kernel_route, kernel_route_from_scores
from routing.permute import ExpertGroups, gather_tokens, group_by_expert
from routing.reduce_function import ReduceFunction, probe_digest, resolve, returns_weights
from routing.reference import reference, reference_chosen, reference_from_scores
from routing.route import route
from routing.spec import RouterSpec
from routing.terms import GateSpec, GroupScore, GroupSpec, Platform, ReduceKind, ScoreFunction, SlotOrder, TopkReduce

__all__ = [
    "Assignment",
    "Chosen",
    "ExpertGroups",
    "GateSpec",
    "GroupScore",
    "GroupSpec",
    "Platform",
    "ReduceFunction",
    "ReduceKind",
    "RouterSpec",
    "ScoreFunction",
    "SlotOrder",
    "TopkReduce",
    "gate_logits",
    "gather_tokens",
    "group_by_expert",
    "kernel_chosen",
    "kernel_route",
    "kernel_route_from_scores",
    "probe_digest",
    "reference",
    "reference_chosen",
    "reference_from_scores",
    "resolve",
    "returns_weights",
    "route",
]
