"""Packs refined corpora, generated texts and the reference split into token sequences, one Delta version each.

Inputs: `refined/<corpus>`, joined to `instances` for its text; `generations`; or the split `reference` of `instances`.
Output: the table `packed/<corpus>/<tokenizer>` (`schemas.packed`), at least one file a shard, with consecutive sequence
ids over all shards. Owns the stored order and the recorded origin of the table; `sequences.py` says what a sequence is,
`generated.py` how generated ids become sequences. A stream goes to a shard by a hash of its id; in a shard, streams
stand in the order of another hash, whatever their source, and the texts of a stream in the order of their ordinals and
ids. Driver; executors make the tokens. The same inputs give the same rows and are not packed again: a retry finds the
version, or replaces the table in one commit.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.generate import GENERATED
from miniplm_udf.config.rules import in_sample
from miniplm_udf.config.sections import PackConfig
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.packing.file_layout import packed_files
from miniplm_udf.packing.generated import SequenceMaker, sequences_of_generations
from miniplm_udf.packing.shards import SEQUENCE_DDL, shard_function
from miniplm_udf.packing.tokenizers import PackTokenizer, ensure_model_tokenizer, ensure_tokenizer
from miniplm_udf.schemas import table_names
from miniplm_udf.scores.models import read_record
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.storage import Json
from miniplm_udf.store import corpus_records, delta_log, tables
from miniplm_udf.store.provenance import PackedMetadata
from miniplm_udf.store.text_join import texts_of

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, Row, SparkSession

    from miniplm_udf.packing.sequences import InstanceText, PackedSequence

LOGGER = logging.getLogger("miniplm.pack")

PACKING_RULE = 2  # raised when packing makes other sequences of the same text: older tables are then packed again
# In the order of the fields of `sequences.InstanceText`.
TEXT_COLUMNS = (
    "stream_id", "ordinal", "text", "segment_ends", "starts_document", "ends_document", "document_ids", "start_byte",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackSummary:
    """The result of packing one corpus for one tokenizer.

    Attributes:
        path: URI of the table.
        version: version of the table.
        n_sequences: rows of the table.
        n_tokens: tokens of the text with its separators, without padding.
        n_targets: tokens that a model is trained to predict.
        n_instances: instances that were packed.
        skipped: whether the version was there already.
    """

    path: str
    version: int
    n_sequences: int
    n_tokens: int
    n_targets: int
    n_instances: int
    skipped: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Source:
    """The text to pack.

    Attributes:
        corpus: name of the refined corpus, `generated` or `reference`.
        identity: what decides which text is read, for example a table's version; recorded with the packed version
            (the first attributes of `PackedMetadata`).
        read: returns the rows (`instance_id`, `stream_id`, `ordinal` and the columns that `make` reads), and their
            number.
        make: makes the sequences of a shard's rows, on an executor.
        if_empty: message of the error that is raised if the text gives no sequence.
        facts: recorded with the packed version, too; other facts are no reason to pack again.
    """

    corpus: str
    identity: PackedMetadata
    read: Callable[[], tuple["DataFrame", int]]
    make: SequenceMaker
    if_empty: str
    facts: PackedMetadata = dataclasses.field(default_factory=PackedMetadata)


def pack_corpus(spark: "SparkSession", config: ExperimentConfig, corpus: str, tokenizer_name: str) -> PackSummary:
    """Packs the newest version of a refined corpus for one student tokenizer, and returns the counts.

    Args:
        spark: a session.
        config: the experiment.
        corpus: name of a refined corpus.
        tokenizer_name: name in the section `tokenizers`.

    Raises:
        ConfigError: there is no such tokenizer, or its document separator is not one token.
        CorpusError: there is no such corpus, it is empty, or some of its instances are not in `instances`.
        ModelLoadError: the tokenizer cannot be loaded.
    """
    refined_uri = config.layout.refined(corpus)
    newest = corpus_records.newest(refined_uri)
    if newest is None:
        raise CorpusError(f"refined corpus {corpus!r}: none at {storage.redact(refined_uri)}; run the refine stage")
    version = newest.version
    tokenizer = ensure_tokenizer(spark, config, tokenizer_name)

    def read() -> tuple["DataFrame", int]:
        kept = tables.read(spark, refined_uri, version).select("instance_id")
        instances = tables.read(spark, config.layout.table("instances"))
        n_missing = tables.missing_from(kept, instances).count()
        if n_missing:
            raise CorpusError(
                f"{table_names.refined(corpus)} version {version}: expected all its instances in the instances table, "
                f"found {n_missing} that are not there; refine it again"
            )
        n_kept = kept.count()
        return texts_of(kept, instances, TEXT_COLUMNS, n_kept), n_kept

    source = _Source(
        corpus=corpus,
        identity={"refined_version": version, "refined_metadata": newest.metadata},
        read=read,
        make=_sequences_of_texts(tokenizer, config.pack),
        if_empty=f"{table_names.refined(corpus)} keeps nothing: refine it again",
    )
    return _pack(config, source, tokenizer)


def pack_generated(spark: "SparkSession", config: ExperimentConfig, tokenizer_name: str) -> PackSummary:
    """Packs the texts generated with the settings of the section `generate`, and returns the counts.

    Args:
        spark: a session.
        config: the experiment.
        tokenizer_name: name in the section `tokenizers`.

    Raises:
        ConfigError: there is no section `generate`, no such tokenizer, or its document separator is not one token.
        CorpusError: nothing was generated with these settings.
        ModelLoadError: a tokenizer cannot be loaded.
    """
    settings = config.generate
    if settings is None:
        raise ConfigError("generate: expected the section that makes the corpus `generated`, found none")
    uri = config.layout.table("generations")
    newest = corpus_records.newest(uri)
    if newest is None:
        raise CorpusError(f"table {storage.redact(uri)}: expected generated texts, found none; run `miniplm generate`")
    model = read_record(config, settings.model)
    revision = settings.revision(model.model_revision)
    generator_tokenizer = ensure_model_tokenizer(spark, config, settings.model)
    _check_tokenizer_of_ids(config, model, generator_tokenizer)
    tokenizer = ensure_tokenizer(spark, config, tokenizer_name)
    generations = tables.read(spark, uri, newest.version).where(f"generation_revision = '{revision}'")
    rows = generations.where(in_sample(settings.sample))
    # Not the version: rows of another seed or model may be added to the table.
    n_rows, hashes = rows.selectExpr(
        "count(*)", "coalesce(sum(cast(xxhash64(instance_id) AS decimal(20, 0))), 0)"
    ).collect()[0]
    columns = ("instance_id", "instance_id AS stream_id", "0L AS ordinal", "token_ids")

    source = _Source(
        corpus=GENERATED,
        identity={
            "refined_version": None,
            "refined_metadata": {"model_revisions": {settings.model: model.model_revision}},
            "generation_revision": revision,
            "generation": {**settings.settings, "sample": settings.sample},
            "generation_rows": f"{n_rows} {hashes}",
        },
        facts={"generations_version": newest.version},
        read=lambda: (rows.selectExpr(*columns), n_rows),
        make=sequences_of_generations(generator_tokenizer, tokenizer, config.pack),
        if_empty=f"table {storage.redact(uri)}: expected texts generated with the settings of the section generate, "
        "found only others; run `miniplm generate`",
    )
    return _pack(config, source, tokenizer)


def _check_tokenizer_of_ids(config: ExperimentConfig, model: ModelDescription, tokenizer: PackTokenizer) -> None:
    """Raises a CorpusError if the copy of a model's tokenizer is not the tokenizer of the generated ids."""
    expected = (model.tokenizer_hash, model.document_separator_id)
    if (tokenizer.tokenizer_hash, tokenizer.document_separator_id) != expected:
        folder = storage.redact(config.layout.tokenizer(tokenizer.name))
        raise CorpusError(
            f"{folder}: expected the tokenizer of the model that generated the texts, found another: the files of "
            f"models.{model.model_id} were replaced; remove this folder and pack again"
        )


def pack_reference(spark: "SparkSession", config: ExperimentConfig) -> PackSummary:
    """Packs the `reference` split, and returns the counts.

    The tokenizer belongs to the model that the reference is compared with.

    Args:
        spark: a session.
        config: the experiment.

    Raises:
        ConfigError: the experiment trains no reference.
        CorpusError: nothing was ingested, or no text fell to the `reference` split.
        ModelLoadError: the tokenizer cannot be loaded.
    """
    if config.reference is None:
        raise ConfigError("reference: expected the section of a reference to train, found none")
    uri = config.layout.table("instances")
    rows = tables.read(spark, uri).where("split = 'reference'").select("instance_id", *TEXT_COLUMNS)
    n_instances = rows.count()
    if_empty = (
        f"no text of the reference split in {storage.redact(uri)}: raise ingest.split.reference "
        f"(now {config.ingest.split.reference}) and ingest into a new root, or ingest more text"
    )
    if not n_instances:
        raise CorpusError(if_empty)
    tokenizer = ensure_model_tokenizer(spark, config, config.reference.tokenizer)
    source = _Source(
        corpus="reference",
        identity={
            "refined_version": None,
            "refined_metadata": None,
            "instances_version": delta_log.newest_version(uri),
        },
        read=lambda: (rows, n_instances),
        make=_sequences_of_texts(tokenizer, config.pack),
        if_empty=if_empty,
    )
    return _pack(config, source, tokenizer)


def _pack(config: ExperimentConfig, source: _Source, tokenizer: PackTokenizer) -> PackSummary:
    """Packs the text, unless the newest version of the table was made from the same text by the same settings."""
    from pyspark import StorageLevel

    uri = config.layout.packed(source.corpus, tokenizer.name)
    identity = _identity(config.pack, source, tokenizer)
    newest = corpus_records.newest(uri)
    # Tables of earlier versions do not say how their sequences were made: all were packed.
    recorded: Json = {"sequences": "packed", **((newest.metadata or {}) if newest else {})}
    if newest and all(key in recorded and recorded[key] == value for key, value in identity.items()):
        return _summary(uri, newest.version, cast(PackedMetadata, recorded), skipped=True)
    rows, n_instances = source.read()
    # The counts go into the commit, so the sequences are kept until they are written.
    in_order = _in_stored_order(rows, config.pack.shards)
    sequences = in_order.mapInArrow(shard_function(source.make), SEQUENCE_DDL).persist(StorageLevel.DISK_ONLY)
    try:
        counts = _counts_by_shard(sequences)
        if not counts:
            raise CorpusError(source.if_empty)
        metadata: PackedMetadata = {
            **source.facts,
            **identity,
            "n_sequences": sum(row["n_sequences"] for row in counts.values()),
            "n_tokens": sum(row["n_tokens"] for row in counts.values()),
            "n_targets": sum(row["n_targets"] for row in counts.values()),
            "n_instances": n_instances,
        }
        table = schemas.packed(source.corpus, tokenizer.name)
        numbered = _numbered(sequences, counts, config.pack.shards).select(*table.column_names)
        with packed_files(numbered.sparkSession):
            version = tables.overwrite(numbered, uri, table, dict(metadata))
    finally:
        sequences.unpersist()
    return _summary(uri, version, metadata, skipped=False)


def _identity(pack: PackConfig, source: _Source, tokenizer: PackTokenizer) -> PackedMetadata:
    """Everything that decides which sequences are made; recorded in the commit."""
    return {
        **source.identity,
        "corpus": source.corpus,
        "tokenizer": tokenizer.name,
        "tokenizer_hash": tokenizer.tokenizer_hash,
        "document_separator_id": tokenizer.document_separator_id,
        "sequence_length": pack.sequence_length,
        "sequences": pack.sequences,
        "shards": pack.shards,
        "packing_rule": PACKING_RULE,
    }


def _summary(uri: str, version: int, metadata: PackedMetadata, skipped: bool) -> PackSummary:
    LOGGER.info(
        "%s: version %d, %d sequences, %d tokens%s",
        storage.redact(uri), version, metadata["n_sequences"], metadata["n_tokens"], ", unchanged" if skipped else "",
    )  # fmt: skip
    return PackSummary(
        path=uri,
        version=version,
        n_sequences=metadata["n_sequences"],
        n_tokens=metadata["n_tokens"],
        n_targets=metadata["n_targets"],
        n_instances=metadata["n_instances"],
        skipped=skipped,
    )


def _counts_by_shard(sequences: "DataFrame") -> dict[int, "Row"]:
    """Sequences, targets and tokens of each shard that has any."""
    from pyspark.sql import functions as F

    counts = sequences.groupBy("shard").agg(
        F.count("*").alias("n_sequences"),
        F.sum("n_targets").alias("n_targets"),
        F.sum("n_new_tokens").alias("n_tokens"),
    )
    return {row["shard"]: row for row in counts.collect()}


def _numbered(sequences: "DataFrame", counts: dict[int, "Row"], shards: int) -> "DataFrame":
    """Adds `sequence_id`: the position in the shard plus the number of sequences in the shards before it."""
    from pyspark.sql import functions as F

    starts = [0]
    for shard in range(shards - 1):
        starts.append(starts[-1] + (counts[shard]["n_sequences"] if shard in counts else 0))
    start = F.element_at(F.array(*[F.lit(value).cast("bigint") for value in starts]), F.col("shard") + 1)
    return sequences.withColumn("sequence_id", F.col("position") + start)


def _in_stored_order(rows: "DataFrame", shards: int) -> "DataFrame":
    """Puts shard k into partition k, in the stored order.

    Instances are ordered by hashes of ids, so the order depends on the content alone. Inputs that begin alike share
    stream ids and ordinals, so the id of the instance decides last.
    """
    from pyspark.sql import functions as F

    def hashed(purpose: str) -> Any:
        return F.xxhash64(F.lit(purpose), F.col("stream_id"))

    placed = rows.withColumn("shard", F.pmod(hashed("shard"), F.lit(shards)).cast("int"))
    order = (hashed("order"), "stream_id", "ordinal", "instance_id")
    return placed.repartitionById(shards, "shard").sortWithinPartitions(*order)


def _sequences_of_texts(tokenizer: PackTokenizer, settings: PackConfig) -> SequenceMaker:
    """Makes the function from a shard's instances, with TEXT_COLUMNS, to its sequences."""

    def make(batches: "Iterator[pa.RecordBatch]") -> Iterator["PackedSequence"]:
        from miniplm_udf.packing import sequences  # loads the tokenizer library, which a driver need not have

        def texts() -> Iterator["InstanceText"]:
            for batch in batches:
                columns = [batch.column(name).to_pylist() for name in TEXT_COLUMNS]
                for values in zip(*columns, strict=True):
                    yield sequences.InstanceText(*values)

        pack = sequences.pack_instances if settings.sequences == "instance" else sequences.pack_texts
        return pack(texts(), tokenizer.load(), tokenizer.document_separator_id, settings.sequence_length)

    return make
