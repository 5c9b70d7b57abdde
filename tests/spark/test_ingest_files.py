"""Files of an input that differ, are damaged, changed or come twice: all is read, or refused by name and counted."""

import gzip
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from jobs.ingest import run
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import ChunkingConfig, FieldsConfig, IngestConfig, ModelConfig, SplitConfig
from miniplm_udf.ingestion import query as ingest_query
from miniplm_udf.ingestion.quarantine import Quarantine
from miniplm_udf.store import tables
from tests.support.ingest_roots import Make


@pytest.fixture
def make(tokenizer_folder: Path, tmp_path: Path) -> Make:
    def configure(path: str, root: str = "root", mode: str = "document", **changes: Any) -> ExperimentConfig:
        return ExperimentConfig(
            root=str(tmp_path / root),
            models={"teacher": ModelConfig(path=str(tokenizer_folder))},
            ingest=IngestConfig(
                input=path,
                chunking=ChunkingConfig(mode=mode, max_tokens=64),
                split=SplitConfig(reference=0, heldout=0),
                state_partitions=2,
                **changes,
            ),
        )

    return configure


def found(spark: Any, config: ExperimentConfig) -> dict[str, tuple[str, Any]]:
    """Source and metadata of each document, by its id."""
    rows = tables.read(spark, config.layout.table("instances")).collect()
    return {row.document_ids[0]: (row.source, row.metadata and json.loads(row.metadata)[0]) for row in rows}


def reasons(spark: Any, config: ExperimentConfig) -> dict[str, str]:
    rows = tables.read(spark, config.layout.table("rejects")).collect()
    return {f"{row.source_file.rsplit('/')[-1]} {row.reason}": row.detail for row in rows}


def write(path: Path, ids: pa.Array, **columns: Any) -> None:
    texts = pa.array([f"Text of {path.stem}, {value}." for value in range(len(ids))])
    pq.write_table(pa.table({"text": texts, "id": ids, **columns}), path)


def test_parquet_columns_that_differ(spark: Any, make: Make, tmp_path: Path) -> None:
    """Every row of every shard is there, with its id as a string, its source and its metadata, whatever their types."""
    folder = tmp_path / "in"
    folder.mkdir()
    unread = {"at": pa.array([1, 2], pa.timestamp("ns")), "half": pa.array(np.array([1, 2], np.float16))}
    write(folder / "a.parquet", pa.array([1, 2], pa.int64()), source=pa.nulls(2), **unread)
    write(folder / "b.parquet", pa.array([3, 4], pa.int32()), source=pa.array(["s", None]))
    sources = pa.array(["s", "t"]).dictionary_encode()
    write(folder / "c.parquet", pa.array(["5", "x"]), source=sources, lang=["en", None])
    write(folder / "d.parquet", pa.array([7, 8], pa.uint64()), lang=pa.array([1.5, 2.0]))
    pq.write_table(pa.table({"text": pa.array([b"Bytes.", b"\xff"]), "id": [9, 10]}), folder / "e.parquet")
    large = pa.array(["Large.", "More."], pa.large_string())
    pq.write_table(pa.table({"text": large, "id": pa.array([11, 12]), "lang": pa.array([{"k": 1}, {"k": None}])}),
                   folder / "f.parquet")  # fmt: skip
    pq.write_table(pa.table({"text": [1, 2], "id": [13, 14]}), folder / "g.parquet")
    config = make(str(folder), fields=FieldsConfig(metadata=["lang"]))
    summary = run(spark, config)
    assert found(spark, config) == {
        "1": ("unknown", {}), "2": ("unknown", {}), "3": ("s", {}), "4": ("unknown", {}),
        "5": ("s", {"lang": "en"}), "x": ("t", {}), "7": ("unknown", {"lang": 1.5}), "8": ("unknown", {"lang": 2.0}),
        "9": ("unknown", {}), "11": ("unknown", {"lang": {"k": 1}}), "12": ("unknown", {"lang": {}}),
    }  # fmt: skip
    refused = reasons(spark, config)
    assert sorted(refused) == ["e.parquet invalid_utf8", "g.parquet unreadable_file"]
    assert "its column 'text' holds no text" in refused["g.parquet unreadable_file"]
    assert refused["e.parquet invalid_utf8"].startswith("row 2: ")
    assert list(summary.unreadable_files.values()) == [2]

    # A later shard with an id of yet another type, in the same query; the rows of old ones under new names.
    write(folder / "h.parquet", pa.array([True, False]))
    (folder / "again.parquet").write_bytes((folder / "c.parquet").read_bytes())
    again = run(spark, config)
    assert (again.new_instances, again.duplicates, again.new_rejected) == (2, 2, 0)
    assert {"true", "false"} < set(found(spark, config))


@pytest.mark.long
def test_splits_of_a_parquet_file_read_by_pyarrow(spark: Any, make: Make, tmp_path: Path) -> None:
    """Packed, with small input splits: a file read by pyarrow gives the instances that Spark's reader gives."""
    ids = pa.array([str(i) for i in range(300)])
    (tmp_path / "in").mkdir()
    table = pa.table({"id": ids, "text": [f"Document {i} says {os.urandom(20).hex()}." for i in range(300)]})
    pq.write_table(table, tmp_path / "in/a.parquet", row_group_size=40, compression="none")
    alone = make(str(tmp_path / "in/a.parquet"), root="alone", mode="packed")
    run(spark, alone)
    numbers = pa.table({"id": pa.array(range(1000, 2000)), "text": [f"Other text {i}." for i in range(1000)]})
    pq.write_table(numbers, tmp_path / "in/b.parquet")
    config = make(str(tmp_path / "in"), root="both", mode="packed")
    run(spark, config)
    ids_of = [
        {r.instance_id for r in tables.read(spark, c.layout.table("instances")).collect()} for c in (alone, config)
    ]
    assert len(ids_of[0]) > 20
    assert ids_of[0] < ids_of[1]


def test_damaged_files(
    spark: Any, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Damaged files are found at once, named in a line each, and weigh what they hold."""
    rows = [json.dumps({"id": f"r{i}", "text": os.urandom(60).hex()}).encode() for i in range(1000)]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.jsonl").write_bytes(b"\n".join(rows[:300]) + b"\n")
    (folder / "two.jsonl.gz").write_bytes(gzip.compress(rows[300] + b"\n") + gzip.compress(rows[301]))
    packed = gzip.compress(b"\n".join(rows))
    (folder / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    frames = zstandard.compress(b"\n".join(rows))
    (folder / "bad.jsonl.zst").write_bytes(frames[:-200] + bytes(100) + frames[-100:])
    (folder / "cut.jsonl.zst").write_bytes(frames[: len(frames) // 2])
    config = make(str(folder), max_reject_share=0.5)
    with caplog.at_level(logging.WARNING, "miniplm"):
        summary = run(spark, config)
    assert summary.documents == 302
    assert summary.rejected == 3
    weights = {path.rsplit("/")[-1]: n_rows for path, n_rows in summary.unreadable_files.items()}
    assert sorted(weights) == ["bad.jsonl.zst", "cut.jsonl.gz", "cut.jsonl.zst"]
    assert 300 < weights["cut.jsonl.gz"] < 700
    assert summary.too_many_rejects
    assert "cut.jsonl.gz" in summary.said
    assert len([r for r in caplog.records if "is left out" in r.getMessage()]) == 3
    assert "Exception" not in capfd.readouterr().err

    # Repaired under another name and taken away under the old one: no weight is left. Changed files are told, by
    # their times or, where these were put back, by their sizes.
    (folder / "cut.jsonl.gz").unlink()
    (folder / "cut.jsonl.zst").unlink()
    (folder / "bad.jsonl.zst").unlink()
    (folder / "whole.jsonl.gz").write_bytes(packed)
    os.utime(folder / "good.jsonl", (1e9, 1e9))
    taken_at = (folder / "two.jsonl.gz").stat().st_mtime_ns
    (folder / "two.jsonl.gz").write_bytes(gzip.compress(rows[302]))
    os.utime(folder / "two.jsonl.gz", ns=(taken_at, taken_at))
    after = run(spark, config)
    assert (after.documents, after.duplicates, after.too_many_rejects) == (1000, 302, False)
    assert [path.rsplit("/")[-1] for path in after.changed_files] == ["good.jsonl", "two.jsonl.gz"]
    assert "good.jsonl" in after.said


@pytest.mark.long
def test_damaged_parquet_files(
    spark: Any, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Footers, codecs and pages: each file in a line, pages of several files in one restart, without a failed task; a
    replay of the micro-batch that they were in adds nothing."""
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [os.urandom(60).hex() for _ in range(500)]
    for i, name in enumerate(("good", "pages1", "pages2", "footer")):
        pq.write_table(pa.table({"text": [f"{i} {text}" for text in texts]}), folder / f"{name}.parquet")
    pq.write_table(pa.table({"text": texts}), folder / "codec.parquet", compression="brotli")
    footer = (folder / "footer.parquet").read_bytes()
    (folder / "footer.parquet").write_bytes(footer[:-30])
    for name in ("pages1", "pages2"):
        data = bytearray((folder / f"{name}.parquet").read_bytes())
        data[4:4000] = bytes(3996)
        (folder / f"{name}.parquet").write_bytes(bytes(data))
    config = make(str(folder), max_reject_share=0.9)
    write = ingest_query.write_batch

    def die_behind(*arguments: Any) -> None:
        write(*arguments)
        raise KeyError("killed between the tables and the checkpoint")

    recovered: list[str] = []
    monkeypatch.setattr(Quarantine, "recover", lambda _, message: recovered.append(message))
    with caplog.at_level(logging.INFO, "miniplm"):
        with monkeypatch.context() as patched:
            patched.setattr(ingest_query, "write_batch", die_behind)
            with pytest.raises(Exception, match="killed between"):
                run(spark, config)
        assert len(recovered) == 1
        summary = run(spark, config)
    assert (summary.documents, summary.new_instances, summary.new_rejected) == (500, 0, 0)
    lines = [r.getMessage() for r in caplog.records if "is left out" in r.getMessage()]
    assert len(lines) == 4
    assert len([r for r in caplog.records if "starting again" in r.getMessage()]) == 1
    assert "Exception in task" not in capfd.readouterr().err
    weights = {path.rsplit("/")[-1]: n_rows for path, n_rows in summary.unreadable_files.items()}
    assert 400 < weights.pop("footer.parquet") < 600
    assert weights == {"codec.parquet": 500, "pages1.parquet": 500, "pages2.parquet": 500}
    assert "codec brotli is not supported" in reasons(spark, config)["codec.parquet unreadable_file"]
