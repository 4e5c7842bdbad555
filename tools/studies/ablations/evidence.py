"""Publication of results in docs/evidence.md: each study's table and figure, between two comments with its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_q3n.config import UserError

PAGE = Path(__file__).resolve().parents[3] / "docs" / "evidence.md"
# a folder beside the page
PICTURES = "evidence"
EMPTY = "not measured yet"


def markers(study: str) -> tuple[str, str]:
    """Return the comments before and after a study's results."""
    return f"<!-- results of {study} -->", f"<!-- end of {study} -->"


def picture_of(study: str) -> str:
    """Return the path of a study's figure, relative to the page."""
    return f"{PICTURES}/{study}.png"


def fill(study: str, text: str, picture: Path, page: Path = PAGE) -> None:
    """Write a study's table between its comments, and its figure beside the page.

    Raises: UserError if the page lacks these comments.
    """
    begin, end = markers(study)
    before, found_begin, rest = page.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise UserError(f"{page} has no place for {study}: add the lines {begin} and {end} where its results belong.")
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")
    target = page.parent / picture_of(study)
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(picture, target)


def publish(study: str, output: Path, markdown: Callable[[Any, str], str]) -> None:
    """Write a folder's results.json, formatted by `markdown`, and its figure into the page.

    Raises: UserError if either is missing, or the page lacks the study's comments.
    """
    path, picture = output / "results.json", output / f"{study}.png"
    if not (path.is_file() and picture.is_file()):
        raise UserError(f"{output} does not contain {path.name} and {picture.name}: run the study first.")
    fill(study, markdown(json.loads(path.read_text()), picture_of(study)), picture)
    print(PAGE)
