"""Which code is at work, for provenance: the package's version, and of a git checkout the commit."""

import functools
import subprocess
from pathlib import Path

from miniplm_udf import __version__

_CHECKOUT = Path(__file__).resolve().parents[1]


@functools.cache
def code_revision() -> str:
    """`0.1.0`; of a checkout `0.1.0+g` and the commit, with `.dirty` behind it where tracked files were changed."""
    if not (_CHECKOUT / ".git").exists():
        return __version__
    describe = ["git", "-C", str(_CHECKOUT), "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=.dirty"]
    try:
        found = subprocess.run(describe, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        # No git here, or a folder of another user's.
        return __version__
    return f"{__version__}+g{found.stdout.strip()}"
