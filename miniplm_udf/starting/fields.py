"""Which fields of the input are the text, the id and the source, from the names and the values of its first rows. Pure.

A field may be nested, and its outer field may be a string with an object as JSON (`ingestion/documents.py`). The text
is the field with a usual name, else the one with the longest strings. The id has another value in each row. The source
has few values. A field that is not certain is left out: ingest does without an id and a source.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion.documents import ABSENT, field_names, find_field
from miniplm_udf.storage import Json

_TEXT_NAMES = (
    "text", "content", "body", "raw_content", "page_content", "article", "document", "passage", "markdown", "contents",
    "story", "code",
)  # fmt: skip
_ID_NAMES = (
    "id", "doc_id", "document_id", "docid", "_id", "uid", "uuid", "guid", "hash", "url", "key", "doc_key",
    "document_key", "record_id", "text_id", "article_id", "page_id",
)  # fmt: skip
_SOURCE_NAMES = (
    "source", "pile_set_name", "set", "domain", "subset", "dataset", "corpus", "origin", "category",
    "redpajama_set_name", "source_name", "host", "site", "topic", "language", "lang",
)  # fmt: skip
_ROWS = 2000
# Values of a source, at most, and their longest mean length in characters.
_MOST_SOURCES, _LONGEST_SOURCE = 200, 60
_LEAST_SHARE = 0.5


@dataclasses.dataclass(frozen=True)
class Fields:
    """Names of the input's fields.

    Attributes:
        text: the text; None for text files, which have no fields.
        id: the id; None if there is none, so that ids are hashes of the texts.
        source: the source; None if there is none.
        sources: the rows of each source in the sample (of text files, all files in each first folder), the most
            frequent first.
    """

    text: str | None = None
    id: str | None = None
    source: str | None = None
    sources: tuple[tuple[str, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Values:
    """Statistics of a field in the sample: its strings, their mean length in characters, its different values."""

    name: str
    n_strings: int
    mean_length: float
    n_values: int
    n_distinct: int

    def rank(self, names: Sequence[str]) -> tuple[int, int]:
        """The place of its last part among usual names, and its depth; lower is better."""
        last = self.name.lower().rpartition(".")[2]
        return (names.index(last) if last in names else len(names), self.name.count("."))


def choose(rows: Sequence[Json]) -> Fields:
    """Chooses the fields.

    Args:
        rows: the first rows of the input.

    Returns:
        The names of the fields.

    Raises:
        ConfigError: no field holds text.
    """
    rows = rows[:_ROWS]
    values = [_values(name, rows) for name in dict.fromkeys(name for row in rows[:200] for name in field_names(row))]
    strings = [each for each in values if each.n_strings >= _LEAST_SHARE * len(rows)]
    if not strings:
        raise ConfigError(
            f"--input: expected a field with a text, found {sorted(each.name for each in values)[:30]}, none of which "
            "holds strings in half of the first rows; name other files"
        )
    text = min(strings, key=lambda each: (each.rank(_TEXT_NAMES)[0], -each.mean_length, each.name.count(".")))
    others = [each for each in values if each.name != text.name]
    source = _first(others, _SOURCE_NAMES, _is_source)
    counts = Counter(str(find_field(row, source.name)) for row in rows) if source else Counter()
    unique = _first(others, _ID_NAMES, lambda each: each.n_values == each.n_distinct == len(rows) > 0)
    return Fields(
        text=text.name,
        id=unique.name if unique else None,
        source=source.name if source else None,
        sources=tuple(counts.most_common()),
    )


def _is_source(values: _Values) -> bool:
    is_short = values.n_strings > 0 and values.mean_length <= _LONGEST_SOURCE
    is_group = values.n_distinct <= min(_MOST_SOURCES, max(1, values.n_strings // 2))
    return is_short and is_group and values.n_strings >= _LEAST_SHARE * values.n_values


def _first(values: Sequence[_Values], names: Sequence[str], fits: Callable[[_Values], bool]) -> _Values | None:
    matches = [each for each in values if each.rank(names)[0] < len(names) and fits(each)]
    return min(matches, key=lambda each: each.rank(names), default=None)


def _values(name: str, rows: Sequence[Json]) -> _Values:
    every = [value for row in rows if (value := find_field(row, name)) is not ABSENT and value is not None]
    strings = [value for value in every if isinstance(value, str)]
    mean = sum(map(len, strings)) / len(strings) if strings else 0.0
    plain = {value if isinstance(value, str | int | float) else str(value) for value in every}
    return _Values(name, len(strings), mean, len(every), len(plain))
