"""docs/evidence.md holds a place for each study, between two comments; here a study's table and picture go there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_q3n.config import UserError

PAGE = Path(__file__).resolve().parents[3] / "docs" / "evidence.md"
PICTURES = "evidence"  # a folder beside the page
EMPTY = "not measured yet"


def place(study: str) -> tuple[str, str]:
    """Return the comments before and behind a study's place."""
    return f"<!-- results of {study} -->", f"<!-- end of {study} -->"


def picture_of(study: str) -> str:
    """Return a study's picture as the page names it."""
    return f"{PICTURES}/{study}.png"


def fill(study: str, text: str, picture: Path, page: Path = PAGE) -> None:
    """Put a study's table in its place, and its picture beside the page.

    Raises: UserError if the page has no such place.
    """
    begin, end = place(study)
    before, found_begin, rest = page.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise UserError(f"{page} has no place for {study}: add the lines {begin} and {end} where its results belong.")
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")
    target = page.parent / picture_of(study)
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(picture, target)


def publish(study: str, output: Path, markdown: Callable[[Any, str], str]) -> None:
    """Put a folder's results.json, as `markdown` words it, and its picture into the page.

    Raises: UserError if there are none, or the page has no place for them.
    """
    path, picture = output / "results.json", output / f"{study}.png"
    if not (path.is_file() and picture.is_file()):
        raise UserError(f"{output} holds no {path.name} with {picture.name}: run the study first.")
    fill(study, markdown(json.loads(path.read_text()), picture_of(study)), picture)
    print(PAGE)
