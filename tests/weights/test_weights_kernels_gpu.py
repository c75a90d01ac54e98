"""On a GPU: kernels in CUDA graphs, past 4 GiB, and on every float32 there is."""

import pytest
import torch
from device_spans import (
    DEVICE,
    SIZES,
    WIDENED,
    column,
    digests,
    hashes,
    placed,
    random_bytes,
    spans_of,
)

from weights.digest import BLOCK_BYTES, Digest, TensorHash
from weights.kernel_copy import CopyTable, PackTable
from weights.kernel_digest import DigestTable
from weights.spans import Form, form_of

pytestmark = pytest.mark.gpu


def test_a_cuda_graph_hashes_and_copies_what_is_there_when_it_replays() -> None:
    sources, targets = placed(SIZES, 0), placed(SIZES, 0)
    addresses = [column([span.data_ptr() for span in spans]) for spans in (sources, targets)]
    copies = CopyTable(*addresses, column(SIZES), torch.zeros(len(SIZES), dtype=torch.int64), device=DEVICE)
    functions = hashes(len(SIZES))
    table = DigestTable(spans_of(targets), tensors=len(SIZES), device=DEVICE)
    seeds_N2 = torch.tensor([function.seeds for function in functions], dtype=torch.int64, device=DEVICE)
    copies.run()
    table.digests(seeds_N2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copies.run()
        sums_N2 = table.digests(seeds_N2)
    for seed in range(3):
        for span in sources:
            span.copy_(random_bytes(span.numel(), 100 + seed))
        graph.replay()
        torch.cuda.synchronize()
        found = [Digest(first % 2**64, second % 2**64) for first, second in sums_N2.tolist()]
        assert found == [function.blocks(span) for function, span in zip(functions, sources, strict=True)]


def test_spans_past_four_gib_are_hashed_and_copied_to_their_end() -> None:
    size = (1 << 32) + 5 * BLOCK_BYTES + 3
    source = torch.randint(-(2**31), 2**31, (size // 4 + 4,), dtype=torch.int32, device=DEVICE).view(torch.uint8)[:size]
    target = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    CopyTable(
        column([source.data_ptr()]), column([target.data_ptr()]), column([size]), column([0]), device=DEVICE
    ).run()
    assert torch.equal(source, target)
    functions = hashes(1)
    expected = [functions[0].blocks(source)]
    assert digests(spans_of([target]), functions) == expected
    held = torch.arange(2**30 + 3, dtype=torch.int32, device=DEVICE).view(torch.float32)
    held.view(torch.int32).bitwise_left_shift_(16)
    function = TensorHash("wide", held.shape, torch.bfloat16)
    assert digests(spans_of([held], Form.BFLOAT16_IN_FLOAT32), [function]) == [function.narrowed(held, torch.bfloat16)]


@pytest.mark.parametrize("dtype", WIDENED, ids=str)
def test_on_a_gpu_every_float32_rounds_as_tensor_to_does(dtype: torch.dtype) -> None:
    """All 2^32 of them, NaNs too, and the digest of each chunk as the definition has it."""
    form = column([form_of(dtype, torch.float32)])
    chunk = 1 << 28
    for start in range(-(2**31), 2**31, chunk):
        held = torch.arange(start, start + chunk, dtype=torch.int64, device=DEVICE).to(torch.int32).view(torch.float32)
        target = torch.zeros(chunk, dtype=dtype, device=DEVICE)
        PackTable(
            column([held.data_ptr()]), column([target.data_ptr()]), column([target.nbytes]), form, device=DEVICE
        ).run()
        assert torch.equal(target.view(torch.int16), held.to(dtype).view(torch.int16)), start
        function = TensorHash("all", held.shape, dtype)
        assert digests(spans_of([held], Form(int(form))), [function]) == [function.narrowed(held, dtype)], start
