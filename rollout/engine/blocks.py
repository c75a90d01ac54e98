"""The KV cache's blocks: which are free, which are held and by how many, and which still hold a known prefix.

A block that nobody holds but whose content has a key stays findable until its room is needed; the one that was let go
first is given up first.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Block ids 0 .. count - 1. Every block is either held (by one or more) or available, never both."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._empty = list(range(count - 1, -1, -1))
        self._idle: OrderedDict[int, bytes] = OrderedDict()
        """Available blocks with known content, the one let go longest ago first."""
        self._holders: Counter[int] = Counter()
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._empty) + len(self._idle)

    @property
    def held(self) -> int:
        """Blocks that somebody holds."""
        return len(self._holders)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks to write into; the caller has looked at `free`."""
        assert 0 <= count <= self.free, f"asked for {count} blocks of {self.free} free ones"
        taken = []
        for _ in range(count):
            block = self._empty.pop() if self._empty else self._give_up()
            self._holders[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Iterable[int]) -> list[int]:
        """Holds blocks once more, whose content is known or held already; they may be read, not written."""
        shared = list(blocks)
        for block in shared:
            assert block in self._holders or block in self._idle, f"block {block} holds nothing to share"
            self._idle.pop(block, None)
            self._holders[block] += 1
        return shared

    def release(self, blocks: list[int]) -> None:
        """Lets go of blocks and empties the list."""
        for block in reversed(blocks):  # the last of a prefix is given up before the first
            assert self._holders[block] > 0, f"block {block} is released more often than held"
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                if block in self._key_of:
                    self._idle[block] = self._key_of[block]
                else:
                    self._empty.append(block)
        blocks.clear()

    def remember(self, key: bytes, block: int) -> None:
        """A held block is now full of what `key` names; of two blocks with the same content the first is kept."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def find(self, key: bytes) -> int | None:
        """The block that is full of what `key` names."""
        return self._block_of.get(key)

    def forget_prefixes(self) -> None:
        """No content is findable any more; blocks stay with those who hold them."""
        self._empty.extend(self._idle)
        self._idle.clear()
        self._block_of.clear()
        self._key_of.clear()

    def _give_up(self) -> int:
        block, key = self._idle.popitem(last=False)
        del self._block_of[key], self._key_of[block]
        return block
