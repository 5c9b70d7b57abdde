"""The origin of a version of a corpus (`Provenance` and its parts), and of a packed table (`PackedMetadata`).

Owns the shapes alone. `corpus_records` writes and reads a `Provenance`, as the `userMetadata` of a commit and as JSON
in the table `corpora`; packing writes `PackedMetadata`. The parts are dicts with declared keys, so the JSON on disk is
the same as in memory. A key that an older release did not write is absent, and a reader has to allow for that. On the
driver and in the trainer.
"""

import dataclasses
import datetime
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


class PairNumbers(TypedDict):
    """The score of a corpus compared with the losses of its two models (`refinement/pair.py`).

    Attributes:
        teacher, reference: aliases of the models.
        spearman_with_minus_teacher_loss: rank correlation of the score with minus the teacher's mean loss, -1 to 1.
        spearman_with_reference_loss: rank correlation of the score with the reference's mean loss, -1 to 1.
        spread: standard deviation of each model's mean losses over the texts, by alias, in `spread_unit`.
        spread_unit: nats/token, or nats/byte if the score compares bits per byte.
        context_gain: nats per byte by which the second half of a text has a lower loss than its first half, by alias;
            without a model for which it was not measured.
    """

    teacher: str
    reference: str
    spearman_with_minus_teacher_loss: float
    spearman_with_reference_loss: float
    spread: dict[str, float]
    spread_unit: str
    context_gain: dict[str, float]


class Diagnostics(TypedDict, total=False):
    """The results of `diagnostics.diagnose`; without a key for a followed version.

    Attributes:
        negative_share: share of the candidates with a finite score whose score is below 0; None: no score is finite.
        spearman_with_minus_teacher_loss, spearman_with_reference_loss: as in `pair`; None without `pair`.
        spearman_teacher_error, spearman_error: the largest possible errors of the two correlations, in this order.
        pair: the score compared with the losses of both models; None if the candidates do not have both, or if the
            order is random.
        kept_share_by_length: share of the candidates that was kept, by range of tokens, e.g. "32-63".
        rejects: rows in `rejects` by reason.
        notes: sentences about what a user should check.
    """

    negative_share: float | None
    spearman_with_minus_teacher_loss: float | None
    spearman_with_reference_loss: float | None
    spearman_teacher_error: float | None
    spearman_error: float | None
    pair: PairNumbers | None
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


class RecordedInputs(VersionTables, total=False):
    """The column `inputs` of a row of `corpora`: the states of the tables, and other parts of a provenance.

    Attributes:
        model_revisions, followed, derived, cuts, diagnostics: as in `Provenance`; an empty part has no key.
    """

    model_revisions: dict[str, str]
    followed: FollowedFrom
    derived: DerivedFrom
    cuts: PlainCuts
    diagnostics: Diagnostics


class CorpusRow(TypedDict):
    """A row of `corpora` with its JSON parsed.

    Attributes:
        version: Delta version of `refined/<name>`; the others as in the table and in `Provenance`.
    """

    name: str
    version: int
    config: Json
    inputs: RecordedInputs
    threshold: float
    n_candidates: int
    candidate_tokens: int
    n_instances: int
    n_tokens: int
    fingerprint: str
    code_revision: str
    created_at: datetime.datetime


class PackedMetadata(TypedDict, total=False):
    """The `userMetadata` of a packed table: the text that was packed, how it was packed, and the counts.

    Attributes:
        corpus: name of the refined corpus, `generated` or `reference`.
        refined_version: version of the refined corpus; None for other text.
        refined_metadata: `userMetadata` of that version; for generated text only the revisions of the model.
        instances_version: Delta version of `instances` (reference).
        generations_version: Delta version of `generations` (generated text).
        generation_revision, generation, generation_rows: revision and settings of the generation, and the number and
            the hash of its rows (generated text).
        tokenizer: name of the tokenizer; `tokenizer_hash` and `document_separator_id` describe it.
        sequence_length, sequences, shards: as in the section `pack`.
        packing_rule: version of the rule that makes the sequences.
        n_sequences, n_tokens, n_targets, n_instances: as in `PackSummary`.
    """

    corpus: str
    refined_version: int | None
    refined_metadata: Json | None
    instances_version: int | None
    generations_version: int
    generation_revision: str
    generation: Json
    generation_rows: str
    tokenizer: str
    tokenizer_hash: str
    document_separator_id: int
    sequence_length: int
    sequences: str
    shards: int
    packing_rule: int
    n_sequences: int
    n_tokens: int
    n_targets: int
    n_instances: int
