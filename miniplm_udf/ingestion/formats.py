"""The file formats of texts, by the ends of file names. Plain data; imports nothing."""

NAMES = {"jsonl": ("jsonl", "ndjson", "json"), "parquet": ("parquet",)}
PACKED = {"jsonl": ("", ".gz", ".zst"), "parquet": ("",)}
SUFFIXES = {
    kind: tuple(f".{name}{packed}" for name in names for packed in PACKED[kind]) for kind, names in NAMES.items()
}
