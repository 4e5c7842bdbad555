"""Prompt stream: prompt `number` of a run is a function of the sources and the seed.

Each pass over the prompts has its own permutation, so that a run may use more prompts than there are.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_q3n.config import UserError
from megatron_q3n.config.rl import PromptSource
from megatron_q3n.config.sft import TaskSet
from megatron_q3n.data.chat_template import ChatTemplate
from megatron_q3n.data.conversation_tasks import questions
from megatron_q3n.rl.samples import Prompt

# length of the part of an invalid line that an error message quotes
QUOTED_CHARACTERS = 160


class Prompts:
    """The prompts of some sources, tokenized by the chat template, except those longer than `max_tokens`."""

    def __init__(
        self, sources: list[PromptSource], template: ChatTemplate, *, max_tokens: int, seed: int, shuffled: bool = True
    ) -> None:
        """Read and tokenize the prompts.

        Raises: UserError for an invalid source, or if no prompt has at most `max_tokens` tokens.
        """
        items = [item for source in sources for item in _read(source)]
        tokenized = [(template.prompt(messages), arguments) for messages, arguments in items]
        self._pool = [item for item in tokenized if len(item[0]) <= max_tokens]
        self.num_too_long = len(tokenized) - len(self._pool)
        self._seed, self._shuffled = seed, shuffled
        self._order: tuple[int, np.ndarray] | None = None
        if not self._pool:
            raise UserError(
                f"rl.prompts: all of {len(tokenized)} prompts are longer than {max_tokens} tokens, which is "
                "training.sequence_length less rl.rollout.max_new_tokens; raise training.sequence_length."
            )

    def __len__(self) -> int:
        """Return the number of prompts of one pass."""
        return len(self._pool)

    def __getitem__(self, number: int) -> Prompt:
        pass_index, index = divmod(number, len(self._pool))
        if self._shuffled:
            if self._order is None or self._order[0] != pass_index:
                generator = np.random.default_rng((self._seed, pass_index))
                self._order = (pass_index, generator.permutation(len(self._pool)))
            index = int(self._order[1][index])
        return Prompt(number, *self._pool[index])

    def take(self, first: int, count: int) -> list[Prompt]:
        """Return the prompts `first` … `first + count - 1`."""
        return [self[number] for number in range(first, first + count)]


def _read(source: PromptSource) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Return (messages, scoring arguments) of every prompt."""
    if source.task is not None:
        return _from_task_set(source.task)
    assert source.path is not None, "PromptSource validates it"
    path = Path(source.path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"prompts {path}: {error.strerror}. Give a .jsonl file.") from None
    return [_from_line(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]


def _from_task_set(task: TaskSet) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    return [
        (
            [{"role": "user", "content": question.text}],
            {
                "text": question.text,
                "answer": question.answer,
                "task": task.name,
                "settings": task.settings,
                "seed": question.seed,
                "index": question.index,
            },
        )
        for question in questions(task)
    ]


def _from_line(line: str, location: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{location}: not JSON ({error}): {line[:QUOTED_CHARACTERS]}") from None
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        messages = [{"role": "user", "content": row["prompt"]}]
    elif isinstance(row, dict) and isinstance(row.get("messages"), list) and row["messages"]:
        messages = row["messages"]
    else:
        raise UserError(
            f'{location}: no prompt; it must be {{"prompt": text, "answer": …}} or {{"messages": […], "answer": …}}, '
            f"found {line[:QUOTED_CHARACTERS]}"
        )
    return messages, {k: v for k, v in row.items() if k != "messages"} | {"text": messages[-1].get("content", "")}
