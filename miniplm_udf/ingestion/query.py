"""The ingest query: a stream over the input, deduplicated by id, into `instances` and `rejects`. Driver only, no torch.

Input: an `ExperimentConfig`. Output: rows appended to the tables, and an `IngestSummary`. Owns the checkpoint of each
format's query, `<root>/_checkpoints/ingest-<format>` (a source cannot use the checkpoint of another), and the record
`<root>/tables/instances.json` of how the table is cut and split.

A replayed micro-batch finds its (query, batch) in each table and writes nothing twice. The state store drops documents
that come twice; after a lost checkpoint, or with a second format, new rows are compared with the rows of other queries.
An unreadable file becomes one row of `rejects` before the query reads it (quarantine.py). The file source identifies
files by their path: a file that was replaced or has grown must come under another name.
"""

import dataclasses
import functools
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import ConfigError, MiniplmError, ModelLoadError
from miniplm_udf.ingestion.batches import refuse_taken_down, write_batch
from miniplm_udf.ingestion.copies import pack_function
from miniplm_udf.ingestion.inputs import Inputs, find_inputs, list_files, stream
from miniplm_udf.ingestion.listing import plain_path
from miniplm_udf.ingestion.packed import Packing, first_documents
from miniplm_udf.ingestion.quarantine import Quarantine, warn_of_changed
from miniplm_udf.ingestion.splits import ChunkingSpec, make_ingest_function, output_spark_schema, tokenizer_folder
from miniplm_udf.ingestion.summary import (
    IngestSummary,
    count_tables,
    documents_seen,
    observed,
    summarize,
    warn_of_empty_splits,
)
from miniplm_udf.ingestion.taken import TakenFile, changed_since, finished_batch, growth, taken_files
from miniplm_udf.scoring.description import with_absolute_path
from miniplm_udf.storage import Json
from miniplm_udf.store import tables, takedowns
from miniplm_udf.streams.backlog import rows_behind
from miniplm_udf.streams.facts import QueryFacts
from miniplm_udf.streams.query import Query, StartAgain
from miniplm_udf.streams.runner import QueryRunner
from miniplm_udf.streams.spark_log import QUERY_LOGGER, TASK_LOGGERS, silenced
from miniplm_udf.workers.remote import run_on_executor

if TYPE_CHECKING:
    from pyspark.errors import StreamingQueryException
    from pyspark.sql import DataFrame, SparkSession

LOGGER = logging.getLogger("miniplm.ingest")

QUERY = "ingest"


def ingest(spark: "SparkSession", config: ExperimentConfig) -> IngestSummary:
    """Ingests all input that is not ingested yet, and returns the counts.

    Args:
        spark: a session.
        config: the experiment.

    Raises:
        ConfigError: the input, a field or the chunking does not fit (see `find_inputs`), or the table was made by other
            settings.
        ModelLoadError: the chunking tokenizer cannot be loaded.
        CorpusError: no instance was ingested, now or before.
    """
    start = time.monotonic()
    inputs, taken = find_new_inputs(spark, config)
    query = IngestQuery(spark, config, inputs, taken)
    changed = changed_since(inputs.files, taken)
    before = count_tables(spark, config)
    # A damaged file that could not be checked fails its task four times, and then the query.
    with documents_seen([query.session]) as n_seen, silenced(spark, [QUERY_LOGGER, *TASK_LOGGERS]):
        QueryRunner(spark, config.root, config.stream).run([query])
        summary = summarize(config, inputs, before, count_tables(spark, config), n_seen(), changed)
    warn_of_empty_splits(config, summary)
    return dataclasses.replace(summary, seconds=round(time.monotonic() - start, 3))


def find_new_inputs(spark: "SparkSession", config: ExperimentConfig) -> tuple[Inputs, list[TakenFile]]:
    """Finds the input of the experiment; warns of files that changed after they were taken.

    Args:
        spark: the command's session.
        config: the experiment.

    Returns:
        The input (`find_inputs`), and the files that its query has taken, whose footers are not read again.

    Raises:
        ConfigError: the input does not fit the config (see `find_inputs`).
    """
    # Called with the format, which `find_inputs` finds out by the names of the files.
    taken = functools.cache(lambda kind: taken_files(_checkpoint(config, kind)))

    def ingested(kind: str) -> set[str]:
        finished = finished_batch(_checkpoint(config, kind))
        return {plain_path(file.path) for file in taken(kind) if file.batch_id <= finished}

    inputs = find_inputs(spark, config.ingest, ingested)
    files = [] if inputs.format == "delta" else taken(inputs.format)
    warn_of_changed(changed_since(inputs.files, files), growth(inputs.files, files))
    return inputs, files


def executor_tokenizer_hash(spark: "SparkSession", model: ModelConfig) -> str:
    """Computes the hash of a model's tokenizer on an executor, where the model's files are.

    Args:
        spark: a session.
        model: the model, with a path that an executor understands.

    Returns:
        32 hexadecimal digits.

    Raises:
        ModelLoadError: the executor cannot load the tokenizer.
    """

    def find_hash() -> str:
        from miniplm_udf.scoring.tokenizer import load_tokenizer, tokenizer_hash

        folder = tokenizer_folder(model)
        load_tokenizer(folder)
        return tokenizer_hash(folder)

    try:
        return run_on_executor(spark, find_hash)
    except MiniplmError as error:
        raise ModelLoadError(f"ingest.chunking.tokenizer: {error}") from error


def chunking_model(config: ExperimentConfig) -> ModelConfig:
    """Returns the model whose tokenizer counts the tokens of chunks, with an absolute path.

    Args:
        config: the experiment.

    Raises:
        ConfigError: this experiment trains the model.
    """
    alias = config.ingest.chunking.tokenizer
    model = config.models[alias]
    if model.path is None:
        raise ConfigError(
            f"ingest.chunking.tokenizer: expected a model that exists before the corpus does, found {alias!r}, which "
            "this experiment trains; name the teacher"
        )
    return with_absolute_path(model)


def _record_rules(spark: "SparkSession", config: ExperimentConfig, spec: ChunkingSpec) -> None:
    """Records how the table is cut and split. By two rules, the same text would be in the table twice.

    Raises:
        ConfigError: the table holds instances that were cut or split by other rules.
    """
    uri, record = config.layout.table("instances"), config.layout.chunking_record
    rules = {"chunking": dataclasses.asdict(spec), "split": dataclasses.asdict(config.ingest.split)}
    if spec.mode == "packed":
        # Not in the spec, whose hash is part of ids: a corpus without copies keeps the ids of earlier releases.
        rules["chunking"]["copies"] = "packed once"
    recorded = storage.read_json(record)
    if recorded == rules:
        return
    if recorded is not None and tables.exists(spark, uri) and not tables.read(spark, uri).isEmpty():
        raise ConfigError(_rules_differ(config, recorded, rules))
    storage.write_json(record, rules)


def _rules_differ(config: ExperimentConfig, recorded: Json, rules: dict[str, Json]) -> str:
    changes = [
        f"{section}.{key}: {recorded.get(section, {}).get(key)!r} there, {value!r} now"
        for section, values in rules.items()
        for key, value in values.items()
        if recorded.get(section, {}).get(key) != value
    ]
    remedy = "undo these changes, or ingest into a new root"
    if rules["chunking"]["mode"] == recorded["chunking"].get("mode") == "packed" and (
        "copies" not in recorded["chunking"]
    ):
        remedy = (
            "this release packs each document once, an earlier one packed every copy, and one table cannot hold both: "
            "ingest into a new root, or continue with the earlier release"
        )
    return (
        f"root {storage.redact(config.root)}: its instances were cut and split by other rules "
        f"({'; '.join(changes)}); {remedy}"
    )


class IngestQuery(Query):
    """The query that ingests `inputs` and the files that will be added to them; makes its empty tables.

    Args:
        spark: the command's session.
        config: the experiment.
        inputs: format and files of `ingest.input` (`find_new_inputs`).
        taken: the files that the query has taken (`find_new_inputs`).

    Attributes:
        session: the session that the query runs in.

    Raises:
        ConfigError: the chunking does not fit, or the table was made by other settings.
        ModelLoadError: the chunking tokenizer cannot be loaded.
    """

    def __init__(
        self, spark: "SparkSession", config: ExperimentConfig, inputs: Inputs, taken: Sequence[TakenFile]
    ) -> None:
        model = chunking_model(config)
        spec = ChunkingSpec.of(config.ingest, model, executor_tokenizer_hash(spark, model))
        _record_rules(spark, config, spec)
        self._is_packed = spec.mode == "packed"
        self._tables = (*([schemas.DOCUMENT_KEYS] if self._is_packed else []), schemas.INSTANCES, schemas.REJECTS)
        for table in self._tables:
            tables.create(spark, config.layout.table(table.name), table)
        self._function = (pack_function if self._is_packed else make_ingest_function)(config.ingest, model, spec)
        checkpoint = _checkpoint(config, inputs.format)
        # The table's lease: it has one writer, whatever the input's format.
        super().__init__(QUERY, QueryFacts(stage=QUERY, lease=QUERY, input_format=inputs.format), checkpoint)
        self.backlog_unit = "rows" if inputs.format == "delta" else "files"
        self._spark, self._config, self._inputs = spark, config, inputs
        self.session = _query_session(spark, config)
        self._quarantine = Quarantine(spark, config, checkpoint, inputs, taken)
        self._changed_uri = storage.join(checkpoint, "changed_batches.json")

    def source(self) -> "DataFrame":
        ingest = self._config.ingest
        self._quarantine.check()
        # The table is read again: it may have gained a column since the query was made.
        inputs = find_inputs(self.session, ingest) if self._inputs.format == "delta" else self._quarantine.inputs
        rows = stream(self.session, inputs, ingest, self._quarantine.excluded)
        if self._is_packed:
            return first_documents(rows, self._config)
        # The lease is held, which a take-down waits for: no document is taken down while this query runs.
        taken_down = takedowns.document_ids(self._spark, self._config.root)
        rows = refuse_taken_down(rows.mapInArrow(self._function, output_spark_schema()), taken_down)
        return observed(rows).dropDuplicates(["key"])

    def micro_batch(self, batch: "DataFrame", query_id: str, batch_id: int) -> None:
        if self._quarantine.check_batch(batch_id):
            raise StartAgain
        config, changed_uri = self._config, self._changed_uri
        if self._is_packed:
            with Packing(config, self._function, changed_uri).packed(batch, query_id, batch_id) as rows:
                write_batch(rows, query_id, batch_id, config, changed_uri)
        else:
            write_batch(batch, query_id, batch_id, config, changed_uri)
        for table in self._tables:
            tables.compact(self._spark, config.layout.table(table.name), batch_id)

    def recover(self, error: "StreamingQueryException") -> bool:
        return self._quarantine.recover(str(error))

    def backlog(self, offset: Any) -> int:
        """Counts the input that the query has not taken yet.

        Args:
            offset: end offset of the newest finished micro-batch (parsed JSON); None before the first is finished.

        Returns:
            Files; for a Delta table, rows.
        """
        if self._inputs.format == "delta":
            return rows_behind(self._spark, self._inputs.path, offset)
        # Before its first micro-batch is finished, a query has a log of files but no offset.
        files = [] if offset is None else taken_files(self.checkpoint_uri)
        taken = {plain_path(file.path) for file in files}
        return sum(plain_path(file.path) not in taken for file in list_files(self._spark, self._inputs.path))


def _query_session(spark: "SparkSession", config: ExperimentConfig) -> "SparkSession":
    """Makes a session with the query's settings, so that other queries of the command keep theirs.

    One input split is one partition, whatever else is in the micro-batch, so that packing never depends on the batch.
    The copy of a session that Spark makes for each query is not enough: a file source takes the size of its splits
    from the session that made the stream (measured).
    """
    split_bytes = str(config.ingest.chunking.split_bytes)
    session = spark.newSession()
    session.conf.set("spark.sql.files.maxPartitionBytes", split_bytes)
    session.conf.set("spark.sql.files.openCostInBytes", split_bytes)
    session.conf.set("spark.sql.shuffle.partitions", str(config.ingest.state_partitions))
    return session


def _checkpoint(config: ExperimentConfig, kind: str) -> str:
    return config.layout.checkpoint(f"{QUERY}-{kind}")
