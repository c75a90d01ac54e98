"""Which sequences run in the next step, and how many of their tokens.

Every running sequence that decodes gets its one row; what is left of the prefill budget goes to prompts in the order in
which they came. A sequence is admitted only when the blocks that it can come to need are free, so a running sequence
never waits for blocks.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from rollout.engine.blocks import BlockPool
from rollout.engine.sequence import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledRows:
    """The next `rows` tokens of a sequence."""

    sequence: Sequence
    rows: int


class Scheduler:
    """Waiting and running sequences.

    Args:
        max_running: sequences that run at once.
        prefill_chunk: prompt tokens per step, at most.
        block_size: tokens per block.
    """

    def __init__(self, pool: BlockPool, *, max_running: int, prefill_chunk: int, block_size: int) -> None:
        self.pool = pool
        self.max_running = max_running
        self.prefill_chunk = prefill_chunk
        self.block_size = block_size
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def blocks_needed(self, sequence: Sequence) -> int:
        """Blocks for all that the sequence can come to hold."""
        return -(-sequence.longest // self.block_size)

    def schedule(self) -> list[ScheduledRows]:
        """Admits what fits and says what runs; empty when there is nothing to do."""
        while self.waiting and len(self.running) < self.max_running:
            needed = self.blocks_needed(self.waiting[0])
            if needed > self.pool.free:
                break
            sequence = self.waiting.popleft()
            sequence.blocks = self.pool.allocate(needed)
            self.running.append(sequence)
        budget = self.prefill_chunk
        scheduled = []
        for sequence in self.running:
            if sequence.uncomputed == 1:
                scheduled.append(ScheduledRows(sequence=sequence, rows=1))
            elif budget > 0:
                rows = min(budget, sequence.uncomputed)
                budget -= rows
                scheduled.append(ScheduledRows(sequence=sequence, rows=rows))
        return scheduled

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence off the running ones and frees its blocks."""
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)

    def withdraw(self, chosen: Callable[[Sequence], bool]) -> list[Sequence]:
        """Takes away every chosen sequence, running or waiting, and frees its blocks."""
        gone = [sequence for sequence in (*self.running, *self.waiting) if chosen(sequence)]
        for sequence in gone:
            if sequence in self.running:
                self.finish(sequence)
            else:
                self.waiting.remove(sequence)
        return gone
