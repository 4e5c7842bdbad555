"""Prompts in an order that is a function of the seed: the `number`th prompt of a run is always the same one.

Passes over the prompts are shuffled anew, so a run may ask for more than there are.
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

SHOWN = 160  # characters of a bad line that an error repeats


class Prompts:
    """The prompts of some sources, spelled by the chat template; those that leave no room to answer are left out."""

    def __init__(
        self, sources: list[PromptSource], template: ChatTemplate, *, longest: int, seed: int, shuffled: bool = True
    ) -> None:
        """Read them.

        Raises: UserError for a bad source, or if no prompt is at most `longest` tokens.
        """
        everything = [item for source in sources for item in _read(source)]
        spelled = [(template.prompt(messages), grading) for messages, grading in everything]
        self._pool = [item for item in spelled if len(item[0]) <= longest]
        self.num_left_out = len(spelled) - len(self._pool)
        self._seed, self._shuffled = seed, shuffled
        self._order: tuple[int, np.ndarray] | None = None
        if not self._pool:
            raise UserError(
                f"rl.prompts: none of {len(spelled)} prompts is at most {longest} tokens, so that "
                "rl.rollout.max_new_tokens more fit into training.sequence_length; raise the latter."
            )

    def __len__(self) -> int:
        """Prompts of one pass."""
        return len(self._pool)

    def __getitem__(self, number: int) -> Prompt:
        one_pass, place = divmod(number, len(self._pool))
        if self._shuffled:
            if self._order is None or self._order[0] != one_pass:
                generator = np.random.default_rng((self._seed, one_pass))
                self._order = (one_pass, generator.permutation(len(self._pool)))
            place = int(self._order[1][place])
        return Prompt(number, *self._pool[place])

    def take(self, first: int, count: int) -> list[Prompt]:
        """Return the prompts `first` … `first + count - 1`."""
        return [self[number] for number in range(first, first + count)]


def _read(source: PromptSource) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Return (messages, what graders are told) of every prompt."""
    if source.task is not None:
        return _of_task(source.task)
    assert source.path is not None, "the configuration sees to it"
    path = Path(source.path).expanduser()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"prompts {path}: {error.strerror}. Give a .jsonl file.") from None
    return [_of_line(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]


def _of_task(task: TaskSet) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
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


def _of_line(line: str, place: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}): {line[:SHOWN]}") from None
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        messages = [{"role": "user", "content": row["prompt"]}]
    elif isinstance(row, dict) and isinstance(row.get("messages"), list) and row["messages"]:
        messages = row["messages"]
    else:
        raise UserError(
            f'{place}: no prompt; it must be {{"prompt": text, "answer": …}} or {{"messages": […], "answer": …}}, '
            f"found {line[:SHOWN]}"
        )
    return messages, {k: v for k, v in row.items() if k != "messages"} | {"text": messages[-1].get("content", "")}
