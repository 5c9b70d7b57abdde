"""The advised lines of a corpus's `where`: conditions that remove noise which the difference of two models keeps.

Owns the lines with their reasons. Input: the teacher's alias and the groups of columns that the section `annotate`
computes; output: lines of Spark SQL. Pure. `make bench-noise` measures them, and docs/cleaning.md shows the result.
"""

import dataclasses
from collections.abc import Collection

# Bits per byte of the teacher: below the band a text is known by heart, or repeats itself; above it is no language.
BAND = (0.3, 2.2)


@dataclasses.dataclass(frozen=True)
class CleaningLine:
    """A condition of `where`.

    Attributes:
        sql: the condition; `{teacher}` stands for the alias of the teacher.
        reason: what it removes, for a comment.
        group: the key of the section `annotate` that computes its columns; None: columns of the matrix.
    """

    sql: str
    reason: str
    group: str | None = None


LINES = (
    CleaningLine("{teacher}_n_tokens >= 32", "the mean of a few tokens says little"),
    CleaningLine("duplicate_of is null", "exact copies: the first one stays", "duplicates"),
    CleaningLine("near_duplicate_of is null", "nearly the same text: the first one stays", "near_duplicates"),
    CleaningLine(
        "coalesce(duplicate_5gram_share, 0) <= 0.3",
        "repeated passages: the teacher copies them from its context, so they come first in any ranking",
        "quality",
    ),
    CleaningLine("coalesce(duplicate_line_share, 0) <= 0.4", "repeated lines, for the same reason", "quality"),
    CleaningLine(
        "coalesce(alphabetic_word_share, 0) >= 0.2", "numbers and tables: fewer words than numbers", "quality"
    ),
    CleaningLine("coalesce(mean_word_characters, 0) between 2 and 40", "encoded data: it has no spaces", "quality"),
    CleaningLine("language = 'en'", "other languages, if the corpus is in one language", "language"),
    CleaningLine(
        f"{{teacher}}_nll_sum_nats / (ln(2) * n_bytes) between {BAND[0]} and {BAND[1]}",
        "bits per byte of the teacher: below, known by heart; above, words without order",
    ),
)


def lines(
    teacher: str = "teacher", groups: Collection[str] = ("duplicates", "near_duplicates", "quality")
) -> list[str]:
    """Returns the advised conditions, to be joined with `and`.

    Args:
        teacher: alias of the teacher.
        groups: keys of the section `annotate` that are set; lines that need another group are left out. The default has
            no `language`, because a corpus may have several.
    """
    return [line.sql.format(teacher=teacher) for line in LINES if line.group is None or line.group in groups]
