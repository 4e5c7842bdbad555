"""Credentials in settings are refused: settings are written to config.yaml, the report, wandb and job scripts.

A credential belongs into an environment variable. A text is judged by its form (a URL with a password, the prefixes of
well-known tokens), a named value that a recipe passes on to user code by its name's last word (WANDB_API_KEY,
auth_token), so that TOKENIZERS_PARALLELISM or num_tokens are none. What only refers to one is allowed: $NAME or a path.
"""

import re
from collections.abc import Iterator
from typing import Any

from megatron_q3n.config.errors import UserError

# as a whole last word, or at the end of a last word written together with another (HFTOKEN, PGPASSWORD)
_SECRET_END = re.compile(
    r"(?:(?:^|[_.-]|api|access|auth|private|secret|ssh|wandb|hf)keys?"
    r"|token|passw(?:or)?d|passphrase|secrets?|credentials?|(?:^|[_.-])(?:pass|pwd))$",
    re.IGNORECASE,
)
# words that a secret's name may be followed by: HF_TOKEN_2, API_KEY_ID
_SUFFIX = re.compile(r"(?:[_.-]?\d+|[_.-](?:id|value|read|write|prod|dev))+$", re.IGNORECASE)
PASSWORD_IN_URL = re.compile(r"\w+://[^/\s:@]*:([^/\s@]+)@")
_PARAMETER_IN_URL = re.compile(r"\w+://\S*[?&]([\w.-]+)=([^&\s]+)")
# Hugging Face, OpenAI and Anthropic, GitHub, AWS
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16})\b")
# text for the model, not for a service
_TEXTS = ("prompts", "stop")


def is_secret_name(name: str) -> bool:
    """Return whether a variable, option or file stem of this name holds a credential."""
    return _SECRET_END.search(_SUFFIX.sub("", name)) is not None


def refers_only(value: str) -> bool:
    """Return whether a value is empty, a path or a shell expansion, and therefore not the credential itself."""
    bare = value.strip().strip("\"'")
    return not bare or bare[0] in "/~$`" or bare.lower() in ("true", "false", "null", "0", "1")


def refuse_credentials(tree: dict[str, Any]) -> None:
    """Check that no setting of a composed tree holds a credential.

    Raises: UserError naming the setting, without its value.
    """
    for where, value in _texts(tree):
        if where.rpartition(".")[2] in _TEXTS or where.rpartition(".")[0].rpartition(".")[2] in _TEXTS:
            continue
        if what := _credential(where, value):
            raise UserError(
                f"{where} holds {what}. Settings are written to config.yaml, the report and wandb: put the credential "
                "into an environment variable, which jobs inherit ($Q3N_API_KEY for rollout servers)."
            )


def _credential(where: str, text: str) -> str | None:
    password = PASSWORD_IN_URL.search(text)
    if password and not refers_only(password[1]):
        return "a URL with a password"
    if any(is_secret_name(m[1]) and not refers_only(m[2]) for m in _PARAMETER_IN_URL.finditer(text)):
        return "a URL with a credential as parameter"
    if _TOKEN.search(text):
        return "what looks like an access token"
    # only what recipes pass on has names that are not ours
    is_free_name = ".arguments." in where
    if is_free_name and is_secret_name(where.rpartition(".")[2]) and not refers_only(text):
        return "a credential, by its name"
    return None


def _texts(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the text of every string in a tree."""
    if isinstance(value, str):
        yield where, value
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in entries:
        yield from _texts(inner, f"{where}.{name}" if where else str(name))
