"""Which code runs, for provenance: the package's version, and the commit where the code is a git checkout.

Output: strings. Runs each git command once in a process. On the driver and in the trainer.
"""

import functools
import subprocess
from pathlib import Path

from miniplm_udf import __version__

_CHECKOUT = Path(__file__).resolve().parents[1]


@functools.cache
def code_revision() -> str:
    """The revision of the running code.

    Returns:
        `0.1.0`; in a git checkout `0.1.0+g<commit>`, followed by `.dirty` if tracked files have changes.
    """
    described = _git("describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=.dirty")
    return __version__ if described is None else f"{__version__}+g{described}"


@functools.cache
def code_commit() -> str | None:
    """The commit of the running code, 40 hexadecimal digits; None outside a git checkout."""
    return _git("rev-parse", "HEAD")


def _git(*arguments: str) -> str | None:
    """The output of a git command in the checkout; None if the code is in none, or git fails."""
    if not (_CHECKOUT / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(_CHECKOUT), *arguments], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        # git is not installed, or refuses a folder that belongs to another user.
        return None
    return result.stdout.strip()
