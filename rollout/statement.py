"""What may be promised about the trainer's bits, operation by operation, before anything runs.

A statement is about the trainer that the configuration names, run by eager PyTorch on the same kind of device, with the
same release of PyTorch and the model's dtype. A compiled trainer, or one with fused kernels, is another trainer.
"""

from dataclasses import dataclass

import torch

from rollout.config import RolloutConfig
from rollout.model.spec import DecoderSpec, MoeSpec
from routing import GateSpec, Platform, ReduceKind, RouterSpec
from routing.gate_claims import gate_claim
from routing.parity import ParityReport
from routing.trainers import trainer_named
from routing.verdict import Verdict

IDS, WEIGHTS = "expert ids, given the logits", "combine weights, given the logits"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One operation."""

    operation: str
    verdict: Verdict
    why: str


def statement(config: RolloutConfig, spec: DecoderSpec, trainers: DecoderSpec, platform: Platform) -> tuple[Row, ...]:
    """A row per operation, in the order in which a token meets them.

    Args:
        config: the fleet's.
        spec: what its hosts will run.
        trainers: the same with the gate as the trainer computes it.
        platform: where they run it.
    """
    moe, theirs = first_moe(spec), first_moe(trainers)
    rows = [_weights(spec), _row("embedding", Verdict.EQUAL, "rows are copied"), _norm(platform), _rope(platform)]
    rows += [_linear(spec, platform), _attention(platform)]
    if moe is not None and theirs is not None:
        rows += [
            _gate(moe.router.gate, theirs.router.gate, platform),
            *_router(config, moe.router, platform),
            _experts(platform),
        ]
    return (*rows, _logprobs(platform), _again(platform))


def first_moe(spec: DecoderSpec) -> MoeSpec | None:
    """The first layer that routes; the others route likewise."""
    return next((layer.mlp for layer in spec.layers if isinstance(layer.mlp, MoeSpec)), None)


def _row(operation: str, verdict: Verdict, why: str) -> Row:
    return Row(operation=operation, verdict=verdict, why=why)


def _weights(spec: DecoderSpec) -> Row:
    widened = any(
        isinstance(layer.mlp, MoeSpec) and layer.mlp.gate_dtype != spec.dtype for layer in spec.layers
    )  # the gate, in RL mode
    why = "every update is verified on the live parameters, digest by digest"
    return _row("weights", Verdict.EQUAL, why + ("; the gate's are widened, which is exact" if widened else ""))


def _norm(platform: Platform) -> Row:
    if platform == "cpu":
        return _row("RMSNorm", Verdict.UNPROVED, "the trainer's operations; not shown to be free of the batch's size")
    return _row("RMSNorm", Verdict.UNPROVED, "PyTorch sums a batch of few rows in another order")


def _rope(platform: Platform) -> Row:
    if platform == "cpu":
        return _row("rotary embedding", Verdict.EQUAL, "the trainer's operations, element by element")
    return _row("rotary embedding", Verdict.UNPROVED, "frequencies are computed on the GPU, by the trainer on the CPU")


def _linear(spec: DecoderSpec, platform: Platform) -> Row:
    name = "linear layers"
    if platform == "cpu":
        return _row(name, Verdict.IMPOSSIBLE, "PyTorch's products on a CPU follow the batch: within 1e-5 in float32")
    if spec.dtype == torch.float32:
        return _row(name, Verdict.IMPOSSIBLE, "cuBLAS's float32 products follow the batch, the trainer's own included")
    return _row(name, Verdict.UNPROVED, "cuBLAS splits the sum of some shapes where the batch is small")


def _attention(platform: Platform) -> Row:
    if platform == "cpu":
        return _row("attention", Verdict.IMPOSSIBLE, "keys are read from a cache, and its products follow the batch")
    return _row("attention", Verdict.UNPROVED, "keys are walked in another order than by the trainer's kernel")


def _gate(ours: GateSpec, trainers: GateSpec, platform: Platform) -> Row:
    if ours != trainers:
        why = (
            f"{_shown(ours)} here, {_shown(trainers)} in the trainer: let the trainer run ours (routing.install_gate), "
            "or set gate: trainer"
        )
        return _row("gate", Verdict.IMPOSSIBLE, why)
    if platform == "cpu":
        return _row("gate", Verdict.IMPOSSIBLE, "PyTorch's products on a CPU follow the batch: within 1e-5 in float32")
    if gate_claim(ours).impossible is not None:
        why = (
            "cuBLAS's float32 products follow the batch, the trainer's own included: let the trainer run ours "
            "(routing.install_gate)"
        )
        return _row("gate", Verdict.IMPOSSIBLE, why)
    why = (
        "ours is free of the batch; cuBLAS splits the sum of some shapes where the batch is small: "
        "`moe-rollout parity` measures this model's"
    )
    return _row("gate", Verdict.UNPROVED, why)


def _shown(gate: GateSpec) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in (gate.operand_dtype, gate.output_dtype)]
    return f"{names[0]} operands and {names[1]} logits{' in TF32' if gate.tf32 else ''}"


def certified_rows(config: RolloutConfig, reports: tuple[ParityReport, ...]) -> tuple[Row, ...]:
    """The router's rows as a host found them when it started, in place of what `statement` expects.

    Args:
        config: the fleet's.
        reports: of the host's routers; empty where its model has none.
    """
    unproved = _unproved(config)
    rows = []
    for report in reports[:1]:  # the routers of a model are alike
        for name, differing in ((IDS, report.other_ids), (WEIGHTS, report.other_weights)):
            why = f"{report.summary}{_fused(report) if name == WEIGHTS else ''}"
            if report.mismatches and (differing or not (report.other_ids or report.other_weights)):
                rows.append(_row(name, Verdict.IMPOSSIBLE, f"{report.mismatches[0].operation} differs; {why}"))
            elif unproved is not None:
                rows.append(_row(name, Verdict.UNPROVED, f"{unproved}; {why}"))
            else:
                rows.append(_row(name, Verdict.EQUAL, why))
    return tuple(rows)


def _fused(report: ParityReport) -> str:
    if report.fusion is None:
        return ""
    form = report.fusion.form
    how = "runs as it is" if form is None else f"runs as the fused {form.kind}"
    return f"; {report.fusion.name} {how}: {report.fusion.why}; the trainer has to run the same one"


def _unproved(config: RolloutConfig) -> str | None:
    """Why nothing that is measured here speaks for the trainer."""
    if not isinstance(config.trainer, str):
        return "the router as it is spelled out, bit for bit; whether the trainer computes that is not known here"
    return trainer_named(config.trainer).unproved


def _router(config: RolloutConfig, router: RouterSpec, platform: Platform) -> list[Row]:
    unproved = _unproved(config)
    if unproved is not None:
        rows = [_row(IDS, Verdict.UNPROVED, unproved), _row(WEIGHTS, Verdict.UNPROVED, unproved)]
    elif platform == "cuda" and not config.rl_mode:
        why = "a host that starts says what it finds; with RL mode on it would refuse what differs"
        rows = [_row(IDS, Verdict.UNPROVED, why), _row(WEIGHTS, Verdict.UNPROVED, why)]
    else:
        how = "this machine's PyTorch runs it" if platform == "cpu" else "every host certifies it, or refuses to start"
        why = f"{config.trainer}: its own formula; {how}"
        rows = [_row(IDS, Verdict.EQUAL, why), _row(WEIGHTS, Verdict.EQUAL, why)]
    reduce = router.reduce
    if reduce.kind is ReduceKind.CALLABLE:
        why = (
            f"{reduce.path} (digest {str(reduce.digest)[:8]}); the trainer has to run the same one. A host that starts "
            "tries it on probe rows, and runs a fused form in its place where every bit agrees"
        )
        rows[1] = _row(WEIGHTS, Verdict.UNPROVED, why)
    return rows


def _experts(platform: Platform) -> Row:
    if platform == "cpu":
        why = "the trainer's eager loop, expert by expert; its products follow the batch: within 1e-5 in float32"
        return _row("experts", Verdict.IMPOSSIBLE, why)
    return _row("experts", Verdict.UNPROVED, "the sum over a token's experts depends on the trainer's expert backend")


def _logprobs(platform: Platform) -> Row:
    verdict = Verdict.IMPOSSIBLE if platform == "cpu" else Verdict.UNPROVED
    return _row("log-probabilities", verdict, "they follow from all of the above")


def _again(platform: Platform) -> Row:
    name = "log-probabilities, generated and scored"
    if platform == "cpu":
        return _row(name, Verdict.IMPOSSIBLE, "both on these hosts; products follow the batch: within 1e-5 in float32")
    return _row(name, Verdict.UNPROVED, "both on these hosts; PyTorch's products are not free of the batch everywhere")
