"""User errors and exit codes: UserError for an invalid setting, file or environment becomes exit code 2.

A message names the setting or file, what was found, what is allowed, and what to do. Violated internal invariants are
`assert`s instead.
"""

import difflib
from collections.abc import Iterable

# one message on stderr, no traceback
EXIT_BAD_INPUT = 2
# no progress: ended by the hang detection of `health/hang.py`, to be requeued (EX_SOFTWARE of sysexits.h)
EXIT_HANG = 70
# stopped early with everything saved, to be requeued (EX_TEMPFAIL)
EXIT_REQUEUE = 75


class UserError(ValueError):
    """Invalid configuration, input or environment, with a message for the user."""


class RunInUseError(UserError):
    """Refusal to write into a run directory in which another process trains; that process's files stay untouched."""


def suggest(unknown: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest known name, or the empty string.

    A known last part under a wrong section (optimizer.lr) suggests the full name (schedule.lr).
    """
    names = list(known)
    leaf = unknown.rsplit(".", 1)[-1]
    same_leaf = [name for name in names if name.rsplit(".", 1)[-1] == leaf]
    close = difflib.get_close_matches(unknown, same_leaf or names, n=1, cutoff=0.0 if same_leaf else 0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
