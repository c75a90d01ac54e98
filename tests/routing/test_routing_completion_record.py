"""From completions to a batch's record: every token's experts at its place, and nothing that does not belong there."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from routing import packed_record, padded_record

L, K = 2, 3


@dataclass(frozen=True, kw_only=True)
class FakeCompletion:
    """What a record needs of a completion."""

    prompt_id: str = "a"
    sample: int = 0
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    expert_ids: Any
    expert_weights: Any


def completion(name: str, prompt: tuple[int, ...], sampled: tuple[int, ...], dtype: Any = np.uint8) -> FakeCompletion:
    """Expert ids and weights that no two positions share: 10 * token + slot, and so on."""
    tokens = np.array((*prompt, *sampled)[:-1])
    ids = tokens[:, None, None] * 10 + np.arange(L)[:, None] * 3 + np.arange(K)
    return FakeCompletion(
        prompt_id=name,
        prompt_token_ids=prompt,
        token_ids=sampled,
        expert_ids=ids.astype(dtype),
        expert_weights=(ids / 7).astype(np.float32),
    )


ONE, TWO = completion("one", (1, 2), (3, 4)), completion("two", (5,), (6, 7))
LEFT = torch.tensor([[1, 2, 3, 4], [0, 5, 6, 7]])
RIGHT = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])
LEFT_MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
RIGHT_MASK = LEFT_MASK.flip(1)


def assert_experts_follow_tokens(ids_BSLK: Tensor, weights_BSLK: Tensor, recorded_BS: Tensor, fed_BS: Tensor) -> None:
    layers, slots = torch.arange(L)[:, None] * 3, torch.arange(K)
    expected = fed_BS[..., None, None] * 10 + layers + slots
    assert torch.equal(ids_BSLK.long()[recorded_BS], expected[recorded_BS])
    assert torch.equal(weights_BSLK[recorded_BS], expected[recorded_BS] / 7)


@pytest.mark.parametrize(
    ("fed", "mask", "recorded"),
    [
        (LEFT, LEFT_MASK, [[True, True, True, False], [False, True, True, False]]),
        (RIGHT, RIGHT_MASK, [[True, True, True, False], [True, True, False, False]]),
        (LEFT[:, :-1], LEFT_MASK[:, :-1], [[True, True, True], [False, True, True]]),
    ],
    ids=["left", "right", "left, without the last token"],
)
def test_padded_rows_are_recorded_where_the_rollout_ran_them(fed: Tensor, mask: Tensor, recorded: Any) -> None:
    record = padded_record([ONE, TWO], fed, mask)
    assert record.recorded_BS.tolist() == recorded
    assert record.names == ("one#0", "two#0")
    assert record.weights_BSLK is not None
    assert_experts_follow_tokens(record.expert_ids_BSLK, record.weights_BSLK, record.recorded_BS, fed)
    assert record.token_ids_BS is fed


def test_without_a_mask_nothing_is_padded() -> None:
    record = padded_record([ONE], LEFT[:1])
    assert record.recorded_BS.tolist() == [[True, True, True, False]]
    with pytest.raises(ValueError, match=r"two#0: 4 tokens in row 1, the completion has 3$"):
        padded_record([ONE, TWO], LEFT)


def test_packed_completions_stand_one_after_the_other() -> None:
    fed = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]])
    record = packed_record([ONE, TWO], fed)
    assert record.recorded_BS.tolist() == [[True, True, True, False, True, True, False, False]]
    assert record.weights_BSLK is not None
    assert_experts_follow_tokens(record.expert_ids_BSLK, record.weights_BSLK, record.recorded_BS, fed)
    with pytest.raises(ValueError, match=r"S at least 7.* got \[1, 6\]"):
        packed_record([ONE, TWO], fed[:, :6])
    with pytest.raises(ValueError, match=r"two#0: row 0 has token 5 at position 3, expected 6.*|one#0: row 0"):
        packed_record([TWO, ONE], fed)


def test_ids_beyond_a_byte_are_kept() -> None:
    wide = completion("wide", (60, 70), (80,), np.uint16)
    record = padded_record([wide], torch.tensor([[60, 70, 80]]))
    assert int(record.expert_ids_BSLK[0, 1, 1, 2]) == 705


def test_a_record_may_have_no_weights() -> None:
    record = padded_record([ONE, replace(TWO, expert_weights=None)], LEFT, LEFT_MASK)
    assert record.weights_BSLK is None


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        ([ONE, TWO, ONE, TWO], "4 completions for 2 rows of input_ids; left over: one#0, two#0$"),
        ([ONE], "1 completions for 2 rows of input_ids; rows from 1 on have none"),
        ([TWO, ONE], r"two#0: 4 tokens in row 0, the completion has 3, one#0: row 1 has token 5 at position 1, "),
        ([replace(ONE, expert_ids=None), replace(TWO, expert_ids=None)], "without experts: one#0, two#0; sample with"),
        ([ONE, replace(TWO, expert_ids=TWO.expert_ids[:, :1])], r"\[positions, 2, 3\] in one#0; ids \[positions, 1, 3"),
        ([ONE, replace(TWO, expert_ids=TWO.expert_ids / 1)], r"float64 ids \[positions, 2, 3\] in two#0"),
        (
            [ONE, replace(TWO, expert_ids=TWO.expert_ids[:1])],
            "two#0: 1 recorded positions for 3 tokens, two#0: weights",
        ),
        ([ONE, replace(TWO, expert_ids=TWO.expert_ids * 0)], r"row 1 \(two#0\) position 1 MoE layer 0: \[0, 0, 0\]"),
        (
            [ONE, replace(TWO, expert_ids=TWO.expert_ids.astype(int) - 60)],
            r"row 1 \(two#0\) position 1 MoE layer 0: \[-10",
        ),
    ],
)
def test_completions_that_are_not_the_batchs_are_named(completions: list[FakeCompletion], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        padded_record(completions, LEFT, LEFT_MASK)


@pytest.mark.parametrize(
    ("fed", "mask", "message"),
    [
        (LEFT, LEFT_MASK[:, :-1], r"attention_mask \[2, 4\] expected, got \[2, 3\]"),
        (LEFT[0], None, r"input_ids \[B, S\] expected"),
        (LEFT, torch.tensor([[1, 0, 1, 1], [0, 1, 1, 1]]), r"holes between the tokens of row 0 \(one#0\); pad"),
        (LEFT, torch.zeros(2, 4), r"one#0: 0 tokens in row 0, the completion has 4, two#0"),
    ],
)
def test_a_batch_that_is_no_batch_is_refused(fed: Tensor, mask: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        padded_record([ONE, TWO], fed, mask)


def test_many_offenders_are_counted() -> None:
    bare = [replace(ONE, prompt_id=str(index), expert_ids=None) for index in range(25)]
    with pytest.raises(ValueError, match=r"0#0, 1#0, .*9#0, and 15 more; sample"):
        padded_record(bare, LEFT[:1].expand(25, 4))
