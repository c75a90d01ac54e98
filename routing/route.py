"""route: the one entry of every caller. T tokens, E experts."""

from torch import Tensor

from routing.assignment import Assignment
from routing.kernel import kernel_chosen, kernel_route
from routing.reduce_function import ReduceFunction, normalise, resolve
from routing.reference import reference, reference_chosen, scaled
from routing.spec import RouterSpec
from routing.terms import ReduceKind


def route(
    logits_TE: Tensor,
    spec: RouterSpec,
    *,
    bias_E: Tensor | None = None,
    expert_scale_E: Tensor | None = None,
    topk_reduce_func: ReduceFunction | None = None,
    num_tokens: Tensor | None = None,
    counts_E: Tensor | None = None,
) -> Assignment:
    """Expert ids [T, K] int32 and combine weights [T, K] in the spec's weight dtype.

    The Triton kernel on CUDA, the reference on the CPU; the spec's platform must be the device's. logits_TE: in the
    spec's gate output dtype, rows at any stride. bias_E: fp32. expert_scale_E: no wider than the chain dtype.
    topk_reduce_func, or the function that the spec's reduce names, replaces the spec's reduce: see
    routing.reduce_function. The scale applies in every case. num_tokens: an int32 scalar tensor on the device, so that
    a captured graph can serve fewer tokens than its batch; rows from there on are padding, with ids -1 and weights 0.
    counts_E: int32 [E], to which the tokens of each expert are added, padding excepted; the caller zeroes it, and
    routing.expert_counts makes one that is fast to add to. ValueError for whatever cannot be honoured; no other formula
    is ever used instead.
    """
    if logits_TE.device.type != spec.platform:
        raise ValueError(
            f"the spec asks for the bits of platform {spec.platform!r}, the logits are on {logits_TE.device}:"
            f" make the spec for platform={logits_TE.device.type!r}, or move the logits"
        )
    on_cuda = logits_TE.device.type == "cuda"
    function = _function(spec, topk_reduce_func)
    if function is None:
        path = kernel_route if on_cuda else reference
        return path(
            logits_TE, spec, bias_E=bias_E, expert_scale_E=expert_scale_E, num_tokens=num_tokens, counts_E=counts_E
        )
    choose = kernel_chosen if on_cuda else reference_chosen
    chosen = choose(
        logits_TE, spec, bias_E=bias_E, expert_scale_E=expert_scale_E, num_tokens=num_tokens, counts_E=counts_E
    )
    return scaled(chosen.expert_ids_TK, normalise(chosen.scores_TK, function), spec, expert_scale_E)


def _function(spec: RouterSpec, given: ReduceFunction | None) -> ReduceFunction | None:
    if spec.reduce.kind is not ReduceKind.CALLABLE:
        return given
    assert spec.reduce.path is not None
    named = resolve(spec.reduce.path)
    if given is not None and given is not named:
        raise ValueError(
            f"topk_reduce_func={given!r} and the spec's reduce {spec.reduce.path} are two functions: pass one"
        )
    return named
