"""Prompt stream: prompt `number` of a run is a function of the sources and the seed.

Each pass over the prompts has its own permutation, so that a run may use more prompts than there are.
"""

from typing import Any, Literal, NamedTuple

import numpy as np

from megatron_q3n.config import UserError
from megatron_q3n.config.rl import PromptSource
from megatron_q3n.config.sft import TaskSet
from megatron_q3n.data.chat_template import ChatTemplate
from megatron_q3n.data.conversation_shapes import is_messages, messages_of, rename
from megatron_q3n.data.conversation_tasks import questions
from megatron_q3n.data.conversations import check_messages, check_tools, check_tools_are_rendered
from megatron_q3n.data.held_out import hash_fraction, held_out_mask
from megatron_q3n.data.rows import read_rows
from megatron_q3n.data.source_weights import repeated
from megatron_q3n.rl.samples import Prompt

Part = Literal["all", "train", "held_out"]
# number of the source, tokens, scoring arguments
type _Tokenized = tuple[int, list[int], dict[str, Any]]
# distinct texts of a held-out share: each evaluation generates a response to every one
MAX_HELD_OUT = 500


class Prompts:
    """The prompts of some sources, tokenized by the chat template, except those longer than `max_tokens`."""

    def __init__(
        self,
        sources: list[PromptSource],
        template: ChatTemplate,
        *,
        max_tokens: int,
        seed: int,
        shuffled: bool = True,
        part: Part = "all",
        held_out_percent: float = 0.0,
        name: str = "rl.prompts",
    ) -> None:
        """Read and tokenize the prompts; `part` selects those in the held-out share, those outside it, or all.

        Raises: UserError for an invalid source, if no prompt has at most `max_tokens` tokens, or none can be held out.
        """
        items = [(number, item) for number, source in enumerate(sources) for item in _read(source)]
        tokenized = [(number, _tokens(template, item), item.arguments) for number, item in items]
        fitting = [item for item in tokenized if len(item[1]) <= max_tokens]
        self.num_too_long = len(tokenized) - len(fitting)
        if not fitting:
            raise UserError(
                f"{name}: all of {len(tokenized)} prompts are longer than {max_tokens} tokens, which is "
                "training.sequence_length less rl.rollout.max_new_tokens; raise training.sequence_length."
            )
        chosen = fitting if part == "all" else _part(fitting, part, held_out_percent)
        weights = [1.0 if part == "held_out" else source.weight for source in sources]
        self._pool = [(tokens, arguments) for _, tokens, arguments in _weighted(chosen, weights)]
        self._origin = name if part == "all" else f"{held_out_percent:g} % of {name}"
        self._seed, self._shuffled = seed, shuffled
        self._order: tuple[int, np.ndarray] | None = None

    def describe(self) -> str:
        """Return the number of prompts and where they come from."""
        return f"{len(self)} prompts ({self._origin})"

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


def _part(items: list[_Tokenized], part: Part, percent: float) -> list[_Tokenized]:
    """Return the prompts inside or outside the held-out share, by the hash of their tokens."""
    mask = held_out_mask([hash_fraction(str(tokens)) for _, tokens, _ in items], percent / 100, MAX_HELD_OUT)
    if not any(mask):
        raise UserError(
            f"rl.prompts: its {len(items)} prompt(s) have one text, so that none can be held out; give others, "
            "rl.held_out, or rl.held_out_percent=0."
        )
    return [item for item, is_held_out in zip(items, mask) if is_held_out == (part == "held_out")]


class _Item(NamedTuple):
    """A prompt before tokenization: messages, the arguments of its scoring, and its location for error messages."""

    messages: list[dict[str, Any]]
    arguments: dict[str, Any]
    location: str


def _read(source: PromptSource) -> list[_Item]:
    if source.task is not None:
        return _from_task_set(source.task)
    assert source.path is not None, "PromptSource validates it"
    return [_from_row(rename(row.values, source.columns, row.location), row.location) for row in read_rows(source.path)]


def _weighted(items: list[_Tokenized], weights: list[float]) -> list[_Tokenized]:
    """Return the prompts of one pass, given the weight of each source."""
    of_source = [[item for item in items if item[0] == number] for number in range(len(weights))]
    return [
        prompts[index]
        for number, (prompts, weight) in enumerate(zip(of_source, weights, strict=True))
        for index in repeated(list(range(len(prompts))), weight, str(number))
    ]


def _tokens(template: ChatTemplate, item: _Item) -> list[int]:
    tools = item.arguments.get("tools")
    try:
        check_tools_are_rendered(template, item.messages, tools)
        return template.prompt(item.messages, tools=tools)
    except UserError as error:
        raise UserError(f"{item.location}: {error}") from None


def _from_task_set(task: TaskSet) -> list[_Item]:
    return [
        _Item(
            [{"role": "user", "content": question.text}],
            {
                "text": question.text,
                "answer": question.answer,
                "task": task.name,
                "settings": task.settings,
                "seed": question.seed,
                "index": question.index,
            },
            f"task {task.name}:{question.seed}.{question.index}",
        )
        for question in questions(task)
    ]


def _from_row(values: dict[str, Any], location: str) -> _Item:
    """Return the messages of a row, and its other values as arguments.

    The last answer of a ShareGPT or Alpaca row is no part of the prompt; it is the argument `answer`, unless that is a
    column of its own.
    """
    answer: dict[str, Any] = {}
    if isinstance(values.get("prompt"), str):
        messages: list[Any] = [{"role": "user", "content": values["prompt"]}]
    else:
        messages = messages_of(values, location)
        if not is_messages(values) and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
            answer = {"answer": messages[-1].get("content")}
            messages = messages[:-1]
    if not messages:
        raise UserError(f"{location}: no prompt: the conversation has an answer only.")
    checked = check_messages(messages, location)
    arguments = answer | {key: x for key, x in values.items() if key not in ("messages", "conversations", "tools")}
    tools = check_tools(values.get("tools"), location)
    arguments |= {"tools": tools} if tools else {}
    return _Item(checked, arguments | {"text": checked[-1].get("content", "")}, location)
