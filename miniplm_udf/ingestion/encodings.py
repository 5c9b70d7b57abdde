"""Recognizes text that is not UTF-8, for the detail of a reject. Pure Python, on executors; converts nothing.

The check knows UTF-16, UTF-32 and Latin-1 (with Windows-1252, which has the same letters). It names an encoding only
if the bytes fit no other common one: a wrong name would cost the reader more than none.
"""

import codecs
import re

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32LE"),
    (codecs.BOM_UTF32_BE, "UTF-32BE"),
    (codecs.BOM_UTF16_LE, "UTF-16LE"),
    (codecs.BOM_UTF16_BE, "UTF-16BE"),
)
_EXAMINED_BYTES = 4096
# One or two letters with accents (Größe), next to an ASCII letter. In Cyrillic or Asian encodings, the runs are longer.
_LATIN = re.compile(rb"(?<=[A-Za-z])[\xc0-\xff]{1,2}(?![\x80-\xff])|(?<![\x80-\xff])[\xc0-\xff]{1,2}(?=[A-Za-z])")
_HIGH = re.compile(rb"[\x80-\xff]+")
_LATIN_SHARE = 0.7


def encoding_of(data: bytes) -> str | None:
    """Returns the name of the encoding that some bytes are in; None for UTF-8 and for unknown encodings.

    Args:
        data: a line or a file; a line may have lost its first or last byte, as it does when UTF-16 is cut at line
            breaks.
    """
    data = data[:_EXAMINED_BYTES]
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    return _wide_encoding(data) or _latin_encoding(data)


def encoding_hint(data: bytes) -> str:
    """Returns what to do about bytes in another encoding than UTF-8, to be added to a message; empty if unknown.

    Args:
        data: as for `encoding_of`.
    """
    name = encoding_of(data)
    if name is None:
        return ""
    label = "Latin-1 (ISO-8859-1) or Windows-1252" if name == "WINDOWS-1252" else name
    source = name[:6] if name.startswith(("UTF-16", "UTF-32")) else name
    return f"; the bytes look like {label}, expected UTF-8: convert the file with iconv -f {source} -t UTF-8"


def _wide_encoding(data: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark: most characters are ASCII, so that the other bytes of each are 0."""
    n_zeros = data.count(0)
    if n_zeros < 0.3 * len(data) or len(data) < 8:
        return None
    if n_zeros > 0.6 * len(data):
        return "UTF-32"
    evens = data[::2].count(0)
    return "UTF-16" if max(evens, n_zeros - evens) >= 0.9 * n_zeros else None


def _latin_encoding(data: bytes) -> str | None:
    runs = _HIGH.findall(data)
    if not runs or _has_utf8(data):
        return None
    n_letters = sum(map(len, _LATIN.findall(data)))
    return "WINDOWS-1252" if n_letters and n_letters >= _LATIN_SHARE * sum(map(len, runs)) else None


def _has_utf8(data: bytes) -> bool:
    """Whether some of the bytes are a character of several bytes in UTF-8: then the text is UTF-8 with an error."""
    return any(character > "\x7f" for character in data.decode("utf-8", "ignore"))
