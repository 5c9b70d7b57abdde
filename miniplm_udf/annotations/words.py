"""The words of a text and hashes of their n-grams, as Spark columns: what likeness and contamination are told by.

    text -> lower-case runs of letters and digits -> 64-bit hashes of n words in a row

Punctuation, space and case do not count. In scripts that are written without spaces (Chinese, Japanese, Thai, ...) each
character is a word. Pure expressions: nothing runs here, and the same text gives the same hashes in any process.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

_UNSPACED = r"\p{IsHan}\p{IsHiragana}\p{IsKatakana}\p{IsThai}\p{IsLao}\p{IsKhmer}\p{IsMyanmar}"
# Plain letters first: Java looks a sign's script up in a table.
_WORD = rf"[a-z0-9[\p{{L}}\p{{M}}\p{{N}}&&[^{_UNSPACED}]]]+|[{_UNSPACED}]"
# The column that n-grams are made of.
WORDS = "_words"


def words(text: "Column | str") -> "Column":
    """The words of a text, in order: array<string>."""
    from pyspark.sql import functions as F

    return F.regexp_extract_all(F.lower(text), F.lit(_WORD), F.lit(0))


def with_words(rows: "DataFrame") -> "DataFrame":
    """The rows with the words of their texts as a column of its own, `WORDS`."""
    return rows.withColumn(WORDS, words("text"))


def ngram_hashes(words: "Column", n: int) -> "Column":
    """A hash of each n words in a row, in order: array<bigint>; empty for fewer than n words.

    Args:
        words: a column of the frame, or a lambda's variable. Spark computes an expression anew for every n-gram.
    """
    from pyspark.sql import functions as F

    starts = F.sequence(F.lit(1), F.size(words) - (n - 1))
    hashes = F.transform(starts, lambda start: F.xxhash64(F.slice(words, start, F.lit(n))))
    # `sequence` counts down where its end is below its start.
    return F.when(F.size(words) >= n, hashes).otherwise(F.array().cast("array<bigint>"))


def n_ngrams(words: "Column", n: int) -> "Column":
    """How many n words in a row there are."""
    from pyspark.sql import functions as F

    return F.greatest(F.size(words) - (n - 1), F.lit(0))
