"""Types of settings that name files and folders: absolute once a configuration is validated.

A run's config.yaml is read from other folders and other machines, so it holds no relative path and no `~`. Whatever
walks over the path settings of a configuration finds them by these types (`path_settings`), not by a list of names.
"""

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator

from megatron_q3n.config.section import Section

# begins an expression of a Jinja template
EXPRESSION = "{{"


@dataclass(frozen=True)
class PathMark:
    """Mark of a path setting.

    role: data is trained on or validated with, and like an input exists before the run; an output need not
    """

    role: Literal["data", "input", "output"]

    @property
    def is_read(self) -> bool:
        """Whether the path leads to what a run reads."""
        return self.role != "output"


def absolute(path: str) -> str:
    """Return a path from the root, with `~` expanded; symbolic links and `..` are kept."""
    return str(Path(os.path.expanduser(path)).absolute())


def existing(path: str) -> list[Path]:
    """Return the file or folder of this path, or what it matches as a glob pattern; empty if there is nothing."""
    if Path(path).exists() or not glob.has_magic(path):
        return [Path(path)] if Path(path).exists() else []
    return [Path(match) for match in glob.iglob(path, recursive=True)]


def _checked(path: str) -> str:
    if not path.strip() or "\0" in path:
        raise ValueError("give the path of a file or folder")
    return absolute(path)


def _checked_unless_template(text: str) -> str:
    return text if EXPRESSION in text else _checked(text)


FilePath = Annotated[str, AfterValidator(_checked), PathMark("output")]
InputPath = Annotated[str, AfterValidator(_checked), PathMark("input")]
DataPath = Annotated[str, AfterValidator(_checked), PathMark("data")]
TemplatePath = Annotated[str, AfterValidator(_checked_unless_template), PathMark("input")]


def path_settings(section: Section, prefix: str = "") -> Iterator[tuple[str, str, PathMark]]:
    """Yield the dotted name, value and mark of every path that is set, e.g. ("sft.train.0.path", "/a.jsonl", …)."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        mark = next((m for m in (*field.metadata, *_metadata(field.annotation)) if isinstance(m, PathMark)), None)
        if isinstance(value, Section):
            yield from path_settings(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, Section):
                    yield from path_settings(item, f"{prefix}{name}.{index}.")
                elif mark is not None:
                    yield f"{prefix}{name}.{index}", item, mark
        elif mark is not None and value is not None:
            yield f"{prefix}{name}", value, mark


def _metadata(annotation: Any) -> Iterator[Any]:
    """Yield the metadata of an annotation's members, e.g. of `FilePath | None`."""
    for member in get_args(annotation):
        yield from getattr(member, "__metadata__", ())
