"""Microseconds of one call on the GPU, under replay of a CUDA graph."""

import statistics
from collections.abc import Callable

import torch

REPLAYS = 11
WARM_REPLAYS = 3


def microseconds(call: Callable[[int], object], calls: int) -> float:
    """The median over replays of a graph that holds `calls` calls, given 0, 1, 2, ... to tell their inputs apart."""
    for index in range(WARM_REPLAYS):
        call(index % calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(index)
    for _ in range(WARM_REPLAYS):
        graph.replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(REPLAYS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return statistics.median(times)
