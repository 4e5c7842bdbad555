"""Questions of reasoning-gym task sets, split into disjoint subsets by a hash of the question text.

The hash of a text decides its split, so that questions for fine-tuning, reinforcement learning and the test set can be
generated at any time, in any number and from any seed, and no text is in two of them.
How an answer is scored is `rl/scoring_functions.py`.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_q3n.config import UserError, suggest
from megatron_q3n.config.sft import TaskSet
from megatron_q3n.data.conversations import Conversation
from megatron_q3n.data.held_out import hash_fraction

# questions per data set; reasoning-gym generates entry i of seed s from s + i, so seeds are this far apart
CHUNK_QUESTIONS = 4096
# chunks in a row without a new question after which the search ends
MAX_EMPTY_CHUNKS = 64


@dataclass(frozen=True)
class Question:
    """A question, its answer, and its origin: entry `index` of the task set generated with `seed`."""

    text: str
    answer: str
    seed: int
    index: int


def create_task(name: str, settings: dict[str, Any], seed: int, size: int) -> Any:
    """Return a reasoning-gym data set.

    Raises: UserError for an unknown name or setting.
    """
    # late: this import takes two seconds, and runs on other data do not need it
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise UserError(f"reasoning-gym has no task set {name!r}.{suggest(name, DATASETS)}")
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"task set {name}: reasoning-gym refuses its settings: {error}") from None


def questions(task: TaskSet) -> list[Question]:
    """Return the questions of a task set, the same ones at every call.

    Raises: UserError if the task set's hash range holds fewer than `size` questions.
    """
    result: list[Question] = []
    texts: set[str] = set()
    num_empty_chunks = 0
    for seed in itertools.count(task.seed * 2**40, CHUNK_QUESTIONS):
        num_before = len(result)
        for question in _questions_in_range(task, seed):
            if not (task.distinct and question.text in texts):
                result.append(question)
                texts.add(question.text)
            if len(result) == task.size:
                return result
        num_empty_chunks = 0 if len(result) > num_before else num_empty_chunks + 1
        if num_empty_chunks == MAX_EMPTY_CHUNKS:
            break
    raise UserError(
        f"task set {task.name}: only {len(result)} of {task.size} questions found in its share of the texts "
        f"({task.first} to {task.last}); set a smaller size, widen first to last, or let texts repeat (distinct=false)."
    )


def task_conversations(task: TaskSet) -> Iterator[Conversation]:
    """Yield one conversation per question: the question as user, the answer as assistant."""
    for question in questions(task):
        messages = [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer}]
        yield Conversation(messages, f"task {task.name}:{question.seed}.{question.index}")


def _questions_in_range(task: TaskSet, seed: int) -> Iterator[Question]:
    for index, entry in enumerate(create_task(task.name, task.settings, seed, CHUNK_QUESTIONS)):
        if entry["answer"] is None:
            raise UserError(f"task set {task.name} has questions without an answer; choose another.")
        if task.first <= hash_fraction(entry["question"]) < task.last:
            yield Question(entry["question"], str(entry["answer"]), seed, index)
