"""Rules of words: what no identifier, file, setting or metric, and no prose, may contain, since a standard term exists.

A name is split into words at `_`, `-`, `/` and capitals; a forbidden word is found anywhere in it (few_rows in
_few_rows_kernel), and never in part of a word (turned in returned).

Prose (docstrings, comments, Markdown) has its own list: words that are unambiguous in a sentence. A word with another,
standard meaning (tap, tape, turned, judge) is forbidden in names only.
"""

import ast
import re
from collections.abc import Iterator

from tests.prose import prose_of

# forbidden -> the word to use
FORBIDDEN = {
    "few_rows": "decode_gemm",
    "few_queries": "decode_attention",
    "few_routes": "decode_router",
    "few_experts": "decode_experts",
    "few_tokens": "decode_argmax",
    "delta_steps": "decode_gated_delta",
    "turned": "apply_rope",
    "opened": "apply_output_gate",
    "taps": "conv_kernel_size",
    "heard": "probe",
    "tape": "probe or recorded routes",
    "settle": "commit or wait_for_save",
    "settled": "committed",
    "begin_trial": "begin_draft",
    "take_on": "admit",
    "let_go": "free or retire",
    "abilities": "GenerationLimits",
    "even_groups": "zero_variance_groups",
    "answer_server": "completion_server",
    "handover": "weight_sync",
    "hand_on": "copy or forward",
    "own_drafts": "scheduled_sampling",
    "spelled": "tokenized",
    "spell": "tokenize",
    "lay_out": "pack",
    "pace": "LoopHooks",
    "meeting": "rendezvous",
    "look_back": "compute_old_logprobs",
    "examine": "evaluate",
    "judge": "verify, check or score",
    "judged": "verified",
    "judging": "verification",
    "grader": "reward worker",
    "graders": "reward workers",
    "grading": "scoring",
    "graded": "scored",
    "room": "capacity, buffer, or part",
    "rooms": "parts",
    "door": "allowed importers",
    "doors": "allowed importers",
    "house": "package",
    "rung": "test by backend",
    "rungs": "tests by backend",
    "teeth": "planted fault",
    "ladder": "tests by backend",
    "told": "requested",
    "asked": "requested",
    "nobody": "none",
    "somebody": "another",
    "remember": "record",
    "last_words": "last_lines",
}
PATTERN = re.compile(rf"(?:^|_)({'|'.join(sorted(FORBIDDEN, key=len, reverse=True))})(?=_|$)")
# forbidden in prose, as whole words -> the word to use
FORBIDDEN_IN_PROSE = {
    "doors?": "entry point or allowed importers",
    "rooms?": "capacity, buffer, or part",
    "house": "package",
    "rungs?": "tests by backend",
    "ladders?": "tests by backend",
    "teeth": "planted fault",
    "nobody": "none",
    "somebody": "another",
    "anybody": "any",
    "everybody": "all",
    "told": "requested, or receives",
    "asked": "requested",
    "lends?": "shares or provides",
    "lent": "shared",
    "hears?": "reads or probes",
    "heard": "probed",
    "thinks?": "computes or expects",
    "wants?": "requires",
    "speaks?": "prints or reports",
    "dies": "exits or crashes",
    "wakes?": "resumes",
    "born divided": "pre-scaled",
    "lets? go": "free or retire",
    "learn(s|t)? by heart": "memorize",
    "lives here": "is defined here",
    "takes? care": "handle",
    "what comes of": "result",
    "as it stands": "unchanged",
    "any more": "(no history)",
    "bulk copy engine": "TMA",
    "multiprocessors?": "SMs",
    "graders?": "reward workers",
    "grading": "scoring",
    "answer servers?": "completion server",
    "walks? along": "iterates over",
}
PROSE_PATTERN = re.compile(
    "|".join(rf"(?<![\w-])(?:{words})(?![\w-])".replace(" ", r"\s+") for words in FORBIDDEN_IN_PROSE), re.IGNORECASE
)
# The files of these rules contain the forbidden words.
RULE_FILES = ("tests/naming_rules.py", "tests/test_naming.py")


def words_of(name: str) -> str:
    """Return a name as its words in small letters, joined by _."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name)
    return "_".join(words).lower()


def name_complaint(name: str) -> str | None:
    """Return what to use in place of a forbidden word in a name; None if there is none."""
    match = PATTERN.search(words_of(name))
    return f"{name}: not {match[1]}; use {FORBIDDEN[match[1]]}" if match else None


def naming_complaints(path: str, text: str) -> Iterator[str]:
    """Check a file's path and the names in it: identifiers in Python, keys and settings in YAML."""
    if path in RULE_FILES:
        return
    if complaint := name_complaint(path):
        yield complaint
    if path.endswith(".py"):
        names = set(identifiers(ast.parse(text)))
    elif path.endswith((".yaml", ".yml")):
        names = {(text.count("\n", 0, m.start()) + 1, m[1]) for m in re.finditer(r"([\w.]+)\s*[:=]", text)}
    else:
        names = set()
    for line, name in sorted(names):
        if complaint := name_complaint(name):
            yield f"{path}:{line}: {complaint}"


def prose_complaints(path: str, text: str) -> Iterator[str]:
    """Check the prose of a Python or Markdown file: docstrings, comments, paragraphs; no string literals."""
    if path in RULE_FILES or not path.endswith((".py", ".md")):
        return
    for prose in prose_of(path, text):
        if not prose.is_literal:
            for match in PROSE_PATTERN.finditer(prose.text):
                line = prose.line + prose.text.count("\n", 0, match.start())
                found = " ".join(match[0].split())
                yield f"{path}:{line}: not {found!r} in prose; use {_prose_replacement(found)}"


def _prose_replacement(found: str) -> str:
    rules = FORBIDDEN_IN_PROSE.items()
    return next(replacement for words, replacement in rules if re.fullmatch(words, found, re.IGNORECASE))


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of every function, class, variable, argument and attribute defined or assigned in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname
