"""Prose of the repository's files, for the tests that check it: Markdown, docstrings, comments, and string literals."""

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Prose:
    """A piece of text and the line where it begins. `is_literal`: a string of the code instead of prose."""

    line: int
    text: str
    is_literal: bool = False


def prose_of(path: str, text: str) -> Iterator[Prose]:
    """Yield the prose of a Markdown or Python file; of tests no literals, which contain wrong names on purpose."""
    if path.endswith(".md"):
        yield Prose(1, text)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield Prose(token.start[0], token.string)
    docstrings, is_test = set(), path.startswith("tests/")
    for node in ast.walk(ast.parse(text)):
        # a string that is a statement: a docstring, also of an attribute
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.add(node.value)
            yield Prose(node.value.lineno, node.value.value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings and not is_test:
            yield Prose(node.lineno, node.value, is_literal=True)
