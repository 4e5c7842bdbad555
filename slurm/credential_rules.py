"""Credentials in job scripts and file names: what must not be written into scripts and snapshots.

Names and values are judged as in settings (config/credentials.py of the package).
"""

import re
from collections.abc import Iterable

from megatron_q3n.config.credentials import PASSWORD_IN_URL, is_secret_name, refers_only

_ASSIGNMENT = re.compile(r"(?<![\w.-])(?:--?)?([A-Za-z][\w.-]*)=(\"[^\"]*\"|'[^']*'|[^\s,;]*)")
_OPTION_AND_VALUE = re.compile(r"(?<!\S)--?([A-Za-z][\w.-]*)\s+(\"[^\"]*\"|'[^']*'|[^\s,;=-][^\s,;]*)")
_SECRET_FILES = re.compile(
    r"(?:^|/)(?:\.[^/]*|id_(?:rsa|dsa|ecdsa|ed25519)[^/]*|[^/]*\.(?:pem|key|p12|pfx|env|netrc))(?:/|$)", re.IGNORECASE
)


def find(text: str) -> str | None:
    """Return the name of the first credential that a text assigns (NAME=value, --name value, URL), or None."""
    for match in PASSWORD_IN_URL.finditer(text):
        if not refers_only(match[1]):
            return f"the password in {match[0].split(':')[0]}://…"
    for pattern in (_ASSIGNMENT, _OPTION_AND_VALUE):
        for match in pattern.finditer(text):
            name, value = match[1], match[2]
            # --export=KEY=value: the value is an assignment itself
            nested = find(value.strip("\"'")) if "=" in value else None
            if nested is not None:
                return nested
            if is_secret_name(name) and not refers_only(value):
                return name
    return None


def find_in_arguments(arguments: Iterable[str]) -> str | None:
    """Return the name of the first credential in a list of arguments, which may be split as --name, value."""
    return find(" ".join(arguments))


def is_secret_file(path: str) -> bool:
    """Return whether a relative path looks like a file of credentials: hidden, a key file, or named as a secret."""
    stems = [part.split(".")[0] for part in path.split("/")]
    return _SECRET_FILES.search(path) is not None or any(is_secret_name(stem) for stem in stems if stem)
