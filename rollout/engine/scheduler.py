"""Which sequences run in the next step, and how many of their tokens.

Every running sequence that decodes gets its one row; what is left of the prefill budget goes to prompts in the order in
which they came. Blocks are taken as they are needed: where they run out, prompts held for samples that have not begun
are let go first, then the youngest running sequence steps back to the head of the queue and reads its tokens again
later.
The oldest is never held up, so somebody always gets on.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rollout.engine.blocks import BlockPool
from rollout.engine.group import Group, ReadPrompt
from rollout.engine.prefix import next_key, root_key
from rollout.engine.sequence import Purpose, Sequence
from weights.version import WeightVersion


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduledRows:
    """The next `rows` tokens of a sequence; 0 where only its first token has to be drawn."""

    sequence: Sequence
    rows: int


class Scheduler:
    """Waiting and running sequences.

    Args:
        max_running: sequences that run at once.
        prefill_chunk: prompt tokens per step, at most.
        block_size: tokens per block.
        prefix_cache: whether prefixes read before may be found again.
        copy_block: copies one block's keys and values to another, in all layers: (from, to).
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_running: int,
        prefill_chunk: int,
        block_size: int,
        prefix_cache: bool,
        copy_block: Callable[[int, int], None],
    ) -> None:
        self.pool = pool
        self.max_running = max_running
        self.prefill_chunk = prefill_chunk
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_tokens = 0
        """Tokens that were found in the prefix cache and not run again."""
        self._copy_block = copy_block
        self._read_groups: list[Group] = []
        """Groups whose prompt is held for samples to come."""

    def has_work(self, version: WeightVersion) -> bool:
        """Whether anything runs or may begin under `version`."""
        return bool(self.running) or any(sequence.params.may_begin_under(version) for sequence in self.waiting)

    def schedule(self, version: WeightVersion) -> list[ScheduledRows]:
        """Admits what fits and says what runs; empty when there is nothing to do under `version`."""
        self._admit(version)
        budget = self.prefill_chunk
        scheduled = []
        for sequence in tuple(self.running):
            if sequence not in self.running:  # it stepped back for an older one
                continue
            if sequence.first_logits_V is not None:
                rows = 0
            elif sequence.uncomputed == 1:
                rows = 1
            else:
                rows = min(budget, sequence.uncomputed)
                if rows == 0:
                    continue
            if self._reserve(sequence, rows):
                if sequence.uncomputed > 1:
                    budget -= rows
                scheduled.append(ScheduledRows(sequence=sequence, rows=rows))
        return scheduled

    def remember(self, sequence: Sequence, version: WeightVersion) -> None:
        """Makes the sequence's full blocks findable, if all it holds was written under `version`."""
        whole = [span.version for span in sequence.kv_version_spans] == [version]
        if not self.prefix_cache or not whole:
            return
        full = sequence.computed // self.block_size
        for index in range(len(sequence.block_keys), full):
            sequence.block_keys.append(self._key(sequence, index, version))
            self.pool.remember(sequence.block_keys[index], sequence.blocks[index])

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence off the running ones and frees its blocks."""
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)

    def withdraw(self, chosen: Callable[[Sequence], bool]) -> list[Sequence]:
        """Takes away every chosen sequence, running or waiting, and frees what it holds."""
        running = [sequence for sequence in self.running if chosen(sequence)]
        waiting = [sequence for sequence in self.waiting if chosen(sequence)]
        for sequence in running:
            self.finish(sequence)
        gone = set(waiting)
        self.waiting = deque(sequence for sequence in self.waiting if sequence not in gone)
        for sequence in (*running, *waiting):
            self._leave_group(sequence)
        return [*running, *waiting]

    def rebuild(self, sequence: Sequence) -> None:
        """A running sequence throws its keys and values away and reads its tokens again where it stands."""
        self.pool.release(sequence.blocks)
        sequence.discard_kv()

    def new_version(self) -> None:
        """No prefix and no prompt that was read under the old version serves a sequence that begins now."""
        self.pool.forget_prefixes()
        for group in tuple(self._read_groups):
            self._let_go(group)

    def _admit(self, version: WeightVersion) -> None:
        """Moves waiting sequences to the running ones, in order; those that must wait for something are passed over."""
        passed_over: list[Sequence] = []
        while self.waiting and len(self.running) < self.max_running:
            sequence = self.waiting.popleft()
            group = sequence.group
            if not sequence.params.may_begin_under(version) or (group is not None and group.reader is not None):
                passed_over.append(sequence)
                continue
            ready = group is not None and group.read is not None
            if not (self._adopt(sequence) if ready else self._begin(sequence, version)):
                if not self.running and self._read_groups:  # nothing will free blocks but a prompt held for samples
                    self._let_go(self._read_groups[-1])
                    self.waiting.appendleft(sequence)
                    continue
                passed_over.append(sequence)
                break
            self.running.append(sequence)
        self.waiting.extendleft(reversed(passed_over))

    def _begin(self, sequence: Sequence, version: WeightVersion) -> bool:
        """Admits a sequence that reads its own tokens, after whatever prefix is found; False where there is no room."""
        found = self._find_prefix(sequence, version)
        if self._blocks_for(len(sequence.token_ids)) - len(found) > self.pool.free:
            return False
        sequence.blocks = self.pool.share(found)
        if found:
            sequence.advance(len(found) * self.block_size, version)
            self.prefix_tokens += sequence.computed
        if sequence.group is not None:
            sequence.group.reader = sequence.key
        return True

    def _adopt(self, sequence: Sequence) -> bool:
        """Admits a sample whose prompt was read by another: shares full blocks, copies the last one where it is not."""
        group = sequence.group
        assert group is not None
        assert group.read is not None
        length = len(sequence.prompt.token_ids)
        full = length // self.block_size
        if self.pool.free < 2:  # its copy, and the next token's
            return False
        blocks = self.pool.share(group.read.blocks[:full])
        if length % self.block_size:
            blocks += self.pool.allocate(1)
            self._copy_block(group.read.blocks[full], blocks[full])
        sequence.adopt(group.read, blocks)
        self._leave_group(sequence)
        return True

    def prompt_read(self, sequence: Sequence, logits_V: Tensor, version: WeightVersion) -> None:
        """A sample has read its group's prompt: it is held until the last sample has begun.

        Not one that a commit fell into: the others read it again, whole under the new version.
        """
        group = sequence.group
        if group is None or sequence.uncomputed:
            return
        self._leave_group(sequence)
        if group.to_begin and [span.version for span in sequence.kv_version_spans] == [version]:
            group.read = ReadPrompt(
                blocks=self.pool.share(sequence.blocks),
                logits_V=logits_V,
                kv_version_spans=tuple(sequence.kv_version_spans),
                expert_ids=tuple(sequence.expert_ids),
                expert_weights=tuple(sequence.expert_weights),
            )
            self._read_groups.append(group)

    def _leave_group(self, sequence: Sequence) -> None:
        """The sequence needs the group no more; with the last one, the prompt is let go."""
        group, sequence.group = sequence.group, None
        if group is None:
            return
        group.to_begin -= 1
        if group.reader == sequence.key:
            group.reader = None
        if group.to_begin == 0 and group.read is not None:
            self._let_go(group)

    def _let_go(self, group: Group) -> None:
        assert group.read is not None
        self._read_groups.remove(group)
        self.pool.release(group.read.blocks)
        group.read = None

    def _reserve(self, sequence: Sequence, rows: int) -> bool:
        """Gets the blocks for the sequence's next rows; False where it had to step back itself."""
        while True:
            missing = self._blocks_for(sequence.computed + rows) - len(sequence.blocks)
            if missing <= self.pool.free:
                sequence.blocks += self.pool.allocate(max(missing, 0))
                return True
            if self._read_groups:
                self._let_go(self._read_groups[-1])
                continue
            youngest = self.running[-1]
            self._step_back(youngest)
            if youngest is sequence:
                return False

    def _step_back(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.finish(sequence)
        if sequence.group is not None:
            sequence.group.reader = None
        sequence.discard_kv()
        self.waiting.appendleft(sequence)

    def _find_prefix(self, sequence: Sequence, version: WeightVersion) -> list[int]:
        """The blocks of the longest known prefix, never the whole: the last token's logits have to be computed.

        None for who wants logits or experts of every token: those are not kept with a block.
        """
        if not self.prefix_cache or sequence.purpose is Purpose.SCORE or sequence.params.record_routing:
            return []
        found = []
        for index in range((len(sequence.token_ids) - 1) // self.block_size):
            key = self._key(sequence, index, version)
            block = self.pool.find(key)
            if block is None:
                break
            sequence.block_keys.append(key)
            found.append(block)
        return found

    def _key(self, sequence: Sequence, index: int, version: WeightVersion) -> bytes:
        parent = sequence.block_keys[index - 1] if index else root_key(version)
        return next_key(parent, sequence.token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)
