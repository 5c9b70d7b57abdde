"""Refined corpora, and the reference split, to packed tables: text to token sequences, one Delta version each.

Owns the stored order and the provenance of `packed/<corpus>/<tokenizer>`; what a sequence is, is `packing`'s. Inputs:
`refined/<corpus>` joined to `instances` for its text. A stream goes to a shard by a hash of its id; in a shard, streams
stand in the order of another hash (not by source) and their slices by ordinal and id. Output: schemas.packed, one
file or more a shard, sequence ids consecutive over shards. Driver; tokens are made on executors. The same inputs give
the same rows, and are not packed again: a retry finds the version, or replaces what is there in one commit.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniplm_udf import corpora, schemas, storage, tables
from miniplm_udf.config import ExperimentConfig
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.texts import texts_of
from miniplm_udf.tokenizer_folders import TOKENIZER_FILE, PackTokenizer, ensure_model_tokenizer, ensure_tokenizer

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

    from miniplm_udf.packing import PackedSequence, Slice

LOGGER = logging.getLogger("miniplm.pack")

PACKING_RULE = 2  # raised with every change of what packing makes: older tables are then packed anew
# In the order of `packing.Slice`.
TEXT_COLUMNS = (
    "stream_id", "ordinal", "text", "segment_ends", "starts_document", "ends_document", "document_ids", "start_byte",
)  # fmt: skip
_PACKED_DDL = "shard int, position bigint, token_ids binary, target_mask binary, n_targets int, n_new_tokens bigint"
_ROWS_PER_BATCH = 256


def pack_corpus(spark: "SparkSession", config: ExperimentConfig, corpus: str, tokenizer_name: str) -> dict[str, Any]:
    """Packs the newest version of a refined corpus for one student tokenizer.

    Returns:
        {"path", "version", "n_sequences", "n_tokens", "n_targets", "skipped"}.

    Raises:
        CorpusError: there is no such corpus, it is empty, or rows of it are not in `instances`.
    """
    refined_uri = config.table_uri(f"refined/{corpus}")
    newest = corpora.newest(spark, refined_uri)
    if newest is None:
        raise CorpusError(f"refined corpus {corpus!r}: none at {storage.redact(refined_uri)}; run the refine stage")
    refined_version = newest.version
    tokenizer = ensure_tokenizer(spark, config, tokenizer_name)
    identity = {"refined_version": refined_version, "refined_metadata": newest.metadata}

    def rows() -> tuple["DataFrame", int]:
        kept = tables.read(spark, refined_uri, refined_version).select("instance_id")
        instances = tables.read(spark, config.table_uri("instances"))
        n_missing = tables.missing_from(kept, instances).count()
        if n_missing:
            raise CorpusError(
                f"refined/{corpus} version {refined_version}: expected all its instances in the instances table, found "
                f"{n_missing} that are not there; refine it again"
            )
        n_kept = kept.count()
        return texts_of(kept, instances, TEXT_COLUMNS, n_kept), n_kept

    return _pack(spark, config, corpus, tokenizer, identity, rows, f"refined/{corpus} keeps nothing: refine it anew")


def pack_reference(spark: "SparkSession", config: ExperimentConfig) -> dict[str, Any]:
    """Packs the `reference` split, with the tokenizer of the model that the reference is compared with.

    Returns:
        As `pack_corpus`.

    Raises:
        ConfigError: the experiment trains no reference.
        CorpusError: nothing was ingested, or nothing of it fell to the `reference` split.
    """
    if config.reference is None:
        raise ConfigError("reference: expected the section of a reference to train, found none")
    instances_uri = config.table_uri("instances")
    reference = tables.read(spark, instances_uri).where("split = 'reference'").select("instance_id", *TEXT_COLUMNS)
    empty = (
        f"no text of the reference split in {storage.redact(instances_uri)}: raise ingest.split.reference "
        f"(now {config.ingest.split.reference}) and ingest into a new root, or ingest more text"
    )
    n_instances = reference.count()
    if not n_instances:
        raise CorpusError(empty)
    tokenizer = ensure_model_tokenizer(spark, config, config.reference.tokenizer)
    identity = {
        "refined_version": None,
        "refined_metadata": None,
        "instances_version": tables.version(spark, instances_uri),
    }
    return _pack(spark, config, "reference", tokenizer, identity, lambda: (reference, n_instances), empty)


def _pack(
    spark: "SparkSession", config: ExperimentConfig, corpus: str, tokenizer: PackTokenizer, identity: dict[str, Any],
    rows: Callable[[], tuple["DataFrame", int]], if_empty: str,
) -> dict[str, Any]:  # fmt: skip
    """Packs `rows()` unless the newest version of the table was made of the same."""
    uri = config.table_uri(f"packed/{corpus}/{tokenizer.name}")
    identity = {
        **identity,
        "corpus": corpus,
        "tokenizer": tokenizer.name,
        "tokenizer_hash": tokenizer.tokenizer_hash,
        "document_separator_id": tokenizer.document_separator_id,
        "sequence_length": config.pack.sequence_length,
        "shards": config.pack.shards,
        "packing_rule": PACKING_RULE,
    }
    known = corpora.newest(spark, uri)
    found = (known.metadata or {}) if known else {}
    if known and all(key in found and found[key] == value for key, value in identity.items()):
        return _summary(uri, known.version, found, skipped=True)
    version, metadata = _write(spark, config, uri, corpus, tokenizer, identity, *rows(), if_empty)
    return _summary(uri, version, metadata, skipped=False)


def _summary(uri: str, version: int, metadata: dict[str, Any], skipped: bool) -> dict[str, Any]:
    counts = {key: metadata[key] for key in ("n_sequences", "n_tokens", "n_targets", "n_instances")}
    LOGGER.info(
        "%s: version %d, %d sequences, %d tokens%s",
        storage.redact(uri), version, counts["n_sequences"], counts["n_tokens"], ", unchanged" if skipped else "",
    )  # fmt: skip
    return {"path": uri, "version": version, **counts, "skipped": skipped}


def _write(
    spark: "SparkSession", config: ExperimentConfig, uri: str, corpus: str, tokenizer: PackTokenizer,
    identity: dict[str, Any], rows: "DataFrame", n_instances: int, if_empty: str,
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    """Packs, counts and commits. Counts go into the commit, so the sequences are kept until they are written."""
    from pyspark import StorageLevel
    from pyspark.sql import functions as F

    shards = config.pack.shards
    sequences = (
        _in_stored_order(rows, shards)
        .mapInArrow(_pack_function(tokenizer, config.pack.sequence_length), _PACKED_DDL)
        .persist(StorageLevel.DISK_ONLY)
    )
    try:
        per_shard = {
            row["shard"]: row
            for row in sequences.groupBy("shard")
            .agg(F.count("*").alias("n"), F.sum("n_targets").alias("targets"), F.sum("n_new_tokens").alias("tokens"))
            .collect()
        }
        if not per_shard:
            raise CorpusError(if_empty)
        metadata = {
            **identity,
            "n_sequences": sum(row["n"] for row in per_shard.values()),
            "n_tokens": sum(row["tokens"] for row in per_shard.values()),
            "n_targets": sum(row["targets"] for row in per_shard.values()),
            "n_instances": n_instances,
        }
        starts = [0]
        for shard in range(shards - 1):
            starts.append(starts[-1] + (per_shard[shard]["n"] if shard in per_shard else 0))
        start = F.element_at(F.array(*[F.lit(value).cast("bigint") for value in starts]), F.col("shard") + 1)
        numbered = sequences.withColumn("sequence_id", F.col("position") + start)
        table = schemas.packed(corpus, tokenizer.name)
        return tables.overwrite(numbered.select(*table.column_names), uri, table, metadata), metadata
    finally:
        sequences.unpersist()


def _in_stored_order(rows: "DataFrame", shards: int) -> "DataFrame":
    """Partition k is shard k. Hashes of ids, so the order depends on the content alone; inputs that begin alike share
    stream ids and ordinals, so the instance's id is the last to decide."""
    from pyspark.sql import functions as F

    def hashed(purpose: str) -> Any:
        return F.xxhash64(F.lit(purpose), F.col("stream_id"))

    placed = rows.withColumn("shard", F.pmod(hashed("shard"), F.lit(shards)).cast("int"))
    order = (hashed("order"), "stream_id", "ordinal", "instance_id")
    return placed.repartitionById(shards, "shard").sortWithinPartitions(*order)


def _pack_function(
    tokenizer: PackTokenizer, sequence_length: int
) -> Callable[[Iterator["pa.RecordBatch"]], Iterator["pa.RecordBatch"]]:
    """The task's function: rows of one shard in stored order -> its sequences."""

    def pack_shard(batches: Iterator["pa.RecordBatch"]) -> Iterator["pa.RecordBatch"]:
        from miniplm_udf import packing  # with the tokenizer library, which a driver need not have

        loaded = _load(tokenizer)
        shard: int | None = None

        def slices() -> Iterator["Slice"]:
            nonlocal shard
            for batch in batches:
                columns = [batch.column(name).to_pylist() for name in TEXT_COLUMNS]
                if shard is None and batch.num_rows:
                    shard = batch.column("shard")[0].as_py()
                for values in zip(*columns, strict=True):
                    yield packing.Slice(*values)

        group: list[PackedSequence] = []
        position = 0
        for sequence in packing.pack(slices(), loaded, tokenizer.document_separator_id, sequence_length):
            group.append(sequence)
            if len(group) == _ROWS_PER_BATCH:
                yield _to_arrow(group, shard, position)
                position += len(group)
                group = []
        if group:
            yield _to_arrow(group, shard, position)

    return pack_shard


def _load(tokenizer: PackTokenizer) -> Any:
    from miniplm_udf.scoring.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / TOKENIZER_FILE).write_bytes(tokenizer.content)
        return load_tokenizer(Path(folder))


def _to_arrow(group: list["PackedSequence"], shard: int | None, position: int) -> "pa.RecordBatch":
    import pyarrow as pa

    return pa.RecordBatch.from_arrays(
        [
            pa.array([shard] * len(group), pa.int32()),
            pa.array(range(position, position + len(group)), pa.int64()),
            pa.array([s.token_ids.astype("<i4").tobytes() for s in group], pa.binary()),
            pa.array([s.target_mask.tobytes() for s in group], pa.binary()),
            pa.array([int(s.target_mask.sum()) for s in group], pa.int32()),
            pa.array([s.n_new_tokens for s in group], pa.int64()),
        ],
        names=[field.split()[0] for field in _PACKED_DDL.split(", ")],
    )
