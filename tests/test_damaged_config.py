"""config.yaml of a run to resume, damaged in 300 ways: it is read, or refused with one message; nothing hangs.

In this process, since a new one takes seconds. What a resume does with a good one: tests/stages/test_resume.py.
"""

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_q3n.config import UserError, default_tree
from megatron_q3n.recipe import configure, register_defaults
from tests.seeds import FIRST_SEED

NUM_DAMAGED, SECONDS = 300, 20
Dice = random.Random
EXPLODING = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
VALUES: list[Any] = [
    *(None, True, -1, 0, 10**30, 1.5, float("nan"), float("inf"), "", "text", "${model}", "${", "1e5", "\\${x}"),
    *([], [1], [[]], {}, {"a": 1}, {1: 2}, [None], b"\x00", "ü\u2028", "!!python/object:os.system", "../../x", "?"),
]
WHOLE: list[bytes] = [
    *(b"", b"[]", b"[1, 2]", b"text", b"3", b"null", b"---\n---\n", b"\x00", b"\xff\xfe\x00", b"a: b: c", b"{", b"'"),
    *(b"a: *b", b"? [a]\n: 1", b"1: 2", b"!!python/object/apply:os.system ['true']", b"a: !x 1", b"\t", b"a: 1\na: 2"),
    *(EXPLODING.encode(), b"model: " + b"[" * 5000, b"model: &m\n  name: *m", b"&a [*a]", b"&a {model: *a}", b"<<: 1"),
    *(b"stage: []", b"stage: {}", b"model: 5", b"model: null", b"recipe: [1]", b"data: {train: 3}", b"2020-13-45: 1"),
]


@contextmanager
def limited() -> Iterator[None]:
    """Raise TimeoutError after SECONDS."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Return every (parent, key) of a tree."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in pairs for place in [(tree, key), *places(value)]]


def change_values(text: bytes, dice: Dice) -> bytes:
    tree = yaml.load(text, Loader=yaml.CSafeLoader)
    for _ in range(dice.choice([1, 1, 2, 5])):
        parent, key = dice.choice(places(tree))
        parent[key] = dice.choice(VALUES)
    return yaml.dump(tree, Dumper=yaml.CSafeDumper, allow_unicode=True).encode()


def change_names(text: bytes, dice: Dice) -> bytes:
    tree = yaml.load(text, Loader=yaml.CSafeLoader)
    parent, key = dice.choice([place for place in places(tree) if isinstance(place[0], dict)])
    parent[dice.choice([1, None, True, "", "a.b", "${x}", f"{key}x", "model", "megatron"])] = parent.pop(key)
    return yaml.dump(tree, Dumper=yaml.CSafeDumper).encode()


def flip(text: bytes, dice: Dice) -> bytes:
    content = bytearray(text)
    for _ in range(dice.choice([1, 2, 16])):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    return bytes(content)


def cut(text: bytes, dice: Dice) -> bytes:
    return text[: dice.randrange(len(text))]


def insert(text: bytes, dice: Dice) -> bytes:
    start = dice.randrange(len(text))
    return (
        text[:start] + dice.choice([b"\n", b"\t", b"*a ", b"&a ", b"{", b"[", b": ", b"!!x ", b"\xff"]) + text[start:]
    )


DAMAGES: list[Callable[[bytes, Dice], bytes]] = [change_values, change_values, change_names, flip, cut, insert]


@pytest.fixture(scope="module")
def good() -> bytes:
    register_defaults()
    return yaml.safe_dump(default_tree() | {"run_dir": None}, sort_keys=False).encode()


def outcome(run_dir: Path, content: bytes) -> str:
    """Return the message of a refused resume, "" if it is accepted."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_bytes(content)
    try:
        with limited():
            configure(["--resume", str(run_dir)])
    except UserError as error:
        return str(error) or "no message"
    return ""


@pytest.mark.parametrize("number", range(len(WHOLE)))
def test_files_that_are_no_configuration_are_refused(good: bytes, tmp_path: Path, number: int) -> None:
    message = outcome(tmp_path, WHOLE[number])
    assert message, WHOLE[number][:100]
    assert len(message) < 2000


def test_a_good_one_is_accepted(good: bytes, tmp_path: Path) -> None:
    assert outcome(tmp_path, good) == ""


@pytest.mark.parametrize("value", [v for v in VALUES if v is not None])
def test_a_damaged_record_of_the_models_own_settings_is_refused(good: bytes, tmp_path: Path, value: Any) -> None:
    tree = yaml.safe_load(good) | {"own_model_settings": value}
    message = outcome(tmp_path, yaml.dump(tree, Dumper=yaml.CSafeDumper).encode())
    assert "own_model_settings" in message or value in ([], "${"), message


def test_every_damage_is_one_message(good: bytes, tmp_path: Path) -> None:
    num_refused = 0
    for seed in range(FIRST_SEED, FIRST_SEED + NUM_DAMAGED):
        dice = Dice(seed)
        content = dice.choice(DAMAGES)(good, dice)
        try:
            message = outcome(tmp_path, content)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        num_refused += bool(message)
        assert "\x00" not in message, f"seed {seed}"
    assert num_refused > NUM_DAMAGED / 2
