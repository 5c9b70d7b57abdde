"""Heuristic quality signals of Gopher, C4, FineWeb and RedPajama, as Spark columns. They decide nothing by themselves.

Input: a frame with `text`; output: the frame with the columns of the group `quality` (schemas/). A word is a run of
characters without spaces; for repetition, it is a word of words.py. A line is a line that is not blank, stripped of
spaces. A ratio with denominator 0 is null. Only Spark expressions: nothing runs here.

Sources: Gopher, arXiv 2112.11446, A.1.1; C4, arXiv 1910.10683, 2.2; FineWeb, arXiv 2406.17557; RedPajama-V2,
arXiv 2411.12372.
"""

from typing import TYPE_CHECKING

from miniplm_udf.annotations.words import WORDS, ngram_hashes, with_words

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

_SPACE = r"[\s\p{Z}]"
_NO_SPACE = r"[^\s\p{Z}]"
_AROUND_LINES = " \t\r\f\v\u00a0\u3000"
_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_SHORT_LINE_CHARACTERS = 30


def with_quality(rows: "DataFrame") -> "DataFrame":
    """Returns the rows with the quality signals of the column `text`.

    Args:
        rows: a frame with `text`.
    """
    from pyspark.sql import functions as F

    # As columns, because many expressions use each of them, and they are computed only once.
    prepared = with_words(rows).withColumns({"_lines": _lines(), "n_words": _count(rf"{_NO_SPACE}+")})
    prepared = prepared.withColumn("_5grams", ngram_hashes(F.col(WORDS), 5))
    return prepared.withColumns({**_word_signals(), **_line_signals()}).drop(WORDS, "_lines", "_5grams")


def _word_signals() -> "dict[str, Column]":
    from pyspark.sql import functions as F

    n_words, words, grams = F.col("n_words"), F.col(WORDS), F.col("_5grams")
    characters = F.length(F.regexp_replace("text", rf"{_SPACE}+", ""))
    stop_words = F.array_intersect(words, F.array(*map(F.lit, _STOP_WORDS)))
    # From the beginning of a word and without backtracking, so that a long run of signs is read only once.
    alphabetic = _count(rf"(?<!{_NO_SPACE})[^\s\p{{Z}}\p{{L}}]*+\p{{L}}")
    return {
        "mean_word_characters": F.try_divide(characters, n_words),
        "alphabetic_word_share": F.try_divide(alphabetic, n_words),
        "hash_word_ratio": F.try_divide(_count("#"), n_words),
        "ellipsis_word_ratio": F.try_divide(_count(r"\.\.\.|…"), n_words),
        "n_stop_words": F.size(stop_words).cast("bigint"),
        "unique_word_share": F.try_divide(F.size(F.array_distinct(words)), F.size(words)),
        "duplicate_5gram_share": F.try_divide(F.size(grams) - F.size(F.array_distinct(grams)), F.size(grams)),
        "has_curly_bracket": F.contains(F.col("text"), F.lit("{")),
        "has_lorem_ipsum": F.contains(F.lower("text"), F.lit("lorem ipsum")),
    }


def _line_signals() -> "dict[str, Column]":
    from pyspark.sql import functions as F

    lines = F.col("_lines")
    n_lines = F.size(lines)

    def share(pattern: str) -> "Column":
        return F.try_divide(F.size(F.filter(lines, lambda line: F.rlike(line, F.lit(pattern)))), n_lines)

    short = F.filter(lines, lambda line: F.length(line) < _SHORT_LINE_CHARACTERS)
    distinct = F.array_distinct(lines)
    return {
        "n_lines": n_lines.cast("bigint"),
        "bullet_line_share": share(r"^([•‣▪●◦]|[-*]\s)"),
        "ellipsis_line_share": share(r"(\.\.\.|…)$"),
        "punctuated_line_share": share(r"[.!?\"”…。！？]$"),
        "short_line_share": F.try_divide(F.size(short), n_lines),
        "duplicate_line_share": F.try_divide(n_lines - F.size(distinct), n_lines),
        "duplicate_line_character_share": F.try_divide(_characters(lines) - _characters(distinct), _characters(lines)),
    }


def _lines() -> "Column":
    from pyspark.sql import functions as F

    bare = F.transform(F.split("text", "\n"), lambda line: F.btrim(line, F.lit(_AROUND_LINES)))
    return F.filter(bare, lambda line: line != "")


def _count(pattern: str) -> "Column":
    from pyspark.sql import functions as F

    return F.regexp_count("text", F.lit(pattern)).cast("bigint")


def _characters(lines: "Column") -> "Column":
    from pyspark.sql import functions as F

    return F.length(F.array_join(lines, ""))
