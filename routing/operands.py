"""Do these tensors fit this spec? T tokens, E experts."""

import torch
from torch import Tensor

from routing.spec import RouterSpec


def check_operands(
    values_TE: Tensor,
    spec: RouterSpec,
    *,
    dtype: torch.dtype,
    bias_E: Tensor | None,
    expert_scale_E: Tensor | None,
    num_tokens: Tensor | None = None,
    counts_E: Tensor | None = None,
) -> None:
    """One ValueError naming everything that the spec cannot honour. `dtype` is that of logits, or of given scores."""
    E = spec.num_experts
    faults = []
    if values_TE.ndim != 2 or values_TE.shape[1] != E:
        faults.append(f"logits or scores of shape {tuple(values_TE.shape)}; [T, {E}] expected")
    if values_TE.dtype != dtype:
        faults.append(f"logits or scores in {values_TE.dtype}; the spec says {dtype}")
    if spec.has_bias != (bias_E is not None):
        faults.append(f"the spec says has_bias={spec.has_bias}; bias_E {'missing' if bias_E is None else 'given'}")
    if bias_E is not None:
        faults += _vector_faults("bias_E", bias_E, values_TE, E)
        if bias_E.dtype != torch.float32:
            faults.append(f"bias_E in {bias_E.dtype}; float32 expected")
    if spec.expert_scale != (expert_scale_E is not None):
        state = "missing" if expert_scale_E is None else "given"
        faults.append(f"the spec says expert_scale={spec.expert_scale}; expert_scale_E {state}")
    if expert_scale_E is not None:
        faults += _vector_faults("expert_scale_E", expert_scale_E, values_TE, E)
        if (
            not expert_scale_E.is_floating_point()
            or torch.promote_types(expert_scale_E.dtype, spec.chain_dtype) != spec.chain_dtype
        ):
            faults.append(
                f"expert_scale_E in {expert_scale_E.dtype}; it would widen the chain, which is {spec.chain_dtype}"
            )
    if num_tokens is not None and (num_tokens.ndim, num_tokens.dtype) != (0, torch.int32):
        faults.append(f"num_tokens of shape {tuple(num_tokens.shape)} in {num_tokens.dtype}; an int32 scalar expected")
    if num_tokens is not None and num_tokens.device != values_TE.device:
        faults.append(f"num_tokens on {num_tokens.device}; {values_TE.device} expected")
    if counts_E is not None:
        faults += _vector_faults("counts_E", counts_E, values_TE, E)
        if counts_E.dtype != torch.int32:
            faults.append(f"counts_E in {counts_E.dtype}; int32 expected")
    if faults:
        raise ValueError(f"routing: {'; '.join(faults)}")


def _vector_faults(name: str, vector_E: Tensor, values_TE: Tensor, E: int) -> list[str]:
    faults = []
    if tuple(vector_E.shape) != (E,):
        faults.append(f"{name} of shape {tuple(vector_E.shape)}; [{E}] expected")
    if vector_E.device != values_TE.device:
        faults.append(f"{name} on {vector_E.device}; {values_TE.device} expected")
    return faults
