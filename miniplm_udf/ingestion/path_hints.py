"""Tells a user whose path matches no file what would match: the same pattern in deeper folders, or a similar name.

Input: a local path, folder or glob as the config has it. Output: the end of a sentence. Reads names only, and at most
`_MOST_ENTRIES` of them, so that the message takes no time over millions of files. Driver only; writes nothing.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator

from miniplm_udf import storage
from miniplm_udf.errors import MiniplmError
from miniplm_udf.ingestion import globs
from miniplm_udf.ingestion.input_files import is_hidden
from miniplm_udf.similar_paths import did_you_mean, similar_path

_MOST_ENTRIES = 10_000


def path_hint(path: str) -> str:
    """Returns a hint for a path that matches no file, with `; ` in front; empty if nothing similar is found.

    Args:
        path: a path, folder or glob; a path that is not local has no hint.
    """
    if not storage.is_local(path):
        return ""
    if not globs.has_magic(path):
        return did_you_mean(path)
    parts = path.rstrip("/").split("/")
    n_fixed = next(n for n, part in enumerate(parts) if globs.has_magic(part))
    folder = "/".join(parts[:n_fixed])
    if folder and (similar := similar_path(folder)) is not None:
        return f"; did you mean {'/'.join([similar, *parts[n_fixed:]])!r}?"
    with contextlib.suppress(OSError, ValueError, MiniplmError):
        return _deeper_hint(parts, n_fixed)
    return ""


def _deeper_hint(parts: list[str], n_fixed: int) -> str:
    """The hint that a glob, of which so many parts are no globs, matches files in deeper folders."""
    if "**" in parts:
        return ""
    start = "/".join(parts[:n_fixed]) or ("/" if n_fixed else ".")
    entries = list(itertools.islice(_entries_below(_absolute(start)), _MOST_ENTRIES))
    names = [entry.path for entry in entries if entry.is_file()]
    # A `**` stands for no folder too, so the second pattern also matches files in fewer folders.
    for kept in (parts[:-1], parts[:n_fixed]):
        pattern = "/".join([*kept, "**", parts[-1]])
        if n_matches := len(globs.matching(_absolute(pattern), names)):
            at_least = "at least " * (len(entries) == _MOST_ENTRIES)
            return f"; {pattern} matches {at_least}{n_matches:,} file{'s' * (n_matches > 1)}"
    return ""


def _absolute(path: str) -> str:
    return storage.local_path(storage.to_uri(path)) or "/"


def _entries_below(folder: str) -> "Iterator[os.DirEntry[str]]":
    """The files and folders in a folder and below it that Spark does not hide, the nearest first."""
    waiting = [folder]
    while waiting:
        below: list[str] = []
        for place in waiting:
            with contextlib.suppress(OSError), os.scandir(place) as entries:
                for entry in entries:
                    if not is_hidden(entry.name):
                        below += [entry.path] * entry.is_dir(follow_symlinks=False)
                        yield entry
        waiting = below
