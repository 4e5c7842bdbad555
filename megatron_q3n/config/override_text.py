"""Overrides written by programs: a value quoted so that Hydra and OmegaConf read it back as it is.

Hydra splits unquoted values at commas (a sweep) and reads brackets, quotes and equals signs; OmegaConf replaces ${…}.
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

# read by Hydra as a text
_PLAIN_PATH = re.compile(r"/[\w/.+@-]*", re.ASCII)


def shell_override(name: str, path: Path) -> str:
    """Return the override name=path for a command that a user pastes into a shell."""
    return shlex.quote(override(name, path))


def override(name: str, value: str | int | Path | Sequence[str] | None) -> str:
    """Return the override name=value."""
    if value is None:
        return f"{name}=null"
    if isinstance(value, int):
        return f"{name}={value}"
    if isinstance(value, Path) and _PLAIN_PATH.fullmatch(str(value)):
        return f"{name}={value}"
    if isinstance(value, (str, Path)):
        return f"{name}={quoted(str(value))}"
    return f"{name}=[{','.join(map(quoted, value))}]"


def quoted(text: str) -> str:
    """Return a text as a quoted value of a setting: neither a list, a sweep nor an interpolation."""
    return hydra_quoted(re.sub(r"(\\*)\$\{", r"\1\1\\${", text))


def hydra_quoted(text: str) -> str:
    """Return a text as a quoted value of Hydra's grammar, for what OmegaConf does not read, such as the search path.

    Backslashes are doubled only where they precede a quote or end the text; elsewhere Hydra keeps them.
    """
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return f"'{re.sub(r'(\\+)\Z', r'\1\1', escaped)}'"
