"""Micro-batches in flight on a pipeline rank: after their forward and before their backward pass, at the memory peak.

The numbers follow megatron-core's 1F1B schedules (`megatron/core/pipeline_parallel/schedules.py`,
get_pp_rank_microbatches and get_schedule_table). A rank holds the activations of these micro-batches, so early stages
need the most memory.
"""

from itertools import islice


def in_flight(rank: int, ranks: int, chunks: int, num_microbatches: int) -> list[int]:
    """Return the maximum number of micro-batches in flight of each model chunk of a pipeline rank.

    One chunk: warm-up runs `ranks - 1 - rank` micro-batches forward, and one more is in progress:
    min(ranks - rank, num_microbatches). Several chunks (interleaved): warm-up runs
    2 · (ranks - 1 - rank) + (chunks - 1) · ranks chunk passes, and one more is in progress; they are the first ones in
    the order of the schedule, which runs `ranks` micro-batches through a chunk before the next chunk.
    """
    if chunks == 1:
        return [min(ranks - rank, num_microbatches)]
    passes = 2 * (ranks - 1 - rank) + (chunks - 1) * ranks + 1
    order = (
        chunk
        for first in range(0, num_microbatches, ranks)
        for chunk in range(chunks)
        for _ in range(first, min(first + ranks, num_microbatches))
    )
    started = list(islice(order, passes))
    return [started.count(chunk) for chunk in range(chunks)]
