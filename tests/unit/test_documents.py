"""Rows to documents or rejects, the split rule, the ids."""

import json

import pytest

from miniplm_udf.config import FieldsConfig, SplitConfig
from miniplm_udf.documents import (
    REJECT_REASONS,
    Document,
    DocumentReader,
    Reject,
    content_hash,
    hash_parts,
    instance_id,
    split_of,
)

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
        (b"3", "not_an_object"),
        (b"[]", "not_an_object"),
        (b"{}", "missing_text"),
        (b'{"text": null}', "missing_text"),
        (b'{"text": ["a"]}', "text_not_string"),
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
    # Golden: ids stay the same over releases, or every corpus would be scored anew.
    assert content_hash("a text") == "ab40b77b2c8732c10b8fa11079a67ae6"
    assert base == "b79265bf1f6ab3e48ec8c1af2ae49abc"
