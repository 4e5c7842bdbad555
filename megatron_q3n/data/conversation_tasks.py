"""Questions of reasoning-gym task sets, in shares that are disjoint by text.

Where a text belongs is a function of the text, so that questions for fine-tuning, reinforcement
learning and the test can be made at any time, in any number and from any seed, without a common one.
How an answer is scored is `rl/graders.py`.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_q3n.config import UserError, suggest
from megatron_q3n.config.sft import TaskSet
from megatron_q3n.data.conversations import Conversation

CHUNK = 4096  # questions made at once; reasoning-gym makes entry i of seed s from s + i, so seeds lie this far apart
MAX_CHUNKS_WITHOUT_NEWS = 64


@dataclass(frozen=True)
class Question:
    """A question, its answer, and where it is found again: entry `index` of the task set made with `seed`."""

    text: str
    answer: str
    seed: int
    index: int


def create_task(name: str, settings: dict[str, Any], seed: int, size: int) -> Any:
    """Return a reasoning-gym data set.

    Raises: UserError for an unknown name or setting.
    """
    import reasoning_gym  # late: two seconds that runs on other data need not wait for
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise UserError(f"reasoning-gym has no task set {name!r}.{suggest(name, DATASETS)}")
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"task set {name}: reasoning-gym refuses its settings: {error}") from None


def questions(task: TaskSet) -> list[Question]:
    """Return the questions of a set, the same ones at every call.

    Raises: UserError if its share of the texts does not hold so many.
    """
    found: list[Question] = []
    texts: set[str] = set()
    without_news = 0
    for seed in itertools.count(task.seed * 2**40, CHUNK):
        before = len(found)
        for question in _in_share(task, seed):
            if not (task.distinct and question.text in texts):
                found.append(question)
                texts.add(question.text)
            if len(found) == task.size:
                return found
        without_news = 0 if len(found) > before else without_news + 1
        if without_news == MAX_CHUNKS_WITHOUT_NEWS:
            break
    raise UserError(
        f"task set {task.name}: only {len(found)} of {task.size} questions found in its share of the texts "
        f"({task.first} to {task.last}); ask for fewer, widen the share, or let texts repeat (distinct=false)."
    )


def conversations_of(task: TaskSet) -> Iterator[Conversation]:
    """Yield a conversation of each question and its answer."""
    for question in questions(task):
        messages = [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer}]
        yield Conversation(messages, f"task {task.name}:{question.seed}.{question.index}")


def place_of(text: str) -> float:
    """Return where a text belongs, in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _in_share(task: TaskSet, seed: int) -> Iterator[Question]:
    for index, entry in enumerate(create_task(task.name, task.settings, seed, CHUNK)):
        if entry["answer"] is None:
            raise UserError(f"task set {task.name} gives no answers to learn from; choose another.")
        if task.first <= place_of(entry["question"]) < task.last:
            yield Question(entry["question"], str(entry["answer"]), seed, index)
