"""Names the existing file or folder that is most like a missing one, for messages about a path of the user.

Input: a local path that may be wrong. Output: a path, or the end of a sentence. Lists at most `_MOST_ENTRIES` entries
of one folder, so that a message about a folder of a million files takes no time. Driver and executors; writes nothing.
"""

import difflib
import itertools
import os
from pathlib import Path

from miniplm_udf import storage
from miniplm_udf.errors import MiniplmError

_MOST_ENTRIES = 10_000
_CUTOFF = 0.6


def did_you_mean(path: str) -> str:
    """Returns `; did you mean 'PATH'?` for a path that does not exist; empty if no name next to it is like it.

    Args:
        path: a local path or `file:` URI, not a glob; it may begin with `~`.
    """
    similar = similar_path(path)
    return f"; did you mean {similar!r}?" if similar else ""


def similar_path(path: str) -> str | None:
    """Returns the path with its first missing name replaced by the name in the same folder that is most like it.

    Args:
        path: a local path or `file:` URI, not a glob; it may begin with `~`.

    Returns:
        An existing path, without the names below it that do not exist; relative if `path` is. None if `path` exists, or
        if no name is like the missing one.
    """
    try:
        place = Path(storage.local_path(storage.to_uri(path)))
        first = next((each for each in [*reversed(place.parents), place] if not each.exists()), None)
        if first is None:
            return None
        with os.scandir(first.parent) as entries:
            names = [entry.name for entry in itertools.islice(entries, _MOST_ENTRIES)]
    except (OSError, ValueError, MiniplmError):
        return None
    if not first.name.startswith("."):
        names = [name for name in names if not name.startswith(".")]
    close = difflib.get_close_matches(first.name, sorted(names), n=1, cutoff=_CUTOFF)
    if not close:
        return None
    similar = first.parent / close[0]
    below = similar / place.relative_to(first)
    existing = below if below.exists() else similar
    return str(existing) if path.startswith(("file:", "~", "/")) else os.path.relpath(existing)
