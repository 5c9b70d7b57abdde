"""The section `annotate` of an experiment: which columns are computed from the instances' text, for use in refinement.

Frozen dataclasses, checked when they are made, as in sections.py. A group of columns is computed if its key is
given; the columns are declared in `schemas` and described in docs/annotations.md. Imports nothing heavy.
"""

import dataclasses

from miniplm_udf.config.sections import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearDuplicatesConfig:
    """When two texts are near-duplicates.

    Attributes:
        threshold: lowest Jaccard similarity of the two sets of shingles, above 0 and at most 1.
        shingle_words: number of words in a shingle; a shorter text is a single shingle.
    """

    threshold: float = 0.8
    shingle_words: int = 5

    def __post_init__(self) -> None:
        check(
            0 < self.threshold <= 1,
            f"annotate.near_duplicates.threshold: expected a similarity above 0 and at most 1, found {self.threshold}",
        )
        check(
            self.shingle_words >= 1,
            f"annotate.near_duplicates.shingle_words: expected at least 1, found {self.shingle_words}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContaminationConfig:
    """Evaluation data that must not be in the training text.

    Attributes:
        files: paths, folders or globs of evaluation files: `.jsonl`, in which every string of a line is a text, and
            `.txt`, in which the whole file is one text; compressed files end in `.gz` or `.zst`.
        ngram_words: number of words in an n-gram.
    """

    files: list[str] | str
    ngram_words: int = 13

    def __post_init__(self) -> None:
        check(
            bool(self.paths) and all(self.paths),
            f"annotate.contamination.files: expected paths of evaluation files, found {self.files!r}",
        )
        check(
            self.ngram_words >= 1,
            f"annotate.contamination.ngram_words: expected at least 1, found {self.ngram_words}",
        )

    @property
    def paths(self) -> list[str]:
        """`files` as a list."""
        return [self.files] if isinstance(self.files, str) else list(self.files)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotateConfig:
    """Groups of columns; the attributes have the names of the groups in `schemas.ANNOTATIONS_BY_GROUP`.

    Attributes:
        duplicates: whether to find instances with the same text.
        near_duplicates: finds instances with nearly the same text; null does not search.
        contamination: finds n-grams of evaluation files; null does not search.
        language: whether to identify the language.
        quality: whether to compute the signals of quality.
    """

    duplicates: bool = False
    near_duplicates: NearDuplicatesConfig | None = None
    contamination: ContaminationConfig | None = None
    language: bool = False
    quality: bool = False

    def __post_init__(self) -> None:
        names = [field.name for field in dataclasses.fields(self)]
        check(bool(self.groups), f"annotate: expected at least one of {', '.join(names)}, found none")

    @property
    def groups(self) -> list[str]:
        """The groups that the config asks for, in the order of the table's columns."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name)]
