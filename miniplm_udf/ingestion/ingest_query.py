"""The ingest query: a stream over the input, deduplicated by id, into `instances` and `rejects`. Driver only.

Input: an `ExperimentConfig`; output: rows appended to two tables, and a summary of counts. Owns the checkpoint of
each format's query, `<root>/_checkpoints/ingest-<format>` (a checkpoint of one source is of no use to another), and
`<root>/tables/instances.json`, which says how the table is cut and split. No torch.

A micro-batch that is run again finds its (query, batch) in each table and writes nothing twice; a file that comes twice
is dropped by the state store; after a lost checkpoint, and beside another format's, new rows are anti-joined with those
of other queries. A file that cannot be read to its end fails its micro-batch before anything is written: it becomes one
row of `rejects`, and the batch runs again without it. The file source knows files by path alone: a file that was mended
or has grown must come under another name.
"""

import dataclasses
import datetime
import logging
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from miniplm_udf import removals, schemas, storage, tables
from miniplm_udf.config import ExperimentConfig, ModelConfig
from miniplm_udf.errors import ConfigError, CorpusError, MiniplmError, ModelLoadError
from miniplm_udf.ingestion.documents import RAW_BYTES, STAGE, reject_id
from miniplm_udf.ingestion.ingest import (
    INSTANCE,
    REJECT,
    ChunkingSpec,
    make_ingest_function,
    output_spark_schema,
    tokenizer_folder,
)
from miniplm_udf.ingestion.inputs import InputFile, Inputs, find_inputs, list_files, plain_path, same_file, stream
from miniplm_udf.scoring.description import with_absolute_path
from miniplm_udf.streams.backlog import rows_behind
from miniplm_udf.streams.query import Query, checkpoint_query_id
from miniplm_udf.streams.runner import QueryRunner

if TYPE_CHECKING:
    from pyspark.errors import StreamingQueryException
    from pyspark.sql import DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.ingest")

QUERY = "ingest"
# batch_id of a row that no micro-batch wrote: a file's quarantine.
OUTSIDE_BATCHES = -1
_UNREADABLE = re.compile(r"\[(FAILED_READ_FILE[.\w]*)\] Encountered error while reading file (.+?)\.(?:\s|$)")


@dataclasses.dataclass(frozen=True)
class _Counts:
    """What the tables hold: instances a split, rejects of ingest a reason, documents that begin in an instance."""

    instances: dict[str, int]
    rejects: dict[str, int]
    documents: int


def ingest(spark: "SparkSession", config: ExperimentConfig) -> dict[str, Any]:
    """Ingests all that is there and not ingested yet.

    Returns:
        `instances`, `rejected` (rows of the tables), `documents`, `new_instances`, `new_rejected`, `files` (seen now;
        0 for a table), `by_split` (instances a split), `seconds`, `too_many_rejects` (of documents and rejects).

    Raises:
        ConfigError: the input, a field or the chunking does not fit (see `find_inputs`), or differs from what the
            table was made with.
        ModelLoadError: the chunking tokenizer cannot be loaded.
        CorpusError: there is no instance in the end.
    """
    start = time.monotonic()
    inputs = find_inputs(spark, config.ingest)
    query = ingest_query(spark, config, inputs)
    before = _counts(spark, config)
    QueryRunner(spark, config.root, config.stream).run([query])
    summary = _summary(config, inputs, before, _counts(spark, config), time.monotonic() - start)
    _warn_of_empty_splits(config, summary)
    return summary


def executor_tokenizer_hash(spark: "SparkSession", model: ModelConfig) -> str:
    """The hash of a model's tokenizer, found where the model's files are: on an executor.

    Raises:
        ModelLoadError: as the executor says.
    """

    def probe(batches: Iterator[Any]) -> Iterator[Any]:
        import pyarrow as pa

        from miniplm_udf.scoring.tokenizer import load_tokenizer, tokenizer_hash

        for _ in batches:
            found, problem = None, None
            try:
                folder = tokenizer_folder(model)
                load_tokenizer(folder)
                found = tokenizer_hash(folder)
            except MiniplmError as error:
                problem = str(error)
            yield pa.RecordBatch.from_pydict(
                {"found": pa.array([found], pa.string()), "problem": pa.array([problem], pa.string())}
            )

    row = spark.range(0, 1, 1, 1).mapInArrow(probe, "found string, problem string").collect()[0]
    if row.problem is not None:
        raise ModelLoadError(f"ingest.chunking.tokenizer: {row.problem}")
    return str(row.found)


def chunking_model(config: ExperimentConfig) -> ModelConfig:
    alias = config.ingest.chunking.tokenizer
    model = config.models[alias]
    if model.path is None:
        raise ConfigError(
            f"ingest.chunking.tokenizer: expected a model that exists before the corpus does, found {alias!r}, which "
            "this experiment trains; name the teacher"
        )
    return with_absolute_path(model)


def _settle_spec(spark: "SparkSession", config: ExperimentConfig, spec: ChunkingSpec) -> None:
    """Keeps how the table is cut and split: under two rules the same text would be there twice."""
    uri, place = config.table_uri("instances"), config.table_uri("instances.json")
    wanted = {"chunking": dataclasses.asdict(spec), "split": dataclasses.asdict(config.ingest.split)}
    settled = storage.read_json(place)
    if settled == wanted:
        return
    if settled is not None and tables.exists(spark, uri) and not tables.read(spark, uri).isEmpty():
        changes = [
            f"{section}.{key}: {settled.get(section, {}).get(key)!r} there, {value!r} now"
            for section, values in wanted.items()
            for key, value in values.items()
            if settled.get(section, {}).get(key) != value
        ]
        raise ConfigError(
            f"root {storage.redact(config.root)}: its instances were cut and split by other rules "
            f"({'; '.join(changes)}); take these back, or ingest into a new root"
        )
    storage.write_json(place, wanted)


def ingest_query(spark: "SparkSession", config: ExperimentConfig, inputs: Inputs) -> Query:
    """The query that ingests `inputs` and what will be added to them, its tables made. It has a session of its own.

    Raises:
        ConfigError, ModelLoadError: as `ingest`.
    """
    model = chunking_model(config)
    spec = ChunkingSpec.of(config.ingest, model, executor_tokenizer_hash(spark, model))
    _settle_spec(spark, config, spec)
    for table in (schemas.INSTANCES, schemas.REJECTS):
        tables.create(spark, config.table_uri(table.name), table)
    function = make_ingest_function(config.ingest, model, spec)
    own = _own_session(spark, config)
    excluded = _quarantined(spark, config, inputs)

    def source() -> "DataFrame":
        # Looked at again: a table may have gained a column since.
        found = find_inputs(own, config.ingest) if inputs.format == "delta" else inputs
        rows = stream(own, found, config.ingest, excluded).mapInArrow(function, output_spark_schema())
        # With the lease in hand, which a take-down waits for: none comes while this runs.
        return _refuse(rows, removals.document_ids(spark, config.root)).dropDuplicates(["key"])

    def micro_batch(batch: "DataFrame", query_id: str, batch_id: int) -> None:
        _write_batch(
            batch, query_id, batch_id, config, storage.join(_checkpoint(config, inputs), "changed_batches.json")
        )
        for table in (schemas.INSTANCES, schemas.REJECTS):
            tables.compact(spark, config.table_uri(table.name), batch_id)

    def recover(error: "StreamingQueryException") -> bool:
        file, detail = _unreadable_file(spark, inputs, str(error))
        if file is None or file in excluded:
            return False
        LOGGER.warning("ingest: %s is left out (mended, give it another name): %s", file.path, detail)
        _quarantine(spark, config, inputs, file, detail)
        excluded.append(file)
        return True

    return Query(
        name=QUERY,
        # Of the table: it has one writer, whatever the input's format.
        lease=QUERY,
        checkpoint_uri=_checkpoint(config, inputs),
        source=source,
        micro_batch=micro_batch,
        recover=recover,
        backlog=lambda offset: _backlog(spark, config, inputs, offset),
        backlog_unit="rows" if inputs.format == "delta" else "files",
    )


def _refuse(rows: "DataFrame", taken_down: list[str]) -> "DataFrame":
    """Makes a reject without text of each instance that holds a document that was taken down.

    Of the whole instance, and after documents were cut: so what is refused never moves the cuts of its neighbours.
    """
    from pyspark.sql import functions as F

    if not taken_down:
        return rows
    found = F.array_intersect("document_ids", F.lit(taken_down))
    is_refused = (F.col("kind") == INSTANCE) & (F.size(found) > 0)
    detail = F.concat(F.lit("of documents that were taken down: "), F.array_join(found, ", "))
    values = {
        "kind": F.lit(REJECT), "key": F.md5(F.concat(F.lit("taken_down/"), "key").cast("binary")),
        "reason": F.lit("taken_down"), "detail": F.substring(detail, 1, RAW_BYTES),
        # It is in no table, so that none looks for it.
        "instance_id": F.lit(None), "text": F.lit(None), "metadata": F.lit(None),
    }  # fmt: skip
    return rows.select(
        *(
            F.when(is_refused, values[name]).otherwise(F.col(name)).alias(name) if name in values else F.col(name)
            for name in rows.columns
        )
    )


def _own_session(spark: "SparkSession", config: ExperimentConfig) -> "SparkSession":
    """A session for the query's settings, so that other queries of the command keep theirs.

    One input split is one partition, whatever else is in the micro-batch: packing never depends on the batch. The
    query's own copy of a session is not enough: a file source takes the size of its splits from the session that made
    the stream, batch after batch (measured).
    """
    split_bytes = str(config.ingest.chunking.split_bytes)
    own = spark.newSession()
    own.conf.set("spark.sql.files.maxPartitionBytes", split_bytes)
    own.conf.set("spark.sql.files.openCostInBytes", split_bytes)
    own.conf.set("spark.sql.shuffle.partitions", str(config.ingest.state_partitions))
    return own


def _backlog(spark: "SparkSession", config: ExperimentConfig, inputs: Inputs, offset: Any) -> int:
    """Files that are there and not taken yet, excluded ones apart; rows of a table."""
    if inputs.format == "delta":
        return rows_behind(spark, inputs.path, offset)
    log = storage.join(_checkpoint(config, inputs), "sources", "0")
    if offset is None or not storage.exists(log):
        taken = set()
    else:
        # Spark merges these files and removes old ones while we read.
        files = spark.read.option("ignoreMissingFiles", "true").text(log)
        entries = files.selectExpr("get_json_object(value, '$.path')").collect()
        taken = {plain_path(row[0]) for row in entries if row[0]}
    return sum(plain_path(file.path) not in taken for file in list_files(spark, inputs.path))


def _checkpoint(config: ExperimentConfig, inputs: Inputs) -> str:
    return config.checkpoint_uri(f"{QUERY}-{inputs.format}")


def _write_batch(batch: "DataFrame", query_id: str, batch_id: int, config: ExperimentConfig, changed_uri: str) -> None:
    """Appends a micro-batch to the tables that it has rows for: an empty commit would be a new version of nothing.

    It is consumed whole before the first write, and never left early: Delta skips the write of a replayed batch unread,
    and the state store would then miss its commit. Where a file has changed between a micro-batch and its replay, the
    table and the state store disagree on the batch: what the table lacks is added, and the batch is remembered at
    `changed_uri`, for rows that come again and are new to the state store alone.
    """
    from pyspark.sql import functions as F

    spark = batch.sparkSession
    changed = storage.read_json(changed_uri) or []
    batch.persist()
    try:
        n_rows = {row["kind"]: row["count"] for row in batch.groupBy("kind").count().collect()}
        now = datetime.datetime.now(datetime.UTC)
        marked = batch.withColumns({"query_id": F.lit(query_id), "batch_id": F.lit(batch_id).cast("bigint")})
        instances = marked.where(F.col("kind") == INSTANCE).withColumn("ingested_at", F.lit(now))
        rejects = marked.where(F.col("kind") == REJECT).withColumns(
            {"reject_id": F.col("key"), "stage": F.lit(STAGE), "rejected_at": F.lit(now)}
        )
        for kind, frame, table in ((INSTANCE, instances, schemas.INSTANCES), (REJECT, rejects, schemas.REJECTS)):
            uri, key = config.table_uri(table.name), table.key[0]
            there = tables.read(spark, uri)
            written = there.where((F.col("query_id") == query_id) & (F.col("batch_id") == batch_id))
            n_written = written.count()
            if not n_rows.get(kind) and not n_written:
                continue
            rows = frame.select(*table.column_names)
            # Rows of a lost checkpoint's query; Delta's statistics rule its files out where there are none.
            others = there.where((F.col("query_id") != query_id) | F.col("batch_id").isin([batch_id, *changed]))
            new = tables.missing_from(rows, others, key)
            if not n_written:
                tables.append(new, uri, table, query_id, batch_id)
                continue
            n_new = new.count()
            n_again = rows.join(written.select(key), key, "left_semi").count()
            if (n_new or n_again < n_written) and batch_id not in changed:
                LOGGER.warning("ingest: a file has changed since micro-batch %d was begun; it is read anew", batch_id)
                changed.append(batch_id)
                storage.write_json(changed_uri, changed)
            if n_new:
                tables.append(new, uri, table)
    finally:
        batch.unpersist()


def _unreadable_file(spark: "SparkSession", inputs: Inputs, message: str) -> tuple[InputFile | None, str]:
    """The file whose reading failed a query, and the error; (None, "") where it failed for another reason."""
    match = _UNREADABLE.search(message)
    if match is None or inputs.format == "delta":
        return None, ""
    causes = re.findall(r"^Caused by: (.+)$", message, re.MULTILINE)
    reading = [cause for cause in causes if not cause.startswith(("py4j.", "org.apache.spark."))]
    detail = f"{match.group(1)}: {reading[-1] if reading else 'see the log'}"
    files = [file for file in list_files(spark, inputs.path) if same_file(file.path, match.group(2))]
    if not files:
        raise CorpusError(f"{match.group(2)}: the file was there and went away while it was read; run again")
    return files[0], detail


def _quarantine_id(file: InputFile) -> str:
    return reject_id("unreadable_file", file.path, f"{file.modified_micros} {file.n_bytes}")


def _quarantine(spark: "SparkSession", config: ExperimentConfig, inputs: Inputs, file: InputFile, detail: str) -> None:
    row = {
        "reject_id": _quarantine_id(file),
        "stage": STAGE,
        "reason": "unreadable_file",
        "detail": detail[:RAW_BYTES],
        "source_file": file.path,
        "instance_id": None,
        "raw": None,
        "n_bytes": file.n_bytes,
        "rejected_at": datetime.datetime.now(datetime.UTC),
        "query_id": checkpoint_query_id(spark, _checkpoint(config, inputs)),
        "batch_id": OUTSIDE_BATCHES,
    }
    frame = spark.createDataFrame([row], schemas.REJECTS.spark_schema())
    tables.append(frame, config.table_uri("rejects"), schemas.REJECTS)


def _quarantined(spark: "SparkSession", config: ExperimentConfig, inputs: Inputs) -> list[InputFile]:
    """Files that could not be read before and have not changed since: a new checkpoint would take them up again."""
    rejects = tables.read(spark, config.table_uri("rejects")).where(f"stage = '{STAGE}' AND reason = 'unreadable_file'")
    known = {row[0] for row in rejects.select("reject_id").collect()}
    return [file for file in inputs.files if known and _quarantine_id(file) in known]


def _counts(spark: "SparkSession", config: ExperimentConfig) -> _Counts:
    from pyspark.sql import functions as F

    # A document begins with its instance, or behind another's end inside of one.
    begun = F.sum(F.col("starts_document").cast("int") + F.size("segment_ends"))
    instances = tables.read(spark, config.table_uri("instances")).groupBy("split").agg(F.count("*"), begun).collect()
    rejects = tables.read(spark, config.table_uri("rejects")).where(f"stage = '{STAGE}'").groupBy("reason").count()
    return _Counts(
        instances={row[0]: row[1] for row in instances},
        rejects=dict(rejects.collect()),
        documents=sum(row[2] for row in instances),
    )


def _summary(
    config: ExperimentConfig, inputs: Inputs, before: _Counts, after: _Counts, seconds: float
) -> dict[str, Any]:
    total, rejected = sum(after.instances.values()), sum(after.rejects.values())
    if total == 0:
        raise CorpusError(
            f"nothing was ingested: expected at least one document in {config.ingest.inputs}, found "
            f"{len(inputs.files)} files and rejects {after.rejects or 'none'}; "
            f"look at {storage.redact(config.table_uri('rejects'))}"
        )
    return {
        "documents": after.documents,
        "instances": total,
        "new_instances": total - sum(before.instances.values()),
        "rejected": rejected,
        "new_rejected": rejected - sum(before.rejects.values()),
        "files": len(inputs.files),
        "by_split": {split: after.instances.get(split, 0) for split in schemas.SPLITS},
        "seconds": round(seconds, 3),
        "too_many_rejects": rejected > config.ingest.max_reject_share * (after.documents + rejected),
    }


def _warn_of_empty_splits(config: ExperimentConfig, summary: dict[str, Any]) -> None:
    """Small inputs may leave a split empty by chance; the stage that wants it comes much later."""
    for split in ("heldout", "reference"):
        share = getattr(config.ingest.split, split)
        if share > 0 and not summary["by_split"][split]:
            LOGGER.warning(
                "ingest: the split %s is empty: none of %d documents fell into its share of %g; ingest more text, or "
                "raise ingest.split.%s and ingest into a new root",
                split, summary["documents"], share, split,
            )  # fmt: skip
