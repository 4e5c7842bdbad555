"""Which problems of the gated delta rule a configuration brings: rows, tokens, heads, packed or not.

The fused kernels are not one kernel: FlashQLA compiles other ones for packed rows, for single long rows and for
another number of blocks. So what is checked at start and what is compiled ahead must be what training runs; this file
says what that is, for both. It needs no torch, since compiling begins before torch is imported.
"""

from dataclasses import dataclass

from megatron_q3n.config import RunConfig

# of all rows of a check: enough for every kernel, some 5 GiB of reference at 32 heads
CHECKED_TOKENS = 8192
_SMALL_TOKENS = 192  # no multiple of the chunk's 64 tokens in every row, and three documents
_SMALL_BOUNDS = (0, 1, 70, _SMALL_TOKENS)
_TRAINING = ("pretrain", "longcontext", "sft", "mtp", "rl")


@dataclass(frozen=True)
class DeltaRuleProblem:
    """Rows of tokens, or one row of documents between `bounds`, with the heads of one rank."""

    rows: int
    tokens: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    bounds: tuple[int, ...] | None = None

    def __str__(self) -> str:
        packed = "" if self.bounds is None else f" in {len(self.bounds) - 1} documents"
        return f"{self.rows} × {self.tokens} tokens{packed}"


def packs_documents(config: RunConfig) -> bool:
    """Whether a micro-batch is one row of documents that do not see each other."""
    fine_tunes = config.stage == "mtp" and config.sft.train
    return config.data.mask_document_boundaries or config.stage in ("sft", "rl") or bool(fine_tunes)


def checked_problems(config: RunConfig) -> list[DeltaRuleProblem]:
    """Return what the start-up check computes: a small odd problem, and training's own, cut if it is long."""
    rows = config.training.micro_batch_size
    return _problems(config, min(config.training.sequence_length, max(256, CHECKED_TOKENS // rows)))


def problems_to_compile(config: RunConfig) -> list[DeltaRuleProblem]:
    """Return what the check computes and what training does."""
    training = _problems(config, config.training.sequence_length)
    return list(dict.fromkeys([*checked_problems(config), *training]))


def _problems(config: RunConfig, tokens: int) -> list[DeltaRuleProblem]:
    packed, heads = packs_documents(config), _heads(config)
    small = DeltaRuleProblem(1 if packed else 4, _SMALL_TOKENS, *heads, _SMALL_BOUNDS if packed else None)
    layout = config.parallel
    walks_chunks = layout.context_parallel_size > 1 and layout.linear_context_parallel == "state_passing"
    if config.stage not in _TRAINING or walks_chunks:
        return [small]
    if not packed:
        return [small, DeltaRuleProblem(config.training.micro_batch_size, tokens, *heads)]
    # one document, and several: they differ in whether FlashQLA cuts them up, and in its blocks
    several = (*(tokens * document // 8 for document in range(8)), tokens)
    return [small, *(DeltaRuleProblem(1, tokens, *heads, b) for b in ((0, tokens), several))]


def _heads(config: RunConfig) -> tuple[int, int, int, int]:
    """Return key heads and value heads of one rank, and their sizes."""
    model, layout = config.model, config.parallel
    share = layout.tensor_model_parallel_size
    if layout.linear_context_parallel == "all_to_all":
        share *= layout.context_parallel_size
    return (
        model.linear_num_key_heads // share,
        model.linear_num_value_heads // share,
        model.linear_key_head_dim,
        model.linear_value_head_dim,
    )
