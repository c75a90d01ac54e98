"""From completions to the record of a learner's batch.

B rows of the batch, S positions of a row, L MoE layers, K slots of a token, N recorded positions of a completion.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from routing.record import RoutingRecord, spelled_out


class Routed(Protocol):
    """What a record needs of a completion; rollout.Completion has it."""

    @property
    def prompt_id(self) -> str: ...

    @property
    def sample(self) -> int: ...

    @property
    def prompt_token_ids(self) -> Sequence[int]: ...

    @property
    def token_ids(self) -> Sequence[int]: ...

    @property
    def expert_ids(self) -> Any:
        """NumPy [N, L, K], any integer dtype, slots in the rollout's order: of every token but the last sampled one,
        which the rollout never ran. None where nothing was recorded."""

    @property
    def expert_weights(self) -> Any:
        """NumPy fp32 [N, L, K], or None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stretch:
    """Where a completion stands in the batch."""

    row: int
    start: int
    length: int


def padded_record(
    completions: Sequence[Routed], input_ids_BS: Tensor, attention_mask_BS: Tensor | None = None
) -> RoutingRecord:
    """One completion per row, padded on the left or on the right; on the device of input_ids.

    Args:
        completions: in the order of the rows.
        input_ids_BS: what the learner will feed: prompt and sampled tokens, the last of which may be left out.
        attention_mask_BS: non-zero at these tokens and zero at padding; None where nothing is padded.

    Raises:
        ValueError: completions without routing or with unlike routing, more or fewer completions than rows, or rows
            whose tokens are not their completion's; all are named.
    """
    if input_ids_BS.ndim != 2:
        raise ValueError(f"routing record: input_ids [B, S] expected, got {list(input_ids_BS.shape)}")
    mask_BS = torch.ones_like(input_ids_BS) if attention_mask_BS is None else attention_mask_BS
    if mask_BS.shape != input_ids_BS.shape:
        raise ValueError(
            f"routing record: attention_mask {list(input_ids_BS.shape)} expected, got {list(mask_BS.shape)}"
        )
    rows = len(input_ids_BS)
    if len(completions) != rows:
        over = [name(c) for c in completions[rows:]]
        rest = f"left over: {spelled_out(over, len(over))}" if over else f"rows from {len(completions)} on have none"
        raise ValueError(f"routing record: {len(completions)} completions for {rows} rows of input_ids; {rest}")
    real_BS = mask_BS.cpu() != 0
    starts, lengths = real_BS.int().argmax(dim=1).tolist(), real_BS.sum(dim=1).tolist()
    holes = [
        f"row {row} ({name(completions[row])})"
        for row in range(rows)
        if not real_BS[row, starts[row] : starts[row] + lengths[row]].all()
    ]
    if holes:
        raise ValueError(
            f"routing record: attention_mask has holes between the tokens of {spelled_out(holes, len(holes))}; pad at"
            " the ends only"
        )
    stretches = [_Stretch(row=row, start=starts[row], length=lengths[row]) for row in range(rows)]
    return _laid_out(completions, input_ids_BS, stretches, names=tuple(map(name, completions)))


def packed_record(completions: Sequence[Routed], input_ids_1S: Tensor) -> RoutingRecord:
    """All completions in one row, one after the other, each with its prompt and all sampled tokens.

    What follows the last of them counts as padding. ValueError as for `padded_record`.
    """
    stretches: list[_Stretch] = []
    end = 0
    for c in completions:
        stretches.append(_Stretch(row=0, start=end, length=len(c.prompt_token_ids) + len(c.token_ids)))
        end += stretches[-1].length
    if input_ids_1S.ndim != 2 or len(input_ids_1S) != 1 or input_ids_1S.shape[1] < end:
        raise ValueError(
            f"routing record: input_ids [1, S] with S at least {end}, the tokens of {len(completions)} completions,"
            f" expected; got {list(input_ids_1S.shape)}"
        )
    return _laid_out(completions, input_ids_1S, stretches, names=())


def _laid_out(
    completions: Sequence[Routed], input_ids_BS: Tensor, stretches: Sequence[_Stretch], *, names: tuple[str, ...]
) -> RoutingRecord:
    layers, slots = _shape(completions)
    inputs_BS = input_ids_BS.cpu()
    pairs = list(zip(completions, stretches, strict=True))
    faults = [fault for c, stretch in pairs for fault in _misplaced(c, inputs_BS, stretch)]
    if faults:
        raise ValueError(f"routing record: {spelled_out(faults, len(faults))}")
    narrow = all(c.expert_ids.min(initial=0) >= 0 and c.expert_ids.max(initial=0) <= 255 for c in completions)
    ids_BSLK = torch.zeros((*inputs_BS.shape, layers, slots), dtype=torch.uint8 if narrow else torch.int32)
    weighted = all(c.expert_weights is not None for c in completions)
    weights_BSLK = torch.zeros(ids_BSLK.shape) if weighted else None
    recorded_BS = torch.zeros(inputs_BS.shape, dtype=torch.bool)
    for c, stretch in pairs:
        span = slice(stretch.start, stretch.start + len(c.expert_ids))
        recorded_BS[stretch.row, span] = True
        ids_BSLK[stretch.row, span] = torch.from_numpy(c.expert_ids.astype("int64")).to(ids_BSLK.dtype)
        if weights_BSLK is not None:
            weights_BSLK[stretch.row, span] = torch.from_numpy(c.expert_weights.astype("float32"))
    device = input_ids_BS.device
    return RoutingRecord(
        expert_ids_BSLK=ids_BSLK.to(device),
        recorded_BS=recorded_BS.to(device),
        weights_BSLK=None if weights_BSLK is None else weights_BSLK.to(device),
        token_ids_BS=input_ids_BS,
        names=names,
    )


def _shape(completions: Sequence[Routed]) -> tuple[int, int]:
    """Layers and slots; ValueError where completions have no routing or an unlike one."""
    if not completions:
        raise ValueError("routing record: no completions")
    bare = [name(c) for c in completions if c.expert_ids is None]
    if bare:
        raise ValueError(
            f"routing record: completions without experts: {spelled_out(bare, len(bare))}; sample with"
            " record_routing=True"
        )
    kinds: dict[str, list[str]] = {}
    for c in completions:
        ids = c.expert_ids
        whole = "ids" if ids.dtype.kind in "iu" else f"{ids.dtype} ids"
        kinds.setdefault(f"{whole} [positions, {', '.join(map(str, ids.shape[1:]))}]", []).append(name(c))
    first = completions[0].expert_ids
    if len(kinds) > 1 or first.ndim != 3 or first.dtype.kind not in "iu":
        found = "; ".join(f"{kind} in {spelled_out(names, len(names))}" for kind, names in kinds.items())
        raise ValueError(f"routing record: whole ids [positions, layers, slots] of one kind expected, got {found}")
    _, layers, slots = first.shape
    return layers, slots


def _misplaced(completion: Routed, inputs_BS: Tensor, stretch: _Stretch) -> Iterator[str]:
    """Why the stretch of the batch is not this completion, or its record not of it."""
    tokens = torch.tensor((*completion.prompt_token_ids, *completion.token_ids), dtype=inputs_BS.dtype)
    recorded, weights = len(completion.expert_ids), completion.expert_weights
    if recorded != len(tokens) - 1:
        yield f"{name(completion)}: {recorded} recorded positions for {len(tokens)} tokens"
    if weights is not None and weights.shape != completion.expert_ids.shape:
        yield f"{name(completion)}: weights {list(weights.shape)} for ids {list(completion.expert_ids.shape)}"
    if stretch.length not in (len(tokens) - 1, len(tokens)):
        yield f"{name(completion)}: {stretch.length} tokens in row {stretch.row}, the completion has {len(tokens)}"
        return
    fed = inputs_BS[stretch.row, stretch.start : stretch.start + stretch.length]
    other = (fed != tokens[: stretch.length]).nonzero().flatten().tolist()
    if other:
        place = stretch.start + other[0]
        got, want = int(fed[other[0]]), int(tokens[other[0]])
        yield f"{name(completion)}: row {stretch.row} has token {got} at position {place}, expected {want}"


def name(completion: Routed) -> str:
    """What an error calls a completion."""
    return f"{completion.prompt_id}#{completion.sample}"
