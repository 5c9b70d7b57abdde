"""Names of input files on a real session: each file is read, named as left out, or refused before the first stage."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from miniplm_udf.config.sections import IngestConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.estimate.sample import take_sample
from miniplm_udf.ingestion import query as ingest_query
from miniplm_udf.ingestion.inputs import find_inputs
from miniplm_udf.store import tables
from tests.support.ingest_roots import Make

READ = [
    "x.jsonl", "Y.JSONL", "Z.Json.gz", "source=web/w.jsonl", "_a=b.jsonl", "a[x].jsonl", "c,d.jsonl", "{e,f}.jsonl",
    "g*h?.jsonl",
    "i\\j.jsonl", "${HOME}.jsonl", "a%25b#c?d&e;f.jsonl", "line\nfeed\t.jsonl", "ä ü 😀'\"`.jsonl", "-.jsonl",
]  # fmt: skip
LEFT_OUT = ["_u.jsonl", ".h.jsonl", "n.txt", "s.csv", "v.jsonl.GZ"]
UNNAMED = ["_SUCCESS", ".x.jsonl.crc", "_committed_1", "_temporary/0/t.jsonl", "empty.jsonl"]


def deliver(folder: Path, names: list[str]) -> None:
    """Files of one document each, whose id is the file's name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"id": name, "text": f"The text of {name}."}).encode()
        path.write_bytes(
            gzip.compress(line) if name.lower().endswith(".gz") else b"" if name == "empty.jsonl" else line
        )


def test_every_file_is_read_or_named(spark: Any, make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    deliver(folder, [*READ, *LEFT_OUT, *UNNAMED, "sub/_raw/a.jsonl", "sub/_raw/b/c.jsonl"])
    config = make(str(folder))
    inputs = find_inputs(spark, config.ingest)
    assert len(inputs.files) == len(READ)
    assert list(inputs.left_out) == sorted(
        [*(f"{folder}/{name}" for name in LEFT_OUT), f"{folder}/sub/_raw/ (2 files)"]
    )
    sample = take_sample(spark, inputs, config.ingest, 10**6)
    assert (sample.rows.num_rows, sample.unreadable) == (len(READ), {})
    summary = ingest_query.ingest(spark, config)
    assert (summary.documents, summary.rejected) == (len(READ), 0)
    rows = tables.read(spark, config.layout.table("instances")).select("document_ids").collect()
    assert sorted(document for row in rows for document in row[0]) == sorted(READ)
    # Names that are also globs, alone and in a list, which the stream reads as one glob.
    for given in (["a[x].jsonl"], ["{e,f}.jsonl"], ["i\\j.jsonl"], ["${HOME}.jsonl"], ["sub/_raw/a.jsonl"],
                  ["a[x].jsonl", "c,d.jsonl", "{e,f}.jsonl", "i\\j.jsonl"], ["a[x].jsonl", "{x,Y}.*"]):  # fmt: skip
        found = find_inputs(spark, IngestConfig(input=[str(folder / name) for name in given]))
        read = spark.read.option("recursiveFileLookup", "true").text(found.path).inputFiles()
        assert len(found.files) == len(read) == len(given) + ("{x,Y}.*" in given), given


def test_names_that_cannot_be_read_are_refused(spark: Any, tmp_path: Path) -> None:
    deliver(
        tmp_path, ["time/crawl_10:00:00.jsonl", "fold:er/x.jsonl", "fold:er/y.jsonl", "a::b/x.jsonl", "raw/_x.jsonl"]
    )
    write_deltalake(tmp_path / "tables" / "scores", pa.table({"text": ["a"]}))
    cases = {
        "time": "1 file.* have a colon in their name.*crawl_10:00:00.jsonl.*rename",
        "time/crawl_10:00:00.jsonl": "have a colon in their name",
        "time/*.jsonl": "cannot be listed: .*crawl_10:00:00.jsonl; a glob cannot pass a name with a colon",
        "fold:er/*.jsonl": "cannot be listed: .*fold:er; a glob cannot pass a name with a colon",
        "a::b": "have a colon in their name",
        "raw": r"matches no file that Spark reads; names that begin with _ or \. .*: .*/raw/_x\.jsonl; rename",
        "raw/_x.jsonl": r"names that begin with _ or \. are hidden from it: .*/raw/_x\.jsonl",
        "tables": "found files of the Delta table .*/tables/scores; set ingest.input=",
        "tables/scores/*.parquet": "expected a Delta table, found files of one, .*; name the table's folder",
        "a[x": "cannot be listed: Illegal file pattern",
        "none": "matches no file; relative paths are taken from",
        "tim": "matches no file; relative paths are taken from .*; did you mean '.*/time'?",
    }
    for given, message in cases.items():
        with pytest.raises(ConfigError, match=f"^ingest.input: .*{message}"):
            find_inputs(spark, IngestConfig(input=str(tmp_path / given)))
    with pytest.raises(ConfigError, match="2 files have a colon in their name or in the name of a folder"):
        find_inputs(spark, IngestConfig(input=[str(tmp_path / "fold:er" / name) for name in ("x.jsonl", "y.jsonl")]))
    assert len(find_inputs(spark, IngestConfig(input=str(tmp_path / "fold:er"))).files) == 2
