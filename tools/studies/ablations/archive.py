"""Archive of the records of studies, for --publish on another machine than the one with the GPU."""

import tarfile
from collections.abc import Iterable
from pathlib import Path

EXCLUDED = {"checkpoints", "wandb"}
# written again from the records
EXCLUDED_SUFFIXES = {".html", ".png", ".md"}


def pack(path: Path, folders: Iterable[Path]) -> int:
    """Write the studies' folders into one .tar.xz, to be unpacked into runs/. Returns: its size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:xz", preset=2) as archive:
        for folder in folders:
            if folder.is_dir():
                archive.add(folder, folder.name, filter=_filter)
    return path.stat().st_size


def _filter(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    name = Path(member.name)
    is_excluded = name.name in EXCLUDED or name.suffix in EXCLUDED_SUFFIXES
    return None if is_excluded or member.issym() else member
