"""Names of input files, as far as no JVM is needed."""

import re

import pytest

from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion.formats import format_of
from miniplm_udf.ingestion.listing import GLOB_FILTERS, check_names, escape_glob, left_out, one_path


def test_what_is_left_out_is_named_once() -> None:
    files = [
        "file:/d/_r/x.jsonl", "file:/d/_r/a b.jsonl", "file:/d/_r/n.txt", "file:/d/_r/.git/1", "file:/d/_r/.git/p/2",
        "file:/d/_r/s/_u.jsonl", "file:/d/_r/_k=v/w.jsonl", "file:/d/_r/_SUCCESS", "file:/d/_r/.x.jsonl.crc",
        "file:/d/_r/_delta_log/0.json",
    ]  # fmt: skip
    kept = ["file:///d/_r/x.jsonl", "file:///d/_r/a%20b.jsonl", "file:///d/_r/_k=v/w.jsonl"]
    assert left_out(files, kept) == ("/d/_r/.git/ (2 files)", "/d/_r/n.txt", "/d/_r/s/_u.jsonl")
    assert left_out(["file:/d/_x.jsonl"], []) == ("/d/_x.jsonl",)
    assert left_out([], []) == ()
    assert left_out(["s3a://k:secret@b/_x.jsonl"], []) == ("s3a://b/_x.jsonl",)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.jsonl", "jsonl"), ("X.JSONL", "jsonl"), ("x.NdJson.gz", "jsonl"), ("x.json.zst", "jsonl"),
        ("x.PARQUET", "parquet"), ("x.jsonl.GZ", None), ("x.jsonl.bz2", "jsonl"),
        ("x.txt", "text"), ("X.TXT.zst", "text"), ("x.feather", "arrow"), ("x.csv", None), ("xjsonl", None),
        ("x.parquet.gz", None),
    ],
)  # fmt: skip
def test_the_filter_of_the_stream_takes_what_the_format_says(name: str, kind: str | None) -> None:
    assert format_of(name) == kind
    for known, glob in GLOB_FILTERS.items():
        pattern = glob.replace(".", r"\.").replace("*", ".*").replace("{", "(").replace("}", ")").replace(",", "|")
        assert bool(re.fullmatch(pattern, name)) == (kind == known)


def test_several_paths_are_one_glob() -> None:
    assert one_path(["file:///a/x"]) == "file:///a/x"
    paths = ["file:///a/x,y", "file:///b/{c,d}/*", f"file:///{escape_glob('e[f]')}"]
    assert one_path(paths) == r"file:///{a/x\,y,b/{c,d}/*,e\\\[f\\\]}"
    with pytest.raises(ConfigError, match="on one file system"):
        one_path(["file:///a", "s3a://b/c"])


def test_names_with_a_colon() -> None:
    check_names("file:///d:e", ["file:/d:e/x.jsonl", "s3a://user:key@bucket/x.jsonl"])
    for path, file in (
        ("file:///d", "file:/d/x:y.jsonl"),
        ("file:///d/*", "file:/d/e:f/x"),
        ("file:///d", "file:/d::e/x"),
    ):
        with pytest.raises(ConfigError, match=r"^ingest.input: 1 files have a colon"):
            check_names(path, ["file:/d/good", file])
