"""Turns one input row into a document or a reject; owns the split of a text, and the ids of documents and instances.

Pure Python, on executors; no Spark, no tokenizer. Inputs: the bytes of a JSON line, or the columns of a table row.
Output: a `Document` or a `Reject`. Ids are 128-bit hashes (32 hexadecimal digits) of content alone, never of file names
or times: a retry, and the same file under another name, make the same ids. Only the id of a reject includes the place
of its row, so that each bad row is counted.

A number that is not JSON (NaN, Infinity) or too large for a double (1e999) is kept as a string of its characters, as
Spark writes the same doubles of a table, so that metadata is valid JSON and loses nothing. A line with an object that
has a key twice is `invalid_json`, because JSON readers disagree about the value.

Reasons to refuse a row: `invalid_utf8` (lone surrogates too), `nul_byte` (also as an escape), `invalid_json`,
`not_an_object`, `missing_text` (absent or null), `text_not_string`, `empty_text`; a whole file: `unreadable_file`; an
instance that holds a document that was taken down (store/takedowns.py): `taken_down`.
"""

import collections
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from miniplm_udf.config.sections import FieldsConfig, SplitConfig
from miniplm_udf.ingestion.encodings import encoding_hint
from miniplm_udf.storage import Json

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
ABSENT: Any = object()  # the value of a field that an object does not have; null is a value
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Some versions of Python read JSON that others find too deep, and a corpus must not depend on them.
_DEEPEST = 500
_BRACKET = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)


class Unrepresentable(str):
    """The characters of a number that is not JSON (NaN, Infinity, -Infinity) or too large for a double."""


def _number(literal: str) -> float | Unrepresentable:
    value = float(literal)
    return value if math.isfinite(value) else Unrepresentable(literal)


def _object(pairs: list[tuple[str, Any]]) -> Json:
    values = dict(pairs)
    if len(values) < len(pairs):
        key = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"duplicate key {key!r}: expected each key of an object once")
    return values


_PARSER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=Unrepresentable, parse_float=_number)


@dataclasses.dataclass(frozen=True, eq=False)
class Document:
    """One document.

    Attributes:
        document_id: the id in the input, or a hash of the text.
        source: the source in the input, or the default source.
        text: the text, never empty.
        split: `heldout`, `reference` or `pool`.
        metadata: a JSON object; None if the config names no metadata fields.
    """

    document_id: str
    source: str
    text: str
    split: str
    metadata: str | None = None


@dataclasses.dataclass(frozen=True)
class Reject:
    """A row that is not a document.

    Attributes:
        reason: one of REJECT_REASONS.
        detail: what was expected and found.
        raw: all bytes of the row; None if it has none.
    """

    reason: str
    detail: str
    raw: bytes | None


def hash_parts(*parts: str | bytes | int) -> str:
    """128-bit hash of a sequence. The length of each part is hashed too, so ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def content_hash(text: str) -> str:
    """Hashes a text.

    Args:
        text: the text.

    Returns:
        32 hex digits.
    """
    return hash_parts("content", text)


def document_key(document_id: str, text: str) -> str:
    """Hashes an id and a text. Two rows with the same key are the same document.

    Args:
        document_id: the document's id.
        text: its text.

    Returns:
        32 hex digits.
    """
    return hash_parts("document", document_id, text)


def instance_id(document_ids: list[str], ordinal: int, text: str, spec_hash: str) -> str:
    """Makes the id of an instance from what the instance holds, so that a retry makes the same id.

    Args:
        document_ids: ids of its documents, in order.
        ordinal: its number in its stream, from 0.
        text: its text.
        spec_hash: fingerprint of the chunking spec.

    Returns:
        32 hex digits.
    """
    return hash_parts("instance", len(document_ids), *document_ids, ordinal, text, spec_hash)


def reject_id(reason: str, source_file: str, raw: bytes | str | None, block_start: int = 0, row: int = 0) -> str:
    """Makes the id of a reject from the stage, the reason, the place and the bytes.

    The place is the file, the start of the input split in it, and the number of the row in that split (0 and 0 for a
    whole file). Input splits have a fixed size, so a retry finds the same place. Each of many equal bad rows is a
    reject.

    Args:
        reason: one of REJECT_REASONS.
        source_file: URI of the file.
        raw: all bytes of the row, or a text that stands for them; None if it has none.
        block_start: byte of the file at which the input split starts.
        row: number of the row in the input split, from 0.

    Returns:
        32 hex digits.
    """
    return hash_parts("reject", STAGE, reason, source_file, b"" if raw is None else raw, block_start, row)


def split_of(text: str, shares: SplitConfig) -> str:
    """The split of a text (`heldout`, `reference` or `pool`), by a hash of the text with normalised whitespace.

    Held-out texts come from the bottom of [0, 1), the reference's from the top: a share that grows takes texts from
    `pool` only, and no text moves between the other two splits.

    Args:
        text: the document's text; runs of whitespace count as one space.
        shares: shares of the splits `heldout` and `reference`, 0 to 1.
    """
    normalised = " ".join(text.split()).encode("utf-8")
    position = int.from_bytes(hashlib.blake2b(normalised, digest_size=8).digest(), "big") / 2**64
    if position < shares.heldout:
        return "heldout"
    return "reference" if position >= 1 - shares.reference else "pool"


def find_field(row: Json, name: str) -> Any:
    """The value of a field of a JSON object, or ABSENT.

    A key that is spelled like the name comes first. Otherwise dots in the name go into nested objects: `meta.set` is
    the field `set` of `meta`, which is an object or a string that holds an object as JSON.

    Args:
        row: the object, parsed.
        name: name of the field, perhaps with dots.
    """
    if name in row:
        return row[name]
    for dot in (match.start() for match in re.finditer(r"\.", name)):
        inner = object_in(row.get(name[:dot]))
        value = find_field(inner, name[dot + 1 :]) if inner is not None else ABSENT
        if value is not ABSENT:
            return value
    return ABSENT


def _is_too_deep(line: bytes) -> bool:
    """Whether lists and objects are nested deeper than `_DEEPEST`."""
    if line.count(b"{") + line.count(b"[") <= _DEEPEST:
        return False
    depth = 0
    for match in _BRACKET.finditer(line):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(match[0], 0)
        if depth > _DEEPEST:
            return True
    return False


def object_in(value: Any) -> Json | None:
    """Returns a JSON object, or the object that a string holds as JSON; None for other values.

    Args:
        value: the value of a field, parsed.
    """
    if not isinstance(value, str):
        return value if isinstance(value, dict) else None
    if not value.lstrip().startswith("{"):
        return None
    try:
        parsed = _PARSER.decode(value)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def field_names(row: Json) -> Iterator[str]:
    """Lists all names that `find_field` finds in a JSON object.

    Args:
        row: the object, parsed.

    Yields:
        Names in no fixed order; names in nested objects have dots.
    """
    waiting = [("", row)]
    while waiting:
        prefix, values = waiting.pop()
        for key, value in values.items():
            yield prefix + key
            if (inner := object_in(value)) is not None:
                waiting.append((f"{prefix}{key}.", inner))


@dataclasses.dataclass(frozen=True)
class DocumentReader:
    """Turns input rows into documents.

    Attributes:
        fields: names of the input's fields; in JSON lines, `find_field` looks them up.
        default_source: the source of rows without a source.
        shares: shares of the splits.
    """

    fields: FieldsConfig
    default_source: str
    shares: SplitConfig

    def read_line(self, line: bytes) -> Document | Reject | None:
        """Reads one line of a JSONL file.

        Args:
            line: the bytes of the line, without its line break.

        Returns:
            The document, or a reject with its reason; None for a blank line.
        """
        line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line.strip():
            return None
        if b"\0" in line:
            detail = f"expected JSON, found a NUL at byte {line.index(0)} of the line{encoding_hint(line)}"
            return Reject("nul_byte", detail, line)
        if _is_too_deep(line):
            return Reject("invalid_json", f"expected at most {_DEEPEST} nested lists and objects, found more", line)
        try:
            row = _PARSER.decode(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            return Reject("invalid_utf8", f"byte {error.start} of the line: {error.reason}{encoding_hint(line)}", line)
        except ValueError as error:
            return Reject("invalid_json", f"{type(error).__name__}: {error}", line)
        if not isinstance(row, dict):
            return Reject("not_an_object", f"expected a JSON object, found {type(row).__name__}", line)
        return self._from_row(row, line)

    def read_columns(
        self, text: bytes | None, id: bytes | None, source: bytes | None, metadata: str | None
    ) -> Document | Reject:
        """Reads one row of a table.

        Args:
            text: the text in bytes, which may not be UTF-8; None for null.
            id: the id, in the same form.
            source: the source, in the same form.
            metadata: a JSON object with the metadata columns.

        Returns:
            The document, or a reject with its reason.
        """
        if text is None:
            return Reject("missing_text", f"expected a text in column {self.fields.text!r}, found null", None)
        try:
            decoded = text.decode("utf-8")
            names = [None if value is None else value.decode("utf-8") for value in (id, source)]
        except UnicodeDecodeError as error:
            detail = f"byte {error.start} of a column: {error.reason}{encoding_hint(text)}"
            return Reject("invalid_utf8", detail, text)
        return self._document(decoded, names[0], names[1], metadata if self.fields.metadata else None, text)

    def _from_row(self, row: Json, line: bytes) -> Document | Reject:
        text = find_field(row, self.fields.text)
        if text is None or text is ABSENT:
            found = f"found {sorted(row)[:20]}" if text is ABSENT else "found null"
            return Reject("missing_text", f"expected a string in field {self.fields.text!r}, {found}", line)
        if not isinstance(text, str) or isinstance(text, Unrepresentable):
            found = f"the number {text}" if isinstance(text, Unrepresentable) else type(text).__name__
            return Reject("text_not_string", f"expected a string, found {found}", line)
        named = {name: find_field(row, name) for name in self.fields.metadata}
        carried = {name: value for name, value in named.items() if value is not ABSENT}
        metadata = _json(carried) if self.fields.metadata else None
        id, source = (_name(find_field(row, name)) for name in (self.fields.id, self.fields.source))
        return self._document(text, id, source, metadata, line)

    def _document(
        self, text: str, id: str | None, source: str | None, metadata: str | None, raw: bytes
    ) -> Document | Reject:
        if not text:
            return Reject("empty_text", "expected a text, found one of no characters", raw)
        for value in (text, id, source):
            if value is not None and "\0" in value:
                return Reject("nul_byte", f"found a NUL at character {value.index(chr(0))}{encoding_hint(raw)}", raw)
        try:
            for value in (text, id, source, metadata):
                (value or "").encode("utf-8")
        except UnicodeEncodeError as error:
            return Reject("invalid_utf8", f"character {error.start}: {error.reason}", raw)
        return Document(
            id or content_hash(text), source or self.default_source, text, split_of(text, self.shares), metadata
        )


def _name(value: Any) -> str | None:
    """An id or a source as a string; other types than strings are written as JSON."""
    if value is None or value is ABSENT:
        return None
    return str(value) if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)
