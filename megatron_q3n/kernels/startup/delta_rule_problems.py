"""Problem sizes of the gated delta rule in a run: rows, tokens, heads, packed or not.

FlashQLA compiles different kernels for packed rows, for single long rows and for other numbers of blocks. So the
kernels that are checked at start-up and compiled ahead must be those that training runs; this module lists their
problem sizes, for both. It does not import torch, since compilation starts before torch is imported.
"""

from dataclasses import dataclass

from megatron_q3n.config import RunConfig

# of all rows of a check: enough to select every kernel; the reference takes some 5 GiB at 32 heads
CHECKED_TOKENS = 8192
# three documents, whose lengths are not multiples of the chunk of 64 tokens
_SMALL_TOKENS = 192
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
    """Return whether a micro-batch is one row of packed documents that are masked from each other."""
    fine_tunes = config.stage == "mtp" and config.sft.train
    return config.data.mask_document_boundaries or config.stage in ("sft", "rl") or bool(fine_tunes)


def checked_problems(config: RunConfig) -> list[DeltaRuleProblem]:
    """Return the problems of the start-up check: a small irregular one, and that of training, shortened if long."""
    rows = config.training.micro_batch_size
    return _problems(config, min(config.training.sequence_length, max(256, CHECKED_TOKENS // rows)))


def problems_to_compile(config: RunConfig) -> list[DeltaRuleProblem]:
    """Return the problems of the start-up check and of training."""
    training = _problems(config, config.training.sequence_length)
    return list(dict.fromkeys([*checked_problems(config), *training]))


def num_head_shares(config: RunConfig) -> int:
    """Return over how many ranks the heads of Gated DeltaNet are split: tp, times cp with all-to-all."""
    layout = config.parallel
    if layout.linear_context_parallel == "all_to_all":
        return layout.tensor_model_parallel_size * layout.context_parallel_size
    return layout.tensor_model_parallel_size


def _problems(config: RunConfig, tokens: int) -> list[DeltaRuleProblem]:
    packed, heads = packs_documents(config), _heads(config)
    small = DeltaRuleProblem(1 if packed else 4, _SMALL_TOKENS, *heads, _SMALL_BOUNDS if packed else None)
    layout = config.parallel
    passes_state = layout.context_parallel_size > 1 and layout.linear_context_parallel == "state_passing"
    if config.stage not in _TRAINING or passes_state:
        return [small]
    if not packed:
        return [small, DeltaRuleProblem(config.training.micro_batch_size, tokens, *heads)]
    # one document, and several: FlashQLA splits them differently and uses other block sizes
    document_bounds = (*(tokens * document // 8 for document in range(8)), tokens)
    return [small, *(DeltaRuleProblem(1, tokens, *heads, b) for b in ((0, tokens), document_bounds))]


def _heads(config: RunConfig) -> tuple[int, int, int, int]:
    """Return key heads and value heads of one rank, and their sizes."""
    model, num_shares = config.model, num_head_shares(config)
    return (
        model.linear_num_key_heads // num_shares,
        model.linear_num_value_heads // num_shares,
        model.linear_key_head_dim,
        model.linear_value_head_dim,
    )
