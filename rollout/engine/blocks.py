"""The KV cache's blocks: which are free, which a sequence holds."""


class BlockPool:
    """Block ids 0 .. count - 1. What is allocated and what is free always add up to all of them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks; the caller has looked at `free`."""
        assert 0 <= count <= len(self._free), f"asked for {count} blocks of {len(self._free)} free ones"
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: list[int]) -> None:
        """Gives blocks back and empties the list."""
        assert len(self._free) + len(blocks) <= self.count, "more blocks came back than were given"
        self._free.extend(reversed(blocks))
        blocks.clear()
