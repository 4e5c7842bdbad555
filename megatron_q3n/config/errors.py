"""The one error type for people: a bad setting, file or environment. The door turns it into exit code 2.

A message says where (the setting or file), what was found, what is allowed, and what to do. Our own broken
invariants are `assert`s, never this.
"""

import difflib
from collections.abc import Iterable

EXIT_BAD_INPUT = 2  # one clear message on stderr, no traceback
EXIT_HANG = 70  # no progress: ended by the watch of `health/hang.py`, to be requeued (EX_SOFTWARE)
EXIT_REQUEUE = 75  # stopped early with everything saved (EX_TEMPFAIL of sysexits.h)


class UserError(ValueError):
    """Report a bad configuration or input to the person who can mend it."""


def suggest(unknown: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest known name, or the empty string.

    A right leaf under a wrong parent (optimizer.lr) names its true place (schedule.lr).
    """
    names = list(known)
    leaf = unknown.rsplit(".", 1)[-1]
    same_leaf = [name for name in names if name.rsplit(".", 1)[-1] == leaf]
    close = difflib.get_close_matches(unknown, same_leaf or names, n=1, cutoff=0.0 if same_leaf else 0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
