"""Process of one response: a fork of the scoring worker process that extracts and scores the answer, then ends.

Whatever the answer's evaluation changes in it (modules, memory, child processes) ends with it, so that it cannot affect
the score of another response. Limits: wall-clock and CPU time, processes, memory; its output is cut.
"""

import json
import math
import numbers
import os
import re
import select
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from megatron_q3n.rl.sandbox import limits, seccomp
from megatron_q3n.rl.scoring_functions import ScoringFunction

# gradients of larger ones overflow in fp32, and one sample would cost the whole update
MAX_SCORE = 1e6
CRASH, TIME_LIMIT = "crash", "time limit"
_MAX_REPLY_BYTES, _MAX_OUTPUT_BYTES, _MAX_REASON_CHARACTERS = 1 << 16, 1 << 10, 300
_WATCH_SECONDS = 0.05


@dataclass(frozen=True)
class ScoringRules:
    """How a response is scored, and the limits of its process."""

    score: ScoringFunction
    answer_pattern: str | None
    time_limit_seconds: float
    memory_bytes: int
    may_start_processes: bool


@dataclass
class _Outputs:
    """What the process wrote so far."""

    reply: bytes = b""
    text: bytes = b""
    open: set[int] = field(default_factory=set)


def score_in_process(
    rules: ScoringRules, text: str, arguments: dict[str, Any], private: list[int], is_cancelled: Callable[[float], bool]
) -> dict[str, Any]:
    """Score a response in a process of its own, and end all processes that it leaves.

    `private`: file descriptors that are closed in it. `is_cancelled` waits up to some seconds for the end of requests.
    Returns: {"score"}, {"no_answer"} or {"error"}.
    """
    reply_end, reply_start = os.pipe()
    text_end, text_start = os.pipe()
    child = os.fork()
    if child == 0:
        for descriptor in (*private, reply_end, text_end):
            os.close(descriptor)
        _score_and_exit(rules, text, arguments, reply_start, text_start)
    os.close(reply_start)
    os.close(text_start)
    outputs = _Outputs(open={reply_end, text_end})
    try:
        failure = _watch(rules, outputs, reply_end, is_cancelled)
    finally:
        limits.end_processes_below(child)
        os.close(reply_end)
        os.close(text_end)
    if outputs.text:
        print(_printable(outputs.text.decode("utf-8", "replace")), file=sys.stderr, flush=True)
    return {"error": failure} if failure else _parsed(outputs.reply)


def _watch(rules: ScoringRules, outputs: _Outputs, reply_end: int, is_cancelled: Callable[[float], bool]) -> str | None:
    """Read the reply. Returns: None, or the reason why there is none."""
    deadline, last_seen = time.monotonic() + rules.time_limit_seconds, time.monotonic()
    while b"\n" not in outputs.reply:
        ready, _, _ = select.select(list(outputs.open), [], [], _WATCH_SECONDS)
        for descriptor in ready:
            _read(descriptor, outputs, reply_end)
        if b"\n" in outputs.reply:
            break
        if len(outputs.reply) > _MAX_REPLY_BYTES:
            return "a reply that is too long"
        if reply_end not in outputs.open:
            return CRASH
        if time.monotonic() > deadline:
            return TIME_LIMIT
        if time.monotonic() - last_seen >= _WATCH_SECONDS:
            last_seen = time.monotonic()
            if excess := _excess(rules):
                return excess
            if is_cancelled(0):
                return "cancelled"
    return None


def _read(descriptor: int, outputs: _Outputs, reply_end: int) -> None:
    chunk = os.read(descriptor, 1 << 16)
    if not chunk:
        outputs.open.discard(descriptor)
    elif descriptor == reply_end:
        outputs.reply += chunk
    else:
        outputs.text = (outputs.text + chunk)[:_MAX_OUTPUT_BYTES]


def _excess(rules: ScoringRules) -> str | None:
    usage = limits.usage_below()
    if len(usage.pids) > limits.MAX_PROCESSES:
        return f"more than {limits.MAX_PROCESSES} processes"
    if usage.resident_bytes > rules.memory_bytes:
        return f"more than {rules.memory_bytes / 2**30:g} GiB of memory (rl.reward.memory_gib)"
    return None


def _parsed(line: bytes) -> dict[str, Any]:
    """Return the first line as a reply; the process may have been made to write anything."""
    try:
        reply = json.loads(line.split(b"\n", 1)[0])
    except (ValueError, RecursionError):
        return {"error": "a reply that is not JSON"}
    if isinstance(reply, dict) and set(reply) == {"score"}:
        return _finite(reply["score"])
    if reply == {"no_answer": True}:
        return reply
    if isinstance(reply, dict) and set(reply) == {"error"}:
        return {"error": _printable(str(reply["error"]))[:_MAX_REASON_CHARACTERS]}
    return {"error": "a reply of another form"}


def _finite(score: Any) -> dict[str, Any]:
    """Return a score, or the reason why it is none. numpy's numbers are numbers.Real; text is not."""
    if not isinstance(score, numbers.Real):
        return {"error": f"a score of type {type(score).__name__}; return a number"}
    try:
        value = float(score)
    except OverflowError:
        # an integer of hundreds of digits
        value = math.inf
    if not (math.isfinite(value) and abs(value) <= MAX_SCORE):
        return {"error": f"a score of {value:g}; it must be a number from -{MAX_SCORE:g} to {MAX_SCORE:g}"}
    return {"score": value}


def _printable(text: str) -> str:
    """Replace control characters, which could change the terminal that shows the text."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _score_and_exit(rules: ScoringRules, text: str, arguments: dict[str, Any], reply: int, output: int) -> NoReturn:
    """Score in the forked process; it ends here, even if the scoring forked itself and returned twice."""
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    limits.limit_cpu(math.ceil(rules.time_limit_seconds) + 1)
    if not rules.may_start_processes and sys.platform == "linux" and seccomp.is_supported():
        seccomp.forbid_processes()
    result = json.dumps(_result(rules, text, arguments)).encode() + b"\n"
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(reply, result)
    os._exit(0)


def _result(rules: ScoringRules, text: str, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        answer = _extract_answer(rules.answer_pattern, text)
        if answer is None:
            return {"no_answer": True}
        return _finite(rules.score(answer, arguments))
    # scoring evaluates text that a model wrote, and may raise anything; it fails this response only
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"[:_MAX_REASON_CHARACTERS]}


def _extract_answer(pattern: str | None, text: str) -> str | None:
    if pattern is None:
        return text.strip()
    matches = list(re.finditer(pattern, text))
    return matches[-1][1] if matches else None
