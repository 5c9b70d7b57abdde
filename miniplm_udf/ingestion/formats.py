"""The file formats of texts, by the ends of file names. Plain data, and the one function that tells a file's format.

`json` is a JSON file that holds one array. Only its content tells it from JSON lines, so it has no names here.
"""

import re

NAMES = {"jsonl": ("jsonl", "ndjson", "json"), "parquet": ("parquet",), "text": ("txt",), "arrow": ("arrow", "feather")}
_PACKED_TEXT = ("", ".gz", ".zst", ".bz2")
PACKED = {"jsonl": _PACKED_TEXT, "parquet": ("",), "text": _PACKED_TEXT, "arrow": ("",)}
SUFFIXES = {
    kind: tuple(f".{name}{packed}" for name in names for packed in PACKED[kind]) for kind, names in NAMES.items()
}
COMPRESSED = tuple(suffix for suffix in _PACKED_TEXT if suffix)
# Formats whose files Spark lists and Python reads, one file at a time.
WHOLE_FILES = ("text", "json", "arrow")
_PATTERNS = {
    kind: re.compile(rf"\.(?i:{'|'.join(names)})({'|'.join(map(re.escape, PACKED[kind]))})$")
    for kind, names in NAMES.items()
}


def format_of(path: str) -> str | None:
    """Returns the format that belongs to a file's suffix: the extension in any case, `.gz` and the like in lower case.

    Args:
        path: path or URI of the file.

    Returns:
        A key of `NAMES`; None for other names.
    """
    return next((kind for kind, pattern in _PATTERNS.items() if pattern.search(path)), None)
