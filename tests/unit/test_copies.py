"""Packed ingest without Spark: rows to documents with places, the choice among copies, packing in their order."""

import itertools
import random
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from miniplm_udf.config.sections import FieldsConfig, SplitConfig
from miniplm_udf.ingestion import copies
from miniplm_udf.ingestion.documents import DocumentReader, content_hash, document_key
from miniplm_udf.ingestion.splits import ChunkingSpec

READER = DocumentReader(FieldsConfig(metadata=["lang"]), "unknown", SplitConfig(reference=0, heldout=0))
SPEC = ChunkingSpec("packed", 4, "0" * 32, "<s>", 1024)


def words(texts: list[str]) -> list[list[tuple[int, int]]]:
    return [[match.span() for match in re.finditer(r"\s*\S+", text)] for text in texts]


def lines(rows: list[tuple[str, int, int, bytes]]) -> Iterator[pa.RecordBatch]:
    """Input batches of two rows: (file, start of the block, modification time, line)."""
    names = ("source_file", "block_start", "modified_micros", "line")
    for i in range(0, len(rows), 2):
        yield pa.RecordBatch.from_pylist([dict(zip(names, row, strict=True)) for row in rows[i : i + 2]])


def read(rows: list[tuple[str, int, int, bytes]]) -> list[dict[str, Any]]:
    return [row for batch in copies.read_documents(lines(rows), READER) for row in batch.to_pylist()]


def test_rows_have_keys_and_places() -> None:
    """Places sort by time first; numbers of rows go on over batches, bad and blank lines, and begin with a split."""
    found = read(
        [
            ("b", 0, 5, b'{"id": "1", "text": "a"}'),
            ("b", 0, 5, b""),
            ("b", 0, 5, b"{"),
            ("b", 0, 5, b'{"text": "a", "lang": "fr"}'),
            ("b", 4096, 5, b'{"id": "1", "text": "a"}'),
            ("a", 0, 12, b'{"id": "1", "text": "b"}'),
            ("c", 0, -7, b'{"id": "2", "text": "a"}'),
        ]
    )
    assert [(row["kind"], row["row"]) for row in found] == [
        ("document", 0), ("reject", 2), ("document", 3), ("document", 0), ("document", 0), ("document", 0),
    ]  # fmt: skip
    places = [row["place"] for row in found]
    assert places[0] == places[1] == places[2]
    assert places[5] < places[0] < places[3] < places[4]
    assert [row["key"] for row in found if row["kind"] == "document"] == [
        document_key("1", "a"), document_key(content_hash("a"), "a"), document_key("1", "a"), document_key("1", "b"),
        document_key("2", "a"),
    ]  # fmt: skip
    assert len({row["key"] for row in found}) == 5
    assert (found[2]["metadata"], found[1]["reason"]) == ('{"lang": "fr"}', "invalid_json")


def test_the_copy_of_the_smallest_place_is_kept_whatever_the_order() -> None:
    """Against a plain loop, over shuffled rows in batches of random sizes."""
    draw = random.Random(1)
    rows = [
        {"key": f"k{draw.randint(0, 40)}", "place": f"{draw.randint(0, 5)}", "row": row, "text": f"text of {row}"}
        for row in range(200)
    ]
    expected: dict[str, dict[str, Any]] = {}
    for row in rows:
        kept = expected.setdefault(row["key"], row)
        if (row["place"], row["row"]) < (kept["place"], kept["row"]):
            expected[row["key"]] = row
    for _ in range(20):
        draw.shuffle(rows)
        bounds = sorted({0, len(rows), *(draw.randint(0, len(rows)) for _ in range(draw.randint(0, 9)))})
        batches = [pa.RecordBatch.from_pylist(rows[a:b]) for a, b in itertools.pairwise(bounds)]
        kept_rows = [row for batch in copies.first_copies(iter(batches)) for row in batch.to_pylist()]
        assert sorted(kept_rows, key=lambda row: row["key"]) == sorted(expected.values(), key=lambda row: row["key"])
    assert list(copies.first_copies(iter([]))) == []


def test_documents_are_packed_by_place_and_name_the_instance_they_begin_in() -> None:
    texts = {"1": "a b", "2": "c d e f g", "3": "i"}
    rows = [("f", 0, 1, f'{{"id": "{id}", "text": "{text}"}}'.encode()) for id, text in texts.items()]
    rows += [("f", 99, 1, b'{"id": "4", "text": "j"}')]
    packed = [
        row
        for batch in copies.pack_documents(copies.read_documents(lines(rows), READER), words, SPEC)
        for row in batch.to_pylist()
    ]
    instances = [row for row in packed if row["kind"] == "instance"]
    assert [(row["document_ids"], row["text"]) for row in instances] == [
        (["1"], "a b"), (["2"], "c d e f"), (["2", "3"], " gi"), (["4"], "j"),
    ]  # fmt: skip
    begins = {row["key"]: row["instance_id"] for row in packed if row["kind"] == "document"}
    ids = [row["instance_id"] for row in instances]
    assert begins == {
        document_key("1", "a b"): ids[0], document_key("2", texts["2"]): ids[1], document_key("3", "i"): ids[2],
        document_key("4", "j"): ids[3],
    }  # fmt: skip


def test_many_documents_come_out_in_bounded_batches() -> None:
    rows = [("f", 0, 1, f'{{"id": "{i}", "text": "a b c"}}'.encode()) for i in range(2500)]
    batches = list(copies.read_documents(lines(rows), READER))
    assert [batch.num_rows for batch in batches] == [1000, 1000, 500]
    packed = list(copies.pack_documents(iter(batches), words, SPEC))
    assert max(batch.num_rows for batch in packed) <= 1002
    assert sum(batch.num_rows for batch in packed) == 5000
