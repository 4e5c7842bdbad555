"""Scoring worker process: reads one JSON object per line, writes one per line.

    python -m megatron_q3n.rl.scoring_worker KIND [MODULE:FUNCTION]

It writes {"ready": true} first; then each {"answer", "arguments"} gets {"score"} or {"error"}. Standard output of
scoring functions is redirected to stderr, so that it cannot corrupt the replies. The parent is `reward_workers.py`.
"""

import json
import math
import os
import sys
from typing import TextIO

from megatron_q3n.rl.scoring_functions import ScoringFunction, scoring_function


def main() -> int:
    """Score until the input ends.

    Returns: 0.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    kind, *function = sys.argv[1:]
    score = scoring_function(kind, function[0] if function else None)
    _write(replies, {"ready": True})
    for line in sys.stdin:
        _write(replies, _reply(score, **json.loads(line)))
    return 0


def _reply(score_answer: ScoringFunction, answer: str, arguments: dict) -> dict:
    try:
        score = float(score_answer(answer, arguments))
    # a user's function may raise anything; it fails this response only
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"score": score} if math.isfinite(score) else {"error": f"a score of {score}"}


def _write(replies: TextIO, content: dict) -> None:
    replies.write(json.dumps(content) + "\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main())
