"""Blocks are conserved, nobody starves, and a step stays within its budget; without a model."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.engine.blocks import BlockPool
from rollout.engine.sampler import SampledRow
from rollout.engine.scheduler import Scheduler
from rollout.engine.sequence import Sequence
from rollout.request import Prompt, SamplingParams
from weights.digest import Digest
from weights.version import WeightVersion

VERSION = WeightVersion(run="test", step=1, digest=Digest(1, 2))


def sequence(index: int, prompt_length: int, max_tokens: int) -> Sequence:
    prompt = Prompt(id=str(index), token_ids=(1,) * prompt_length)
    return Sequence(("client", str(index), 0), prompt, SamplingParams(max_tokens=max_tokens, seed=0))


def scheduler_of(pool: BlockPool, **limits: int) -> Scheduler:
    fields = {"max_running": 4, "prefill_chunk": 8, "block_size": 4} | limits
    return Scheduler(pool, **fields, prefix_cache=True, copy_block=lambda source, target: None)


def sample_one(entry: Sequence) -> None:
    entry.append(SampledRow(token_id=1, logprob=0.0, model_logprob=0.0), VERSION)


lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=12)


@given(lengths, st.integers(1, 5), st.integers(1, 16), st.integers(1, 7), st.integers(15, 40))
def test_every_sequence_finishes_within_budget_and_blocks_are_conserved(
    requests: list[tuple[int, int]], max_running: int, prefill_chunk: int, block_size: int, blocks: int
) -> None:
    pool = BlockPool(blocks)
    scheduler = scheduler_of(pool, max_running=max_running, prefill_chunk=prefill_chunk, block_size=block_size)
    wanted = [sequence(i, *request) for i, request in enumerate(requests)]
    wanted = [s for s in wanted if s.longest <= blocks * block_size]
    scheduler.waiting.extend(wanted)
    finished = set()
    while scheduler.running or scheduler.waiting:
        scheduled = scheduler.schedule(VERSION)
        assert scheduled, "work is left and nothing runs"
        assert len(scheduler.running) <= max_running
        assert sum(entry.rows for entry in scheduled if entry.sequence.uncomputed > 1) <= prefill_chunk
        held = Counter(block for s in scheduler.running for block in s.blocks)
        assert len(held) == pool.held
        assert pool.held + pool.free == pool.count
        for entry in scheduled:
            s = entry.sequence
            s.advance(entry.rows, VERSION)
            scheduler.remember(s, VERSION)
            assert s.computed <= len(s.blocks) * block_size
            if s.uncomputed == 0:
                sample_one(s)
                if s.sampled == s.params.max_tokens:
                    scheduler.finish(s)
                    finished.add(s.key)
    assert finished == {s.key for s in wanted}
    assert pool.free == pool.count


def test_decoding_sequences_run_in_every_step_while_a_long_prompt_is_read_in_chunks() -> None:
    scheduler = scheduler_of(BlockPool(100))
    first, long = sequence(0, 2, 50), sequence(1, 30, 5)
    scheduler.waiting.append(first)
    (entry,) = scheduler.schedule(VERSION)
    first.advance(entry.rows, VERSION)
    sample_one(first)
    scheduler.waiting.append(long)
    rows = []
    while long.uncomputed:
        scheduled = {entry.sequence.key: entry.rows for entry in scheduler.schedule(VERSION)}
        assert scheduled[first.key] == 1
        rows.append(scheduled[long.key])
        long.advance(scheduled[long.key], VERSION)
    assert rows == [8, 8, 8, 6]


def test_withdrawing_frees_running_and_waiting_sequences_alike() -> None:
    pool = BlockPool(10)
    scheduler = scheduler_of(pool, max_running=1)
    scheduler.waiting.extend([sequence(0, 4, 4), sequence(1, 4, 4), sequence(2, 4, 4)])
    scheduler.schedule(VERSION)
    gone = scheduler.withdraw(lambda s: s.prompt.id in ("0", "2"))
    assert {s.prompt.id for s in gone} == {"0", "2"}
    assert pool.free == pool.count
    assert [s.prompt.id for s in scheduler.waiting] == ["1"]


def test_the_youngest_steps_back_when_blocks_run_out_and_is_the_next_to_resume() -> None:
    pool = BlockPool(4)
    scheduler = scheduler_of(pool)
    old, young = sequence(0, 7, 8), sequence(1, 7, 8)
    scheduler.waiting.extend([old, young])
    steps = 0
    while young in scheduler.running or not scheduler.preemptions:
        for entry in scheduler.schedule(VERSION):
            entry.sequence.advance(entry.rows, VERSION)
            if entry.sequence.uncomputed == 0:
                sample_one(entry.sequence)
        steps += 1
        assert steps < 20
    assert scheduler.running == [old]
    assert scheduler.waiting[0] is young
    assert (young.computed, young.blocks) == (0, [])
    assert young.sampled > 0, "its tokens stay"
    assert young.discarded_kv[0].stop == young.sampled


def test_a_known_prefix_is_given_up_in_the_order_in_which_it_was_let_go_and_only_when_needed() -> None:
    pool = BlockPool(3)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.remember(b"first", first[0])
    pool.remember(b"second", second[0])
    pool.release(first)
    pool.release(second)
    assert pool.free == 3
    pool.allocate(1)
    assert pool.find(b"first") is not None, "an empty block was at hand"
    pool.allocate(1)
    assert pool.find(b"first") is None
    found = pool.find(b"second")
    assert found is not None
    shared = pool.share([found])
    assert pool.free == 0
    pool.release(shared)
    pool.forget_prefixes()
    assert pool.find(b"second") is None
    assert pool.free == 1


def test_a_block_released_more_often_than_held_is_a_defect() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    with pytest.raises(AssertionError, match="released more often than held"):
        pool.release([*blocks, *blocks])
