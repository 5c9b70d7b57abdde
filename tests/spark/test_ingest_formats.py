"""Arrow, datasets folders, text, JSON arrays and bz2 on a real session: every row is a document or a reject, once."""

import bz2
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.ingest import run
from miniplm_udf.config.sections import FieldsConfig
from miniplm_udf.estimate.sample import take_sample
from miniplm_udf.ingestion.inputs import find_inputs
from miniplm_udf.store import tables
from tests.support.ingest_roots import Make


def documents(spark: Any, config: Any) -> dict[str, Any]:
    """Sources of the documents by id."""
    rows = tables.read(spark, config.layout.table("instances")).collect()
    return {document: row.source for row in rows for document in row.document_ids}


def rejects(spark: Any, config: Any) -> list[str]:
    rows = tables.read(spark, config.layout.table("rejects")).collect()
    return sorted(f"{row.source_file.rsplit('/')[-1]} {row.reason}" for row in rows)


def write_arrow(path: Path, ids: list[str], source: str) -> None:
    texts = [f"The text of {name}." for name in ids]
    table = pa.table({"id": ids, "body": texts, "meta": [json.dumps({"set": source})] * len(ids)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, 10)


@pytest.mark.long
def test_a_datasets_folder_is_read_once(spark: Any, make: Make, tmp_path: Path) -> None:
    """Splits, records and caches of `datasets`, a damaged file, a later file, and a replay of the last micro-batch."""
    folder = tmp_path / "in"
    write_arrow(folder / "train/data-00000-of-00001.arrow", [f"a{i}" for i in range(25)], "web")
    write_arrow(folder / "train/cache-1.arrow", ["derived"], "web")
    write_arrow(folder / "test/data-00000-of-00001.arrow", ["t0", "t1"], "books")
    for name in ("dataset_dict.json", "train/state.json", "train/dataset_info.json"):
        (folder / name).write_text("{}")
    write_arrow(folder / "test/cut.arrow", ["c"], "web")
    (folder / "test/cut.arrow").write_bytes((folder / "test/cut.arrow").read_bytes()[:-8])
    config = make(str(folder), fields=FieldsConfig(text="body", source="meta.set"), max_reject_share=0.5)
    summary = run(spark, config)
    assert (summary.documents, summary.rejected, len(summary.left_out)) == (27, 1, 1)
    assert documents(spark, config) == {**{f"a{i}": "web" for i in range(25)}, "t0": "books", "t1": "books"}
    assert rejects(spark, config) == ["cut.arrow unreadable_file"]
    sample = take_sample(spark, find_inputs(spark, config.ingest), config.ingest, 10**6)
    assert (sample.rows.num_rows, len(sample.unreadable)) == (27, 1)

    write_arrow(folder / "train/late.arrow", ["late", "a0"], "web")
    after = run(spark, config)
    assert (after.new_documents, after.duplicates, after.rejected) == (1, 1, 1)
    for name in ("1", ".1.crc"):  # as if the driver had been killed before the end of the micro-batch
        (tmp_path / "root/_checkpoints/ingest-arrow/commits" / name).unlink()
    replayed = run(spark, config)
    assert (replayed.documents, replayed.instances, replayed.rejected) == (28, after.instances, 1)


@pytest.mark.long
def test_text_arrays_and_bz2(spark: Any, make: Make, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    for name in ("en/a.txt", "de/a.txt", "b.txt.bz2", ".git/x.txt", "y/z/1/2/3/4/deep.txt"):
        (texts / name).parent.mkdir(parents=True, exist_ok=True)
        data = f"The text of {name}.".encode()
        (texts / name).write_bytes(bz2.compress(data) if name.endswith(".bz2") else data)
    (texts / "wide.txt").write_text("Sixteen bits.", "utf-16")
    config = make(f"{texts}/**/*.txt*", root="texts-root", max_reject_share=0.5)
    run(spark, config)
    assert sorted(documents(spark, config)) == ["b", "de/a", "en/a", "y/z/1/2/3/4/deep"]
    instances = tables.read(spark, config.layout.table("instances")).collect()
    sources = {row.document_ids[0]: row.source for row in instances}
    assert sources == {"b": "unknown", "de/a": "de", "en/a": "en", "y/z/1/2/3/4/deep": "y"}
    assert rejects(spark, config) == ["wide.txt invalid_utf8"]

    arrays = tmp_path / "arrays"
    arrays.mkdir()
    rows = [{"id": f"r{i}", "doc": {"body": f"Element {i}, [x]."}} for i in range(50)]
    (arrays / "a.json").write_text(json.dumps(rows[:49], indent=1) + "\n")
    (arrays / "b.json").write_text(json.dumps([rows[49], 7]))
    config = make(str(arrays), root="arrays-root", fields=FieldsConfig(text="doc.body"), max_reject_share=0.5)
    run(spark, config)
    assert sorted(documents(spark, config)) == sorted(row["id"] for row in rows)
    assert rejects(spark, config) == ["b.json not_an_object"]

    lines = [json.dumps({"id": f"l{i}", "text": os.urandom(400).hex()}).encode() for i in range(4000)]
    (tmp_path / "l.jsonl.bz2").write_bytes(
        bz2.compress(b"\n".join(lines[:3500])) + bz2.compress(b"\n" + b"\n".join(lines[3500:]))
    )
    config = make(str(tmp_path / "l.jsonl.bz2"), root="bz2-root", split_bytes=500_000)
    run(spark, config)
    assert len(documents(spark, config)) == len(lines)
