"""Which code runs, for provenance: the package's version, and the commit where the code is a git checkout.

Output: one string. Runs `git describe` once in a process. On the driver and in the trainer.
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
    if not (_CHECKOUT / ".git").exists():
        return __version__
    describe = ["git", "-C", str(_CHECKOUT), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=.dirty"]
    try:
        result = subprocess.run(describe, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        # git is not installed, or refuses a folder that belongs to another user.
        return __version__
    return f"{__version__}+g{result.stdout.strip()}"
