"""The records of studies as one file: what --publish needs, on a machine without the GPU."""

import tarfile
from collections.abc import Iterable
from pathlib import Path

LEFT_OUT = {"checkpoints", "wandb"}
LEFT_OUT_ENDINGS = {".html", ".png", ".md"}  # made again from the rest


def pack(path: Path, folders: Iterable[Path]) -> int:
    """Write the studies' folders into one .tar.xz, to be unpacked into runs/. Returns: its size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:xz", preset=2) as archive:
        for folder in folders:
            if folder.is_dir():
                archive.add(folder, folder.name, filter=_kept)
    return path.stat().st_size


def _kept(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    name = Path(member.name)
    left_out = name.name in LEFT_OUT or name.suffix in LEFT_OUT_ENDINGS
    return None if left_out or member.issym() else member
