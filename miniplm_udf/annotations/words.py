"""The words of a text and hashes of their n-grams, as Spark columns, for near-duplicates and contamination.

    text -> plain form (NFC, nothing invisible) -> lower-case runs of letters and digits -> 64-bit hashes of n words

Punctuation, spaces, case, and the way a character is written in Unicode do not count; the stored texts stay unchanged.
In scripts without spaces between words (Chinese, Japanese, Thai, ...) each character is a word. Spark has no function
for Unicode normalisation, so texts with characters beyond ASCII get their plain form in Python. Nothing runs here, and
the same text gives the same hashes in any process.
"""

import functools
import sys
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import Column, DataFrame

_UNSPACED = r"\p{IsHan}\p{IsHiragana}\p{IsKatakana}\p{IsThai}\p{IsLao}\p{IsKhmer}\p{IsMyanmar}"
# ASCII letters come first, because Java looks up the script of any other character in a table.
_WORD = rf"[a-z0-9[\p{{L}}\p{{M}}\p{{N}}&&[^{_UNSPACED}]]]+|[{_UNSPACED}]"
# Variation selectors of all blocks, and the combining grapheme joiner.
_SELECTOR_RANGES = ((0x180B, 0x180D), (0x180F, 0x180F), (0xFE00, 0xFE0F), (0xE0100, 0xE01EF), (0x034F, 0x034F))
_SELECTORS = [chr(code) for first, last in _SELECTOR_RANGES for code in range(first, last + 1)]
# The column with the words that n-grams are made from.
WORDS = "_words"


def plain_form(text: str) -> str:
    """Returns the text in Unicode's form NFC, without characters that cannot be seen.

    These are format characters (category Cf: soft hyphen, zero-width space and joiners, byte order mark, direction
    marks), variation selectors and the combining grapheme joiner.

    Args:
        text: any text.
    """
    if text.isascii():
        return text
    invisible = _invisible()
    # Measured on 4 KB: this takes a twentieth of the time of a regular expression.
    if not invisible.isdisjoint(text):
        text = "".join(character for character in text if character not in invisible)
    return unicodedata.normalize("NFC", text)


@functools.cache
def _invisible() -> frozenset[str]:
    characters = map(chr, range(sys.maxunicode + 1))
    return frozenset(_SELECTORS) | {character for character in characters if unicodedata.category(character) == "Cf"}


def plain_forms(texts: "pa.Array") -> "pa.Array":
    """Returns the plain form of each text.

    Args:
        texts: string array.

    Returns:
        String array; null stays null.
    """
    import pyarrow as pa

    return pa.array([None if text is None else plain_form(text) for text in texts.to_pylist()], pa.string())


def with_words(rows: "DataFrame") -> "DataFrame":
    """Returns the rows with the column `WORDS`: the words of the column `text`, array<string>.

    Args:
        rows: a frame with `text`.
    """
    return rows.withColumn(WORDS, words("text"))


def words(text: "Column | str") -> "Column":
    """Returns the column of a text's words, in order: array<string>.

    It calls Python, which a lambda cannot (see `words_of_plain`).

    Args:
        text: name of a string column, or a string expression.
    """
    from pyspark.sql import functions as F
    from pyspark.sql.functions import ArrowUDFType, arrow_udf

    column = F.col(text) if isinstance(text, str) else text
    # ASCII texts are in their plain form already, so they are not sent to Python.
    beyond_ascii = F.when(F.rlike(column, F.lit(r"[^\x00-\x7F]")), column)
    # Declared nondeterministic: if one Python function takes the result of another, Spark otherwise repeats the
    # expression of the words at each use.
    plain = arrow_udf(plain_forms, "string", ArrowUDFType.SCALAR).asNondeterministic()
    return words_of_plain(F.coalesce(plain(beyond_ascii), column))


def words_of_plain(text: "Column") -> "Column":
    """Returns the column of the words of a text that is in its plain form: array<string>.

    Args:
        text: a string expression; a variable of a lambda is allowed.
    """
    from pyspark.sql import functions as F

    return F.regexp_extract_all(F.lower(text), F.lit(_WORD), F.lit(0))


def ngram_hashes(words: "Column", n: int) -> "Column":
    """Returns the hashes of every n consecutive words, in order: array<bigint>; empty for fewer than n words.

    Args:
        words: a column of the frame or a lambda's variable, not an expression: Spark would compute it for every n-gram.
        n: words of an n-gram.
    """
    from pyspark.sql import functions as F

    starts = F.sequence(F.lit(1), F.size(words) - (n - 1))
    hashes = F.transform(starts, lambda start: F.xxhash64(F.slice(words, start, F.lit(n))))
    # `sequence` counts down if its end is below its start.
    return F.when(F.size(words) >= n, hashes).otherwise(F.array().cast("array<bigint>"))


def n_ngrams(words: "Column", n: int) -> "Column":
    """Returns the column with the number of n-grams; 0 for fewer than n words.

    Args:
        words: an array expression.
        n: words of an n-gram.
    """
    from pyspark.sql import functions as F

    return F.greatest(F.size(words) - (n - 1), F.lit(0))
