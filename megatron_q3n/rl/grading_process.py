"""A process that grades answers: one JSON object a line in, one a line out.

    python -m megatron_q3n.rl.grading_process KIND [MODULE:FUNCTION]

It says {"ready": true} first; then each {"answer", "grading"} gets {"score"} or {"error"}. What graders print goes
to stderr, so that it cannot spoil the answers. The processes' keeper is `rewards.py`.
"""

import json
import math
import os
import sys
from typing import TextIO

from megatron_q3n.rl.graders import Grader, grader_named


def main() -> int:
    """Grade until the input ends.

    Returns: 0.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    kind, *function = sys.argv[1:]
    grader = grader_named(kind, function[0] if function else None)
    _reply(replies, {"ready": True})
    for line in sys.stdin:
        _reply(replies, _graded(grader, **json.loads(line)))
    return 0


def _graded(grader: Grader, answer: str, grading: dict) -> dict:
    try:
        score = float(grader(answer, grading))
    except Exception as error:  # a grader is anybody's code: whatever it raises costs this one answer
        return {"error": f"{type(error).__name__}: {error}"}
    return {"score": score} if math.isfinite(score) else {"error": f"a score of {score}"}


def _reply(replies: TextIO, content: dict) -> None:
    replies.write(json.dumps(content) + "\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main())
