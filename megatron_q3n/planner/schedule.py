"""How many micro-batches a pipeline rank has run forward but not yet backward, at its fullest.

These follow megatron-core's 1F1B schedules (`pipeline_parallel/schedules.py`, get_pp_rank_microbatches and
get_schedule_table); a rank keeps the activations of that many micro-batches, which is why early stages need most.
"""

from itertools import islice


def in_flight(rank: int, ranks: int, chunks: int, num_microbatches: int) -> list[int]:
    """Return, for each model chunk of a pipeline rank, the micro-batches whose activations it holds at its fullest.

    One chunk: warm-up runs `ranks - 1 - rank` micro-batches forward, and one more is in work:
    min(ranks - rank, num_microbatches). Several chunks (interleaved): warm-up runs
    2 · (ranks - 1 - rank) + (chunks - 1) · ranks chunk passes, and one more is in work; they are the first ones in
    the order of the schedule, which takes `ranks` micro-batches through a chunk before it turns to the next chunk.
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
