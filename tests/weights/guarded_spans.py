"""Hashes and copies spans that touch a page without access, before and behind: whoever reaches outside dies of it.

Prints "untouched". Run in a process of its own, under Triton's interpreter.
"""

import ctypes
import mmap

import torch
from torch import Tensor

from weights.kernel_copy import CopyTable, PackTable
from weights.kernel_digest import DigestTable, DigestTile
from weights.spans import Form, Spans

PAGE = mmap.PAGESIZE
NO_ACCESS = 0
CPU = torch.device("cpu")


def guarded(pages: int) -> tuple[mmap.mmap, int]:
    """Memory and the address of its first byte, between two pages that may not be touched."""
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(address + page * PAGE), ctypes.c_size_t(PAGE), NO_ACCESS) == 0
    return memory, address + PAGE


def column(value: int) -> Tensor:
    return torch.tensor([value])


def main() -> None:
    pages = 12
    (first, begin), (second, other) = guarded(pages), guarded(pages)
    end, other_end = begin + pages * PAGE, other + pages * PAGE
    seeds = torch.zeros(1, 2, dtype=torch.int64)
    for form in Form:
        scale = 1 if form is Form.SAME else 2
        for wire in (2, 18, 4096, 5 * 4096 + 2):
            for address in (begin, end - scale * wire):
                for tile in (DigestTile(), DigestTile(blocks=8)):
                    spans = Spans(column(address), column(wire), column(form), column(0), column(0))
                    DigestTable(spans, tensors=1, device=CPU, tile=tile).digests(seeds)
            for held, plain in ((begin, other), (end - scale * wire, other_end - wire)):
                CopyTable(column(plain), column(held), column(wire), column(form), device=CPU).run()
                PackTable(column(held), column(plain), column(wire), column(form), device=CPU).run()
    assert len(first) == len(second)  # alive until here
    print("untouched")


if __name__ == "__main__":
    main()
