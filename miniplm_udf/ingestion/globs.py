"""Globs as Hadoop writes them: expands `**`, which Hadoop does not know, and matches names as Hadoop does.

Pure functions, except `local_matches`, which lists local folders.
"""

import glob
import itertools
import re
from collections.abc import Iterable

from fsspec.utils import glob_translate

# Hadoop has no other way to leave out hidden folders, such as .git, than by the first character.
_FOLDER = "[!_.]*"
_MAGIC = re.compile(r"[\[\]{}*?\\]")
_BRACES = re.compile(r"(?<!\\)\{([^{}]*)\}")


def has_magic(path: str) -> bool:
    """Whether a path has characters that have a meaning in a glob.

    Args:
        path: a path or glob.
    """
    return bool(_MAGIC.search(path))


def without_braces(path: str) -> list[str]:
    """Returns the globs that a glob of Hadoop stands for, as Python and fsspec read them.

        {a,b}/[^x]\\*  ->  a/[!x][*], b/[!x][*]

    Args:
        path: the glob, which may have alternatives in braces.
    """
    if (braces := _BRACES.search(path)) is None:
        # Hadoop escapes a character by \\ and negates a set by ^.
        return [re.sub(r"\\(.)", r"[\1]", path).replace("[^", "[!")]
    parts = (path[: braces.start()] + part + path[braces.end() :] for part in braces.group(1).split(","))
    return list(itertools.chain.from_iterable(map(without_braces, parts)))


def local_matches(path: str) -> list[str]:
    """Returns the names that a glob matches on this machine.

    Args:
        path: the glob of a local path.
    """
    matches = (glob.glob(each, recursive=True, include_hidden=False) for each in without_braces(path))
    return list(dict.fromkeys(itertools.chain.from_iterable(matches)))


def matching(path: str, names: Iterable[str]) -> list[str]:
    """Returns the names that a glob matches, and those below a folder that it matches.

    Args:
        path: the glob.
        names: names of files, with the names of their folders.
    """
    patterns = [re.compile(glob_translate(each)) for each in without_braces(path)]

    def is_match(name: str) -> bool:
        parts = name.split("/")
        folders = ("/".join(parts[:n]) for n in range(len(parts), 0, -1))
        return any(pattern.match(folder) for folder in folders for pattern in patterns)

    return [name for name in names if is_match(name)]


def is_recursive(path: str) -> bool:
    """Whether a part of a glob is `**`, which stands for any number of folders.

    Args:
        path: a path or glob.
    """
    return "**" in path.split("/")


def start_of_recursion(path: str) -> str:
    """Returns the part of a glob before its first `**`.

    Args:
        path: a glob with a part `**`.
    """
    parts = path.split("/")
    return "/".join(parts[: parts.index("**")])


def expand_recursive(path: str, n_levels: int) -> str:
    """Replaces each part `**` of a glob by 0 to `n_levels` folders; a `**` at the end is the folder before it.

        a/**/*.txt, 2 levels  ->  a/{,[!_.]*/,[!_.]*/[!_.]*/}*.txt

    Args:
        path: the glob, as Hadoop expects it.
        n_levels: most folders that a `**` stands for.

    Returns:
        A glob for Hadoop. Folders whose names begin with `_` or `.` do not match `**`.
    """
    parts = path.split("/")
    while parts[-1] == "**":  # Spark reads everything below a folder
        parts.pop()
    levels = "{" + ",".join(f"{_FOLDER}/" * n for n in range(n_levels + 1)) + "}"
    expanded = "".join(levels if part == "**" else f"{part}/" for part in parts)
    return expanded.removesuffix("/")
