"""Spans of memory for the tests of the kernels of weights: on the GPU where there is one, else on the CPU, where
Triton's interpreter runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from weights.digest import Digest, TensorHash
from weights.kernel_digest import DigestTable, DigestTile
from weights.spans import Form, Spans

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDENED = [torch.bfloat16, torch.float16]
SIZES = [1, 2, 3, 4, 15, 16, 17, 4095, 4096, 4097, 3 * 4096 + 18, 64 * 4096 + 1]
"""Bytes: around an element, a vector, a block, a round of blocks, a unit."""
POISON = 0xA5


def random_bytes(count: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=random).to(DEVICE)


def column(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def placed(sizes: Sequence[int], offset: int) -> list[Tensor]:
    """Random bytes of every size in memory that starts `offset` bytes past a multiple of 16, poison around each."""
    room = [-(-size // 256) * 256 + 512 for size in sizes]
    memory = torch.full((sum(room) + 16,), POISON, dtype=torch.uint8, device=DEVICE)
    begin = -memory.data_ptr() % 16 + 256 + offset
    placed = []
    for seed, (size, taken) in enumerate(zip(sizes, room, strict=True)):
        placed.append(memory[begin : begin + size])
        placed[-1].copy_(random_bytes(size, seed))
        begin += taken
    return placed


def spans_of(
    held: Sequence[Tensor],
    form: Form = Form.SAME,
    *,
    tensors: Sequence[int] | None = None,
    first_blocks: Sequence[int] | None = None,
) -> Spans:
    scale = 1 if form is Form.SAME else 2
    return Spans(
        address=column([span.data_ptr() for span in held]),
        wire_bytes=column([span.nbytes // scale for span in held]),
        form=column([form] * len(held)),
        tensor=column(list(range(len(held))) if tensors is None else tensors),
        first_block=column([0] * len(held) if first_blocks is None else first_blocks),
    )


def hashes(count: int) -> list[TensorHash]:
    return [TensorHash(f"layer.{i}.weight", (i,), torch.uint8) for i in range(count)]


def digests(spans: Spans, functions: Sequence[TensorHash], tile: DigestTile | None = None) -> list[Digest]:
    """What the kernel says, one for each function."""
    choice = {} if tile is None else {"tile": tile}
    table = DigestTable(spans, tensors=len(functions), device=DEVICE, **choice)
    seeds_N2 = torch.tensor([function.seeds for function in functions], dtype=torch.int64, device=DEVICE)
    lanes = table.digests(seeds_N2).tolist()
    return [Digest(first % 2**64, second % 2**64) for first, second in lanes]


def unaligned(tensor: Tensor, offset: int) -> Tensor:
    """The same bytes, flat, `offset` bytes past a multiple of 16."""
    data = tensor.reshape(-1).view(torch.uint8)
    memory = torch.full((data.numel() + 64,), POISON, dtype=torch.uint8, device=DEVICE)
    begin = -memory.data_ptr() % 16 + offset
    memory[begin : begin + data.numel()] = data.to(DEVICE)
    return memory[begin : begin + data.numel()]


def wire_elements(dtype: torch.dtype, count: int) -> Tensor:
    """Random bits; bfloat16's NaNs are among them, float16's are not: a device converts those as it likes."""
    bits = random_bytes(2 * count, 1).view(torch.int16)
    if dtype == torch.float16:
        bits = torch.where((bits & 0x7C00) == 0x7C00, bits & 0x7BFF, bits)
    return bits.view(dtype)
