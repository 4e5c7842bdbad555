"""#SBATCH lines: options quoted by sbatch's own rules, and checks of values that become part of them.

sbatch splits a directive at white space; within double quotes a backslash keeps the next character, and an unquoted #
begins a comment. A line break cannot be quoted: it would end the directive, and the rest could be another one.
"""

import re
from pathlib import Path

from megatron_q3n.config import UserError

# minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]], or no limit
TIME = re.compile(r"[0-9]{1,6}(:[0-9]{1,2}){0,2}|[0-9]{1,5}-[0-9]{1,2}(:[0-9]{1,2}){0,2}|UNLIMITED|INFINITE", re.I)
_PLAIN = re.compile(r"[\w@%+=:,./^-]+", re.ASCII)


def directive(option: str) -> str:
    """Return the line of the job script for an option such as --partition=gpu."""
    check_line(option, "job script")
    if _PLAIN.fullmatch(option):
        return f"#SBATCH {option}"
    escaped = re.sub(r'(["\\])', r"\\\1", option)
    return f'#SBATCH "{escaped}"'


def output_pattern(folder: Path) -> str:
    """Return the file name pattern of a job's output: % is doubled in the folder, because sbatch replaces %x."""
    return f"{folder}".replace("%", "%%") + "/slurm-%j.out"


def check_line(text: str, where: str) -> str:
    """Check that a value is one line of printable characters; return it.

    Raises: UserError that names `where`.
    """
    if found := next((c for c in text if not c.isprintable()), None):
        raise UserError(
            f"{where}: {text!r} contains the control character {found!r}, which could add lines to the job script; "
            "write one line of printable characters."
        )
    return text


def check_time(time: str, where: str) -> str:
    """Check a time limit in Slurm's format; return it.

    Raises: UserError that names `where`.
    """
    if not TIME.fullmatch(time):
        raise UserError(
            f"{where}: {time!r} is not a time limit; write [days-]hours:minutes:seconds, minutes, or UNLIMITED."
        )
    return time


def check_folder(folder: Path, where: str) -> Path:
    """Check that job scripts can name a folder; return it.

    A colon separates the folders of PYTHONPATH, and sbatch reads a backslash in an output file name as an instruction.

    Raises: UserError that names `where`.
    """
    check_line(str(folder), where)
    if found := next((c for c in ":\\" if c in str(folder)), None):
        raise UserError(f"{where}: {folder} contains {found!r}, which job scripts cannot name; choose another folder.")
    return folder
