"""Rows to documents or rejects, the split rule, the ids; what ingest makes of them and says of their counts."""

import dataclasses
import json
import logging
from typing import Any

import pyarrow as pa
import pytest

from miniplm_udf.config.experiment import ExperimentConfig, fingerprint
from miniplm_udf.config.sections import ChunkingConfig, FieldsConfig, IngestConfig, ModelConfig, SplitConfig
from miniplm_udf.ingestion.documents import (
    REJECT_REASONS,
    Document,
    DocumentReader,
    Reject,
    content_hash,
    hash_parts,
    instance_id,
    split_of,
)
from miniplm_udf.ingestion.field_checks import _line_keys
from miniplm_udf.ingestion.inputs import Inputs
from miniplm_udf.ingestion.listing import InputFile
from miniplm_udf.ingestion.quarantine import UnreadableFile, quarantine_id
from miniplm_udf.ingestion.splits import ChunkingSpec, ingest_batches
from miniplm_udf.ingestion.summary import TableCounts, summarize, warn_of_empty_splits

READER = DocumentReader(FieldsConfig(metadata=["lang"]), "unknown", SplitConfig(reference=0, heldout=0))


def test_a_good_line() -> None:
    found = READER.read_line('{"id": "x", "text": "héllo", "source": "web", "lang": "fr", "other": 1}'.encode())
    assert isinstance(found, Document)
    assert (found.document_id, found.text, found.source, found.split) == ("x", "héllo", "web", "pool")
    assert json.loads(found.metadata or "") == {"lang": "fr"}


def test_id_and_source_are_optional_and_need_not_be_strings() -> None:
    found = READER.read_line(b'\xef\xbb\xbf{"text": "a"}')
    assert isinstance(found, Document)
    assert (found.document_id, found.source, found.metadata) == (content_hash("a"), "unknown", "{}")
    found = READER.read_line(b'{"id": 7, "text": "a", "source": null}')
    assert isinstance(found, Document)
    assert (found.document_id, found.source) == ("7", "unknown")


def test_fields_of_nested_objects() -> None:
    """A key spelled with the dot comes first; an object on the way that is none, or null, has no such field."""
    fields = FieldsConfig(id="meta.key", text="body.text", source="meta.set.name", metadata=["meta.lang", "meta.none"])
    reader = DocumentReader(fields, "unknown", SplitConfig(reference=0, heldout=0))
    row = {"body": {"text": "a"}, "meta": {"key": 7, "set.name": "web", "lang": "fr"}}
    found = reader.read_line(json.dumps(row).encode())
    assert isinstance(found, Document)
    assert (found.document_id, found.text, found.source) == ("7", "a", "web")
    assert json.loads(found.metadata or "") == {"meta.lang": "fr"}
    found = reader.read_line(json.dumps({**row, "body.text": "literal", "meta": "none"}).encode())
    assert isinstance(found, Document)
    assert (found.text, found.source, found.metadata) == ("literal", "unknown", "{}")
    for bad in ({"body": "a"}, {"body": None}, {"body": {"text": None}}, {"body.text": None, "body": {"text": "a"}}):
        refused = reader.read_line(json.dumps(bad).encode())
        assert isinstance(refused, Reject)
        assert refused.reason == "missing_text"


def test_keys_of_the_first_lines_are_dotted() -> None:
    lines = [b'{"a": {"b": {"c": 1}, "d.e": 2}, "f": [{"g": 3}]}', b"[1]", b"{", b'{"a": 1}']
    batch = pa.RecordBatch.from_pydict({"line": pa.array(lines, pa.binary())})
    (found,) = _line_keys([batch])
    assert [sorted(keys) for keys in found.column(0).to_pylist()] == [
        ["a", "a.b", "a.b.c", "a.d.e", "f"],
        [],
        [],
        ["a"],
    ]


@pytest.mark.parametrize("line", [b"", b"   ", b"\r", b"\xef\xbb\xbf"])
def test_blank_lines_are_nothing(line: bytes) -> None:
    assert READER.read_line(line) is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "invalid_utf8"),
        (b'{"text": "\xed\xa0\x80"}', "invalid_utf8"),
        (b'{"text": "\\ud800"}', "invalid_utf8"),
        (b'{"text": "a", "id": "\\udc00"}', "invalid_utf8"),
        (b'{"text": "a", "lang": "\\udc00"}', "invalid_utf8"),
        (b'{"text": "a\0"}', "nul_byte"),
        (b'{"text": "a\\u0000"}', "nul_byte"),
        (b'{"text": "a"', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"text": "a", "lang": ' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}", "invalid_json"),
        (b'{"text": "a", "text": "b"}', "invalid_json"),
        (b'{"text": "a", "lang": [{"b": {"c": 1, "d": 2, "c": 1}}]}', "invalid_json"),
        (b'{"text": "a", "other": {"\u0061": 1, "a": 1}}', "invalid_json"),
        (b"3", "not_an_object"),
        (b"NaN", "not_an_object"),
        (b"[]", "not_an_object"),
        (b"{}", "missing_text"),
        (b'{"text": null}', "missing_text"),
        (b'{"text": ["a"]}', "text_not_string"),
        (b'{"text": NaN}', "text_not_string"),
        (b'{"text": 1e999}', "text_not_string"),
        (b'{"text": ""}', "empty_text"),
    ],
)
def test_bad_lines(line: bytes, reason: str) -> None:
    found = READER.read_line(line)
    assert isinstance(found, Reject)
    assert found.reason == reason
    assert found.reason in REJECT_REASONS
    assert found.raw == line
    assert found.detail


@pytest.mark.parametrize(
    "field",
    [b'{"a":' * 499 + b"1" + b"}" * 499, b"[" + b"[1]," * 600 + b"1]", b'"' + b'[{\\"' * 600 + b'"'],
    ids=["deep", "many", "in a text"],
)
def test_lines_with_many_brackets_that_are_not_too_deep(field: bytes) -> None:
    document = READER.read_line(b'{"text": "a", "lang": ' + field + b"}")
    assert isinstance(document, Document), document


def strict(text: str) -> Any:
    """The parsed text, by a reader that takes no more than RFC 8259 has."""

    def refuse(literal: str) -> None:
        raise ValueError(literal)

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_no_json_are_carried_as_strings() -> None:
    """Numbers that overflow a double too; other numbers keep all digits that a double or an integer has."""
    literals = ["NaN", "Infinity", "-Infinity", "1e999", "-1e400"]
    line = f'{{"id": NaN, "source": -Infinity, "text": "a", "lang": {{"x": [{", ".join(literals)}], "NaN": 1}}}}'
    found = READER.read_line(line.encode())
    assert isinstance(found, Document)
    assert (found.document_id, found.source) == ("NaN", "-Infinity")
    assert strict(found.metadata or "") == {"lang": {"x": literals, "NaN": 1}}
    numbers = "[0, -0.0, 12345678901234567890123, 9007199254740993, 1.7976931348623157e+308, 5e-324, 0.1]"
    found = READER.read_line(f'{{"text": "a", "lang": {numbers}, "id": 12345678901234567890123}}'.encode())
    assert isinstance(found, Document)
    assert found.metadata == f'{{"lang": {numbers}}}'
    assert found.document_id == "12345678901234567890123"
    named = READER.read_line(b'{"text": "a", "id": [NaN, 1e999]}')
    assert isinstance(named, Document)
    assert strict(named.document_id) == ["NaN", "1e999"]


def test_what_is_wrong_with_a_duplicate_key_is_said() -> None:
    found = READER.read_line(b'{"text": "a", "meta": {"x": 1, "y": 2, "y": 3}}')
    assert isinstance(found, Reject)
    assert found.detail == "ValueError: duplicate key 'y': expected each key of an object once"


def test_columns_of_a_table() -> None:
    found = READER.read_columns("é".encode(), b"1", None, '{"lang":"fr"}')
    assert isinstance(found, Document)
    assert (found.document_id, found.text, found.source, found.metadata) == ("1", "é", "unknown", '{"lang":"fr"}')
    for text, id, reason in (
        (None, b"1", "missing_text"),
        (b"", b"1", "empty_text"),
        (b"\xff", b"1", "invalid_utf8"),
        (b"a", b"\xff", "invalid_utf8"),
        (b"a\0", b"1", "nul_byte"),
    ):
        refused = READER.read_columns(text, id, None, None)
        assert isinstance(refused, Reject)
        assert refused.reason == reason


def test_split_shares_and_stability() -> None:
    """Shares are met; a text's copies agree; a share that grows moves texts out of pool only."""
    texts = [f"text number {i}" for i in range(20_000)]
    small, large = SplitConfig(reference=0.2, heldout=0.1), SplitConfig(reference=0.3, heldout=0.25)
    before = [split_of(text, small) for text in texts]
    after = [split_of(text, large) for text in texts]
    assert abs(before.count("reference") / len(texts) - 0.2) < 0.01
    assert abs(before.count("heldout") / len(texts) - 0.1) < 0.01
    moved = {(a, b) for a, b in zip(before, after, strict=True) if a != b}
    assert moved == {("pool", "reference"), ("pool", "heldout")}
    assert [split_of(f"  text\n\tnumber {i} ", small) for i in range(20_000)] == before


def test_ids_tell_what_they_are_made_of() -> None:
    base = instance_id(["a"], 0, "t", "s")
    others = [
        instance_id(["b"], 0, "t", "s"),
        instance_id(["a"], 1, "t", "s"),
        instance_id(["a"], 0, "u", "s"),
        instance_id(["a"], 0, "t", "r"),
        instance_id(["a", "0"], 0, "t", "s"),
    ]
    assert len({base, *others}) == 6
    assert len(base) == 32
    assert hash_parts("ab", "c") != hash_parts("a", "bc")
    # Golden: ids stay the same over releases, or every corpus would be scored again.
    assert content_hash("a text") == "ab40b77b2c8732c10b8fa11079a67ae6"
    assert base == "b79265bf1f6ab3e48ec8c1af2ae49abc"


# --- ingest ---


def ingested(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs `ingest_batches` on rows of a table, two rows per batch; each text is one token."""
    types = {"text": pa.binary(), "id": pa.binary(), "source": pa.binary(), "metadata": pa.string()}
    schema = pa.schema([*types.items(), ("source_file", pa.string()), ("block_start", pa.int64())])
    batches = [pa.RecordBatch.from_pylist(rows[i : i + 2], schema) for i in range(0, len(rows), 2)]
    spec = ChunkingSpec("document", 8, "0" * 32, None, None)
    made = ingest_batches(iter(batches), lambda texts: [[(0, len(text))] for text in texts], READER, spec)
    return [row for batch in made for row in batch.to_pylist()]


def test_ids_of_document_chunking_stay() -> None:
    """Golden, printed by the release before packed chunking took each document once: its roots go on."""
    spec = ChunkingSpec.of(
        IngestConfig(chunking=ChunkingConfig(mode="document", max_tokens=8)), ModelConfig(path="m"), "0" * 32
    )
    assert fingerprint(spec) == "ba3e63d290fc9392bf25258e7b90b557"
    rows = [{"text": b"One. Two", "id": id, "source_file": "f", "block_start": 0} for id in (b"1", b"1", None)]
    named, hashed = "7e3c83dc6ef7b0c9eab2e2c8df05a247", "fd62511673047fd4c62d4046f93b76bd"
    assert [row["key"] for row in ingested(rows)] == [named, named, hashed]


def test_each_bad_row_is_its_own_reject_and_the_same_when_read_again() -> None:
    """Null and empty texts have no bytes to tell them apart: their place in the input does."""
    rows = [
        {"text": text, "source_file": file, "block_start": start}
        for file in ("a", "b")
        for start in (0, 128)
        for text in (None, b"", None, b"good", b"", None)
    ]
    first = ingested(rows)
    rejects = [row for row in first if row["kind"] == "reject"]
    assert len(rejects) == len({row["key"] for row in rejects}) == 20
    # The same splits in another order, as of a retry with other tasks: the same ids.
    again = ingested(rows[12:] + rows[:12])
    assert {row["key"] for row in again} == {row["key"] for row in first}


def test_a_reject_says_where_its_row_is() -> None:
    """The number in its file; in a later part of a large file, the number after the byte where that part begins."""
    bad, good = None, b"good"
    rows = [
        {"text": text, "source_file": file, "block_start": start}
        for file, start, texts in (("a", 0, [good, bad]), ("a", 128, [bad, good, good, bad]), ("b", 0, [bad]))
        for text in texts
    ]
    details = [row["detail"].partition(": ")[0] for row in ingested(rows) if row["kind"] == "reject"]
    assert details == ["row 2", "row 1 after byte 128", "row 4 after byte 128", "row 1"]


def counts(instances: dict[str, int], documents: int, n_rejects: int = 0, **unreadable: Any) -> TableCounts:
    return TableCounts(instances, {"empty_text": n_rejects}, documents, 100 * documents, unreadable.get("files", []), 0)


def test_rejects_are_a_share_of_documents() -> None:
    """Ten bad rows and ten documents are a share of one half, however many instances the documents are cut into."""
    config = ExperimentConfig(root="/r", ingest=IngestConfig(max_reject_share=0.4))
    none = counts({}, 0)
    found = summarize(config, Inputs("jsonl", "/x"), none, counts({"pool": 1000}, 10, 10), 10, [])
    assert (found.documents, found.instances, found.too_many_rejects) == (10, 1000, True)
    # Packed, an instance holds many documents.
    found = summarize(config, Inputs("jsonl", "/x"), none, counts({"pool": 1}, 90, 10), 97, ["/x/b.jsonl"])
    assert found.too_many_rejects is False
    assert found.duplicates == 7
    assert found.said == (
        "ingest: table read; 90 documents (90 new) in 1 instances (1 new); 7 documents were duplicates; "
        "10 rejects (empty_text 10); changed after they were taken, not read again: b.jsonl"
    )


def test_an_unreadable_file_weighs_what_it_holds() -> None:
    """A lost shard of 900 rows with 100 documents is too much; gone from the input, it is one row."""
    config = ExperimentConfig(root="/r", ingest=IngestConfig(max_reject_share=0.4))
    shard = InputFile("file:/x/shard.gz", 1, 5000)
    row = UnreadableFile(quarantine_id(shard), shard.path, 5000, "cut; rows: 900")
    after = counts({"pool": 100}, 100, 1, files=[row])
    found = summarize(config, Inputs("jsonl", "/x", files=(shard,)), counts({}, 0), after, 100, [])
    assert (found.rejected, found.unreadable_files, found.too_many_rejects) == (1, {shard.path: 900}, True)
    assert "about 900 rows: shard.gz" in found.said
    assert "90.0% of the rows were refused, more than ingest.max_reject_share=0.4" in found.said
    found = summarize(config, Inputs("jsonl", "/x"), counts({}, 0), after, 100, [])
    assert (found.unreadable_files, found.too_many_rejects) == ({}, False)
    # Where rows could not be counted: its bytes over a document's.
    assert dataclasses.replace(row, detail="damaged").n_rows(100.0) == 50
    assert dataclasses.replace(row, detail=None, n_bytes=3).n_rows(100.0) == 1


def test_an_empty_split_is_said(caplog: pytest.LogCaptureFixture) -> None:
    config = ExperimentConfig(root="/r", ingest=IngestConfig(split=SplitConfig(reference=0.2, heldout=0)))
    with caplog.at_level(logging.WARNING, logger="miniplm"):
        for found in ({"pool": 3}, {"pool": 3, "reference": 1}):
            summary = summarize(config, Inputs("jsonl", "/x"), counts({}, 0), counts(found, 3), 3, [])
            warn_of_empty_splits(config, summary)
    assert len(caplog.records) == 1
    assert "split reference is empty: none of 3 documents" in caplog.text
    assert "raise ingest.split.reference" in caplog.text
