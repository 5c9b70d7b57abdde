"""Expands `**` in globs, which Hadoop does not know. Pure functions; no file system."""

# Hadoop has no other way to leave out hidden folders, such as .git, than by the first character.
_FOLDER = "[!_.]*"


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
