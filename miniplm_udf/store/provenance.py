"""`Provenance`: what a version of a corpus was made from, and the parts that it consists of.

Owns the shapes alone: `corpus_records` writes and reads them, as the `userMetadata` of a commit and as JSON in the
table `corpora`. The parts are dicts with declared keys, so the JSON on disk is the same as in memory. A key that an
older release did not write is absent, and a reader has to allow for that. Driver only.
"""

import dataclasses
from typing import Any, NotRequired, TypedDict

from miniplm_udf.storage import Json


class VersionTables(TypedDict, total=False):
    """The states of the tables that a version was chosen from. A table that was not read has no key.

    Attributes:
        matrix_version: Delta version of `score_matrix`.
        proxy_version: Delta version of `proxy_scores`.
        last_batches: newest micro-batch that the version includes, for each query id in these tables.
        instances_version: Delta version of `instances`.
        annotations_version: Delta version of `annotations`.
        annotated_by: the settings of the annotations, as JSON in their column has them; None: there are none.
    """

    matrix_version: int | None
    proxy_version: int | None
    last_batches: dict[str, int]
    instances_version: int
    annotations_version: int
    annotated_by: Json | None


class FollowedFrom(TypedDict):
    """How a followed version was made.

    Attributes:
        since_version: the full refinement that rows were appended to since.
        n_appended: the rows that this version appended.
        cut: the `cuts.BucketCut` that chose them, as plain data.
    """

    since_version: int
    n_appended: int
    cut: Json


class DerivedFrom(TypedDict):
    """How a version was made from an earlier one.

    Attributes:
        by: restore, rebuild or take-down.
        from_version: the version that the rows, the config and the inputs come from.
        takedown_id: id of a take-down.
    """

    by: str
    from_version: int
    takedown_id: NotRequired[str]


class Diagnostics(TypedDict, total=False):
    """The results of `diagnostics.diagnose`; without a key for a followed version.

    Attributes:
        negative_share: share of the candidates with a finite score whose score is below 0; None: no score is finite.
        spearman_with_reference_loss: correlation of the score with the reference's mean loss, -1 to 1; None if there is
            no reference, or the order is random.
        spearman_error: the largest possible error of the correlation.
        kept_share_by_length: share of the candidates that was kept, by range of tokens, e.g. "32-63".
        rejects: rows in `rejects` by reason.
        notes: sentences about what a user should check.
    """

    negative_share: float | None
    spearman_with_reference_loss: float | None
    spearman_error: float | None
    kept_share_by_length: dict[str, float]
    rejects: dict[str, int]
    notes: list[str]


# By source (or "all sources"): `down_to` and, for a band, `below`, each [score, instance_id or None].
PlainCuts = dict[str, dict[str, list[Any]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Describes a version of a corpus and where it came from: the `userMetadata` of its commit.

    Attributes:
        corpus: name of the corpus.
        config: the resolved corpus config.
        inputs: the states of the tables that it was chosen from.
        model_revisions: revision of each model, by alias.
        threshold: the lowest kept score.
        n_candidates: pool rows that passed `where`; `candidate_tokens` are their tokens.
        n_unscorable: candidates whose score is null, NaN or infinite, which are never kept. None: no longer known.
        n_instances: rows kept; `n_tokens` are their tokens.
        fingerprint: hash of the kept ids and scores, independent of order.
        code_revision: version of this package that refined.
        kept_share_by_source: share of the candidates that was kept; empty for a followed version.
        cuts: the last kept rows, by source (`keep.SelectionCuts.plain`); empty for a followed version.
        diagnostics: empty for a followed version.
        followed: None for a full refinement, which is exact.
        derived: None for a version that was refined or followed.
    """

    corpus: str
    config: Json
    inputs: VersionTables
    model_revisions: dict[str, str]
    threshold: float
    n_candidates: int
    candidate_tokens: int
    n_unscorable: int | None
    n_instances: int
    n_tokens: int
    fingerprint: str
    code_revision: str
    kept_share_by_source: dict[str, float]
    followed: FollowedFrom | None = None
    cuts: PlainCuts = dataclasses.field(default_factory=dict)
    diagnostics: Diagnostics = dataclasses.field(default_factory=Diagnostics)
    derived: DerivedFrom | None = None
