"""The section `annotate` of an experiment: which columns are made of the instances' text, for refinement to use.

Frozen dataclasses, validated where they are made, as those of config_sections.py. A group of columns is made where its
key is given; the columns are declared in schemas.py and described in docs/annotations.md. Imports nothing heavy.
"""

import dataclasses

from miniplm_udf.config_sections import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearDuplicatesConfig:
    """When two texts are near-duplicates.

    Attributes:
        threshold: of the Jaccard similarity of their sets of shingles: at least this.
        shingle_words: words of a shingle; a shorter text is one shingle.
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
    """What must not be in the training text.

    Attributes:
        files: paths, folders or globs of evaluation files: `.jsonl`, of which every string of a line counts, and
            `.txt`, each a text; also `.gz` and `.zst`.
        ngram_words: words of an n-gram.
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
        return [self.files] if isinstance(self.files, str) else list(self.files)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnnotateConfig:
    """Groups of columns; the names of the attributes are those of the groups in `schemas.ANNOTATIONS_BY_GROUP`."""

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
        """Those that are asked for, in the order of the table's columns."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name)]
