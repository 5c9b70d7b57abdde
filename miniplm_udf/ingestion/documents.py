"""Documents: what one input row says, or why it is refused; the split of a text; the ids of all that is made of it.

Pure Python, on executors; refuses Spark and tokenizers. Inputs: the bytes of a JSON line, or the columns of a table
row. Outputs: a `Document` or a `Reject`. Ids are 128-bit hashes (32 hexadecimal digits) of content alone, never of file
names or times, so a retry, and the same file under another name, make the same ids. The id of a reject alone tells the
row's place too, so that bad rows are counted one by one.

Reasons to refuse a row: `invalid_utf8` (lone surrogates too), `nul_byte` (also as an escape), `invalid_json`,
`not_an_object`, `missing_text` (absent or null), `text_not_string`, `empty_text`; a whole file: `unreadable_file`; an
instance that holds a document of the record of take-downs (removals.py): `taken_down`.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from miniplm_udf.config import FieldsConfig, SplitConfig

REJECT_REASONS = (
    "invalid_utf8",
    "nul_byte",
    "invalid_json",
    "not_an_object",
    "missing_text",
    "text_not_string",
    "empty_text",
    "unreadable_file",
    "taken_down",
)
STAGE = "ingest"
RAW_BYTES = 4096
ABSENT: Any = object()  # of a field that an object does not have: null is a value
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """One document. `metadata` is a JSON object, or None where the config carries no fields."""

    document_id: str
    source: str
    text: str
    split: str
    metadata: str | None = None


@dataclasses.dataclass(frozen=True)
class Reject:
    """A row that cannot be a document: the reason's fixed word, what was found, the row's bytes in full."""

    reason: str
    detail: str
    raw: bytes | None


def hash_parts(*parts: str | bytes | int) -> str:
    """128-bit hash of a sequence; each part stands behind its length, so ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def content_hash(text: str) -> str:
    """Hash of a text alone."""
    return hash_parts("content", text)


def instance_id(document_ids: list[str], ordinal: int, text: str, spec_hash: str) -> str:
    """Id of an instance: documents, position, text and chunking spec."""
    return hash_parts("instance", len(document_ids), *document_ids, ordinal, text, spec_hash)


def reject_id(reason: str, source_file: str, raw: bytes | str | None, block_start: int = 0, row: int = 0) -> str:
    """Id of a reject: stage, reason, place and bytes.

    The place is the file, the start of the input split in it, and the row's number in that split (0 and 0 for a whole
    file). Input splits are of fixed size, so a retry finds the same place, and each of many equal bad rows is a reject.
    """
    return hash_parts("reject", STAGE, reason, source_file, b"" if raw is None else raw, block_start, row)


def split_of(text: str, shares: SplitConfig) -> str:
    """`heldout`, `reference` or `pool`, by a hash of the whitespace-normalised text.

    Held-out texts are taken from the bottom of [0, 1), the reference's from its top: a share that grows takes from
    `pool` alone, and no text ever moves between the other two.
    """
    normalised = " ".join(text.split()).encode("utf-8")
    position = int.from_bytes(hashlib.blake2b(normalised, digest_size=8).digest(), "big") / 2**64
    if position < shares.heldout:
        return "heldout"
    return "reference" if position >= 1 - shares.reference else "pool"


def find_field(row: dict[str, Any], name: str) -> Any:
    """The value of a JSON object's field, or `ABSENT`: of the key that is spelled so, else, where the name has dots, of
    nested objects: `meta.set` is the `set` of `meta`."""
    if name in row:
        return row[name]
    for dot in (match.start() for match in re.finditer(r"\.", name)):
        inner = row.get(name[:dot])
        found = find_field(inner, name[dot + 1 :]) if isinstance(inner, dict) else ABSENT
        if found is not ABSENT:
            return found
    return ABSENT


def field_names(row: dict[str, Any]) -> Iterator[str]:
    """All names that `find_field` takes for a JSON object; those of nested objects with dots."""
    waiting = [("", row)]
    while waiting:
        prefix, values = waiting.pop()
        for key, value in values.items():
            yield prefix + key
            if isinstance(value, dict):
                waiting.append((f"{prefix}{key}.", value))


@dataclasses.dataclass(frozen=True)
class DocumentReader:
    """Turns input rows into documents.

    Attributes:
        fields: names of the input's fields; for JSON lines, as `find_field` takes them.
        default_source: the source of rows that name none.
        shares: of the splits.
    """

    fields: FieldsConfig
    default_source: str
    shares: SplitConfig

    def read_line(self, line: bytes) -> Document | Reject | None:
        """One line of a JSONL file, without its line break; None for a blank one."""
        line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line.strip():
            return None
        if b"\0" in line:
            return Reject("nul_byte", f"expected JSON, found a NUL at byte {line.index(0)} of the line", line)
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            return Reject("invalid_utf8", f"byte {error.start} of the line: {error.reason}", line)
        except (ValueError, RecursionError) as error:
            return Reject("invalid_json", f"{type(error).__name__}: {error}", line)
        if not isinstance(row, dict):
            return Reject("not_an_object", f"expected a JSON object, found {type(row).__name__}", line)
        return self._from_row(row, line)

    def read_columns(
        self, text: bytes | None, id: bytes | None, source: bytes | None, metadata: str | None
    ) -> Document | Reject:
        """One row of a table: its columns as bytes, which need not be UTF-8; `metadata` is a JSON object."""
        if text is None:
            return Reject("missing_text", f"expected a text in column {self.fields.text!r}, found null", None)
        try:
            decoded = text.decode("utf-8")
            names = [None if value is None else value.decode("utf-8") for value in (id, source)]
        except UnicodeDecodeError as error:
            return Reject("invalid_utf8", f"byte {error.start} of a column: {error.reason}", text)
        return self._document(decoded, names[0], names[1], metadata if self.fields.metadata else None, text)

    def _from_row(self, row: dict[str, Any], line: bytes) -> Document | Reject:
        text = find_field(row, self.fields.text)
        if text is None or text is ABSENT:
            found = f"found {sorted(row)[:20]}" if text is ABSENT else "found null"
            return Reject("missing_text", f"expected a string in field {self.fields.text!r}, {found}", line)
        if not isinstance(text, str):
            return Reject("text_not_string", f"expected a string, found {type(text).__name__}", line)
        named = {name: find_field(row, name) for name in self.fields.metadata}
        carried = {name: value for name, value in named.items() if value is not ABSENT}
        metadata = json.dumps(carried, ensure_ascii=False, sort_keys=True) if self.fields.metadata else None
        id, source = (_name(find_field(row, name)) for name in (self.fields.id, self.fields.source))
        return self._document(text, id, source, metadata, line)

    def _document(
        self, text: str, id: str | None, source: str | None, metadata: str | None, raw: bytes
    ) -> Document | Reject:
        if not text:
            return Reject("empty_text", "expected a text, found one of no characters", raw)
        for value in (text, id, source):
            if value is not None and "\0" in value:
                return Reject("nul_byte", f"found a NUL at character {value.index(chr(0))}", raw)
        try:
            for value in (text, id, source, metadata):
                (value or "").encode("utf-8")
        except UnicodeEncodeError as error:
            return Reject("invalid_utf8", f"character {error.start}: {error.reason}", raw)
        return Document(
            id or content_hash(text), source or self.default_source, text, split_of(text, self.shares), metadata
        )


def _name(value: Any) -> str | None:
    """An id or a source as a string: numbers and the like as JSON writes them."""
    if value is None or value is ABSENT:
        return None
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
