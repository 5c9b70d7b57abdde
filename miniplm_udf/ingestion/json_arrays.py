"""Cuts a JSON file into the bytes of its documents: the elements of an array, or lines. Pure Python, on executors.

    [ {"text": "a"}, {"text": "b,"} ]  ->  {"text": "a"}   {"text": "b,"}

The elements of an array are cut without being parsed: `documents.py` decides for each whether it is a document, as it
does for lines. Memory: the largest element. Writes nothing; a retry gives the same bytes.
"""

import itertools
import re
from collections.abc import Iterable, Iterator

from miniplm_udf.ingestion.unpacking import DamagedDataError

_OUTSIDE = re.compile(rb'["\[\]{},]')
_INSIDE = re.compile(rb'["\\]')
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def json_rows(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the elements of a file that is one array, or the lines of another file.

    Args:
        chunks: the content of the file, in parts of any size.

    Yields:
        The bytes of each element or line, with the whitespace around it. A blank line counts as a row.

    Raises:
        DamagedDataError: an array does not end, or there is something behind its end.
    """
    head, rest = _with_head(chunks)
    return _elements(head, rest) if _begins_array(head) else _lines(itertools.chain([head], rest))


def is_array(chunks: Iterable[bytes]) -> bool:
    """Whether a file is a JSON array, by its first bytes.

    Args:
        chunks: the content of the file, of which no more than needed is read.
    """
    return _begins_array(_with_head(chunks)[0])


def _begins_array(head: bytes) -> bool:
    return head.removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"[")


def _with_head(chunks: Iterable[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The content up to the first chunk that is not blank, more than the mark, and the chunks after it."""
    rest, head = iter(chunks), b""
    for chunk in rest:
        head += chunk
        if len(head) > len(_BYTE_ORDER_MARK) and head.removeprefix(_BYTE_ORDER_MARK).strip():
            break
    return head, rest


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []
    for chunk in chunks:
        parts.append(chunk)
        if b"\n" in chunk:  # otherwise a long line would be copied for each of its chunks
            *lines, rest = b"".join(parts).split(b"\n")
            parts = [rest]
            yield from lines
    if last := b"".join(parts):
        yield last


def _elements(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    head = head.removeprefix(_BYTE_ORDER_MARK).lstrip()[1:]
    depth, in_string, skip, n_elements = 1, False, 0, 0
    parts: list[bytes] = []
    for chunk in itertools.chain([head], rest):
        if not depth:
            _check_blank(chunk)
            continue
        start, position, skip = 0, skip, 0
        while match := (_INSIDE if in_string else _OUTSIDE).search(chunk, position):
            position, mark = match.end(), match.group()
            if mark == b"\\":
                position += 1  # the escaped character, which may be in the next chunk
            elif mark == b'"':
                in_string = not in_string
            elif mark in b"[{":
                depth += 1
            elif mark in b"]}":
                depth -= 1
            if (mark == b"," and depth == 1 and not in_string) or not depth:
                parts.append(chunk[start : match.start()])
                element, parts, start = b"".join(parts), [], match.end()
                # The array may be empty, but an element may not.
                if element.strip() or depth or n_elements:
                    n_elements += 1
                    yield element
            if not depth:
                _check_blank(chunk[start:])
                break
        skip = max(0, position - len(chunk))
        parts.append(chunk[start:])
    if depth:
        raise DamagedDataError(f"the JSON array does not end (a file that was cut), after {n_elements} elements")


def _check_blank(data: bytes) -> None:
    if data.strip():
        raise DamagedDataError(f"expected nothing behind the JSON array, found {data.strip()[:40]!r}")
