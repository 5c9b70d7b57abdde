"""The file formats of texts, by the ends of file names. Plain data; imports nothing.

`json` is a JSON file that holds one array. Only its content tells it from JSON lines, so it has no names here.
"""

NAMES = {"jsonl": ("jsonl", "ndjson", "json"), "parquet": ("parquet",), "text": ("txt",), "arrow": ("arrow", "feather")}
_PACKED_TEXT = ("", ".gz", ".zst", ".bz2")
PACKED = {"jsonl": _PACKED_TEXT, "parquet": ("",), "text": _PACKED_TEXT, "arrow": ("",)}
SUFFIXES = {
    kind: tuple(f".{name}{packed}" for name in names for packed in PACKED[kind]) for kind, names in NAMES.items()
}
COMPRESSED = tuple(suffix for suffix in _PACKED_TEXT if suffix)
# Formats whose files Spark lists and Python reads, one file at a time.
WHOLE_FILES = ("text", "json", "arrow")
