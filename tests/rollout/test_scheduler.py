"""Blocks are conserved, nobody starves, and a step stays within its budget."""

from hypothesis import given
from hypothesis import strategies as st

from rollout.config import EngineConfig
from rollout.engine.blocks import BlockPool
from rollout.engine.scheduler import Scheduler
from rollout.engine.sequence import Sequence
from rollout.request import Prompt, SamplingParams
from weights.digest import Digest
from weights.version import WeightVersion

VERSION = WeightVersion(run="test", step=1, digest=Digest(1, 2))


def sequence(index: int, prompt_length: int, max_tokens: int) -> Sequence:
    prompt = Prompt(id=str(index), token_ids=(1,) * prompt_length)
    return Sequence(("client", str(index), 0), prompt, SamplingParams(max_tokens=max_tokens, seed=0))


lengths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=12)


@given(lengths, st.integers(1, 5), st.integers(1, 16), st.integers(1, 7), st.integers(15, 40))
def test_every_sequence_finishes_within_budget_and_blocks_are_conserved(
    requests: list[tuple[int, int]], max_running: int, prefill_chunk: int, block_size: int, blocks: int
) -> None:
    config = EngineConfig(max_running=max_running, prefill_chunk=prefill_chunk, block_size=block_size, kv_blocks=blocks)
    pool = BlockPool(config.blocks)
    scheduler = Scheduler(pool, max_running=max_running, prefill_chunk=prefill_chunk, block_size=block_size)
    wanted = [sequence(i, *request) for i, request in enumerate(requests)]
    wanted = [s for s in wanted if s.longest <= blocks * block_size]
    scheduler.waiting.extend(wanted)
    finished = set()
    while scheduler.running or scheduler.waiting:
        scheduled = scheduler.schedule()
        assert scheduled, "work is left and nothing runs"
        assert len(scheduler.running) <= max_running
        assert sum(entry.rows for entry in scheduled if entry.sequence.uncomputed > 1) <= prefill_chunk
        held = [block for s in scheduler.running for block in s.blocks]
        assert len(held) == len(set(held))
        assert len(held) + pool.free == pool.count
        for entry in scheduled:
            s = entry.sequence
            s.advance(entry.rows, VERSION)
            assert s.computed <= len(s.blocks) * block_size
            if s.uncomputed == 0:
                s.append(1, 0.0, 0.0, VERSION)
                if s.sampled == s.params.max_tokens:
                    scheduler.finish(s)
                    finished.add(s.key)
    assert finished == {s.key for s in wanted}
    assert pool.free == pool.count


def test_decoding_sequences_run_in_every_step_while_a_long_prompt_is_read_in_chunks() -> None:
    pool = BlockPool(100)
    scheduler = Scheduler(pool, max_running=4, prefill_chunk=8, block_size=4)
    first, long = sequence(0, 2, 50), sequence(1, 30, 5)
    scheduler.waiting.append(first)
    (entry,) = scheduler.schedule()
    first.advance(entry.rows, VERSION)
    first.append(1, 0.0, 0.0, VERSION)
    scheduler.waiting.append(long)
    rows = []
    while long.uncomputed:
        scheduled = {entry.sequence.key: entry.rows for entry in scheduler.schedule()}
        assert scheduled[first.key] == 1
        rows.append(scheduled[long.key])
        long.advance(scheduled[long.key], VERSION)
    assert rows == [8, 8, 8, 6]


def test_withdrawing_frees_running_and_waiting_sequences_alike() -> None:
    pool = BlockPool(10)
    scheduler = Scheduler(pool, max_running=1, prefill_chunk=8, block_size=4)
    scheduler.waiting.extend([sequence(0, 4, 4), sequence(1, 4, 4), sequence(2, 4, 4)])
    scheduler.schedule()
    gone = scheduler.withdraw(lambda s: s.prompt.id in ("0", "2"))
    assert {s.prompt.id for s in gone} == {"0", "2"}
    assert pool.free == pool.count
    assert [s.prompt.id for s in scheduler.waiting] == ["1"]
