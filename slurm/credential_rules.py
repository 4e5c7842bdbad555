"""Credentials in settings and file names: what must not be written into job scripts, run directories and snapshots.

A name is judged by its last word (WANDB_API_KEY, --auth-token), so that TOKENIZERS_PARALLELISM or NUM_TOKENS are no
credentials. A value that only refers to one is allowed: a shell expansion ($NAME, $(cat FILE)) or a path.
"""

import re
from collections.abc import Iterable

# as a whole last word, or at the end of a last word written together with another (HFTOKEN, PGPASSWORD)
_SECRET_END = re.compile(
    r"(?:(?:^|[_.-]|api|access|auth|private|secret|ssh|wandb|hf)keys?"
    r"|token|passw(?:or)?d|passphrase|secrets?|credentials?|(?:^|[_.-])(?:pass|pwd))$",
    re.IGNORECASE,
)
# words that a secret's name may be followed by: HF_TOKEN_2, API_KEY_ID
_SUFFIX = re.compile(r"(?:[_.-]?\d+|[_.-](?:id|value|read|write|prod|dev))+$", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"(?<![\w.-])(?:--?)?([A-Za-z][\w.-]*)=(\"[^\"]*\"|'[^']*'|[^\s,;]*)")
_OPTION_AND_VALUE = re.compile(r"(?<!\S)--?([A-Za-z][\w.-]*)\s+(\"[^\"]*\"|'[^']*'|[^\s,;=-][^\s,;]*)")
_URL = re.compile(r"\w+://[^/\s:@]+:([^/\s@]+)@")
_SECRET_FILES = re.compile(
    r"(?:^|/)(?:\.[^/]*|id_(?:rsa|dsa|ecdsa|ed25519)[^/]*|[^/]*\.(?:pem|key|p12|pfx|env|netrc))(?:/|$)", re.IGNORECASE
)


def is_secret_name(name: str) -> bool:
    """Return whether a variable, option or file stem of this name holds a credential."""
    return _SECRET_END.search(_SUFFIX.sub("", name)) is not None


def refers_only(value: str) -> bool:
    """Return whether a value is empty, a path or a shell expansion, and therefore not the credential itself."""
    bare = value.strip().strip("\"'")
    return not bare or bare[0] in "/~$`" or bare.lower() in ("true", "false", "null", "0", "1")


def find(text: str) -> str | None:
    """Return the name of the first credential that a text assigns (NAME=value, --name value, URL), or None."""
    for match in _URL.finditer(text):
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
