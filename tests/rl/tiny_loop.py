"""Small reinforcement learning loop for tests: a tiny model far from its init, and prompts of digits."""

import json
from pathlib import Path
from typing import Any

from megatron_q3n.config import RunConfig, validate
from megatron_q3n.data.chat_template import PLAIN, ChatTemplate
from megatron_q3n.data.tokenizer import TextTokenizer, train_bpe
from tests.inference.tiny_model import move_from_init

VOCAB = 288


def score(answer: str, _arguments: dict[str, Any]) -> float:
    """Return a score that differs between answers: its number of distinct characters modulo 3, halved."""
    return len(set(answer)) % 3 / 2


def tokenizer() -> TextTokenizer:
    return train_bpe(["user:\nassistant:\n0123456789 + = "] * 4, 272, single_digits=True)


def tiny_config(folder: Path, rl: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    """Return a configuration whose prompts are written into `folder`."""
    file = folder / "prompts.jsonl"
    rows = [{"prompt": f"{n * 37 % 100} + {'12345'[: n % 5 + 1]} =", "answer": n} for n in range(9)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "prompts": [{"path": str(file)}],
        "rollout": {"prompts": 4, "samples_per_prompt": 3, "max_new_tokens": 7},
        "reward": {"kind": "function", "function": "tests.rl.tiny_loop:score", "workers": 1},
    }
    model = {"hidden_size": 32, "vocab_size": VOCAB, "max_position_embeddings": 2048, "moe_aux_loss_coeff": 0.0}
    return validate(
        {
            "stage": "rl",
            "model": model | sections.pop("model", {}),
            "data": {"source": "blend", "train": [{"path": "unused"}]},
            "training": {"sequence_length": 64, "micro_batch_size": 1, "global_batch_size": 8},
            "schedule": {"style": "constant", "lr": 0.01, "min_lr": 0.0, "warmup_steps": 0},
            "optimizer": {"weight_decay": 0.0},
            "rl": settings | (rl or {}),
            **sections,
        }
    )


def tiny_loop(config: RunConfig, device: Any, group: Any, reward_workers: Any = None) -> Any:
    """Build the loop; megatron-core is imported late."""
    from megatron_q3n.rl.loop import RlLoop
    from megatron_q3n.rl.prompts import Prompts
    from megatron_q3n.rl.rollout_engine import InProcessEngine
    from megatron_q3n.training.state import build_state

    state = build_state(config, device, group)
    if config.parallel.model_parallel_size * config.parallel.expert_model_parallel_size == 1:
        for model in state.models:
            move_from_init(model)
        state.optimizer.reload_model_params()
    chat_tokenizer = tokenizer()
    prompts = Prompts(config.rl.prompts, ChatTemplate(PLAIN, chat_tokenizer), max_tokens=50, seed=3)
    stop = frozenset({chat_tokenizer.eod})
    engine = InProcessEngine(
        state.models[0], group, config.rl.rollout, stop, chat_tokenizer.vocab_size, 5, records_routes=True
    )
    return RlLoop(state, engine, reward_workers, prompts, chat_tokenizer, stop)
