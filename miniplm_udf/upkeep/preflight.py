"""Checks before a command starts: everything that is wrong at once; every table of the root exists. Driver only.

`problems` comes first, before Spark starts and before anything is written: it asks each check that a stage of the
command needs (`_CHECKS`) for what is wrong with the config on this machine. `warn` logs what does not stop the command.
Then, with Spark, `check` looks for lost tables. Input: a config, and the stages, tables and queries of the command;
output: sentences, or a `MiniplmError` that names the lost table and the remedy. A checkpoint records what its query has
read, but not the rows that the query wrote: if a table is lost or was made again, the query would skip rows that exist
nowhere, or fail with Delta's message. A command is refused if it needs a lost table; for other lost tables a warning is
logged. Queries that build their own table (the matrix, the proxy's table, a followed corpus) detect the loss by
themselves. Reads the files of the checkpoints, the log of each table named there, and the rows of `corpora` and `pins`.
Writes only an empty file, which it removes at once.
"""

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.ingestion.input_files import listed_once
from miniplm_udf.layout import Root, shown_table
from miniplm_udf.schemas import table_names
from miniplm_udf.schemas.table_kinds import EFFECT_OF_REMOVAL, KINDS, TableKind, find_kind
from miniplm_udf.store import delta_log, pins, tables
from miniplm_udf.store.delta_log import has_commits
from miniplm_udf.streams import checkpoints
from miniplm_udf.streams.checkpoints import Checkpoint
from miniplm_udf.streams.offsets import end_offset
from miniplm_udf.upkeep import storage_probe
from miniplm_udf.upkeep.evaluation_checks import contamination_problems, evaluation_problems
from miniplm_udf.upkeep.expression_checks import expression_problems
from miniplm_udf.upkeep.input_checks import chunking_problems, input_problems
from miniplm_udf.upkeep.machine_checks import disk_problems, port_problems, root_problems
from miniplm_udf.upkeep.model_checks import model_problems, model_warnings
from miniplm_udf.upkeep.seen_text_checks import seen_text_problems, seen_text_warnings
from miniplm_udf.upkeep.tracking_checks import tracking_warnings
from miniplm_udf.upkeep.training_checks import reference_problems, student_problems, tokenizer_problems

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.preflight")

# Queries that build their tables again by themselves, by stage.
_REBUILT = ("score_matrix", "proxy")
# The tables whose loss is noticed, except corpora and pinned copies: a user may have dropped these on purpose, and a
# command that reads one of them fails by itself.
EVERY_TABLE = tuple(
    kind.name for kind in KINDS if kind.remedy and kind.name not in (table_names.REFINED, table_names.PINNED)
)


@dataclasses.dataclass(frozen=True)
class LostTable:
    """A table that existed and is gone.

    Attributes:
        name: below `tables/`.
        named_by: the checkpoint, record or table that names it, in words.
    """

    name: str
    named_by: str

    @property
    def kind(self) -> TableKind:
        """The kind of the table."""
        return find_kind(self.name)

    def __str__(self) -> str:
        return (
            f"expected the table {shown_table(self.name)}, which {self.named_by} names, found none; put it back from a "
            f"copy, or {self.kind.remedy}"
        )


# A check yields what is wrong, each a sentence with its key and its remedy; the stages whose commands need it.
_CHECKS: tuple[tuple[Callable[[ExperimentConfig], Iterator[str]], frozenset[str]], ...] = (
    (input_problems, frozenset({"ingest"})),
    (chunking_problems, frozenset({"ingest", "stream"})),
    (disk_problems, frozenset({"ingest"})),
    (seen_text_problems, frozenset({"score", "stream"})),
    (reference_problems, frozenset({"reference"})),
    (expression_problems, frozenset({"refine", "proxy"})),
    (tokenizer_problems, frozenset({"pack"})),
    (student_problems, frozenset({"train"})),
    (contamination_problems, frozenset({"annotate"})),
    (evaluation_problems, frozenset({"evaluate"})),
    (port_problems, frozenset({"ingest", "score", "proxy", "generate", "stream"})),
)

# The stages that write to MLflow's store or read it.
_TRACKED = frozenset({"reference", "train", "evaluate", "report"})


def problems(config: ExperimentConfig, stages: Collection[str]) -> list[str]:
    """Returns everything that is wrong with a config on this machine, as far as it can be seen at once.

    Reads the first rows of the input and the small files of the models; starts no Spark and writes nothing.

    Args:
        config: the experiment; its root is empty if the config has none that can be used.
        stages: the stages that the command will run.

    Returns:
        Sentences with the key and the remedy; empty if the command may start.
    """
    result = list(root_problems(config))
    result += model_problems(config, _models_of(config, stages))
    with listed_once():
        for check_of, needing in _CHECKS:
            if needing & set(stages):
                result += check_of(config)
    return list(dict.fromkeys(result))


def warn(config: ExperimentConfig, stages: Collection[str]) -> None:
    """Logs what a command may start with, but may have to be fixed: a server that does not answer, a chat token.

    Args:
        config: the experiment, in which `problems` finds nothing.
        stages: the stages that the command will run.
    """
    warnings = list(model_warnings(config, _models_of(config, stages)))
    if {"score", "stream"} & set(stages):
        warnings += seen_text_warnings(config)
    if _TRACKED & set(stages):
        warnings += tracking_warnings(config)
    for warning in warnings:
        LOGGER.warning("%s", warning)


def _models_of(config: ExperimentConfig, stages: Collection[str]) -> list[str]:
    """Aliases of the models whose files the stages read, each once."""
    teachers = [student.train.kd_teacher for student in config.students.values() if student.train.kd_ratio]
    by_stage = {
        "ingest": [config.ingest.chunking.tokenizer],
        "reference": [config.reference.tokenizer] if config.reference else [],
        "score": config.scored_aliases,
        "stream": [config.ingest.chunking.tokenizer, *config.scored_aliases],
        "generate": [config.generate.model] if config.generate else [],
        "train": teachers,
    }
    return list(dict.fromkeys(alias for stage in by_stage if stage in stages for alias in by_stage[stage]))


def check(spark: "SparkSession", config: ExperimentConfig, needed: Sequence[str], queries: Sequence[str] = ()) -> None:
    """Refuses a command whose root has lost a table or record that the command needs.

    Args:
        spark: any session.
        config: its root is checked.
        needed: kinds of tables that the command needs, besides those that its queries have read or written.
        queries: stages of the streaming queries that the command runs.

    Raises:
        ConfigError: the table to ingest is another one than before.
        CorpusError: a needed table is gone, or was made again under a query that continues; a record is gone.
    """
    lost = lost_tables(spark, config.root)
    _require(config.root, lost, needed)
    _require_tables_of_queries(config.root, queries)
    for table in lost:
        LOGGER.warning("%s", table)
    if "ingest" in queries:
        _require_chunking_record(spark, config.root)
        _require_same_input(spark, config)


def check_files(root: str, needed: Sequence[str]) -> None:
    """Refuses a command that runs without Spark if it needs a lost table that checkpoints, records or folders name.

    Args:
        root: URI of the root.
        needed: kinds of tables that the command needs.

    Raises:
        CorpusError: a table that the command needs is gone.
    """
    lost = _lost(root, _named_by_files(root))
    _require(root, lost, needed)
    for table in lost:
        LOGGER.warning("%s", table)


def _require(root: str, lost: Sequence[LostTable], needed: Sequence[str]) -> None:
    """Refuses a command if one of the kinds that it needs is lost."""
    if missing := [str(table) for table in lost if table.kind.name in needed]:
        raise CorpusError(f"root {storage.redact(root)}: {'; '.join(missing)}")


def lost_tables(spark: "SparkSession", root: str) -> list[LostTable]:
    """Returns the missing tables: checkpoints, records or other tables of the root name them, and they do not exist.

    Args:
        spark: any session.
        root: URI of the root.
    """
    return _lost(root, _expected(spark, root))


def _lost(root: str, expected: dict[str, str]) -> list[LostTable]:
    return [LostTable(name, named_by) for name, named_by in expected.items() if not has_commits(Root(root).table(name))]


def _expected(spark: "SparkSession", root: str) -> dict[str, str]:
    """The tables that a root has had: by name, the checkpoint, record, folder or table that names it."""
    expected = _named_by_files(root)
    if has_commits(Root(root).table("corpora")):
        recorded = tables.read(spark, Root(root).table("corpora")).select("name").distinct().collect()
        named_by = f"the table {shown_table('corpora')}"
        expected |= {table_names.refined(row[0]): named_by for row in sorted(recorded)}
    copies = [table_names.pinned(pin.name, pin.version) for pin in pins.find(spark, root)]
    return expected | dict.fromkeys(copies, f"the table {shown_table('pins')}")


def _written_by(query: Checkpoint) -> list[str]:
    """Names of the tables that a query with a micro-batch has certainly written."""
    return [kind.name for kind in KINDS if query.stage in kind.queries and not kind.is_optional]


def _named_by_files(root: str) -> dict[str, str]:
    """The tables that the checkpoints, records and folders of a root name, each with what names it."""
    expected: dict[str, str] = {}
    layout = Root(root)
    queries = [query for query in checkpoints.find(root) if query.batch_id is not None]
    for query in queries:
        expected |= dict.fromkeys(_written_by(query), f"the checkpoint {query.name}")
    rules = storage.read_json(layout.chunking_record) or {}
    # Releases that packed every copy of a document had no keys.
    if "copies" in rules.get("chunking", {}) and any(query.stage == "ingest" for query in queries):
        expected["document_keys"] = f"the record {layout.relative(layout.chunking_record)}"
    if storage.exists(layout.stage("annotate")):
        expected["annotations"] = f"the record {layout.relative(layout.stage('annotate'))}"
    if names := storage.list_folder(layout.refined()):
        expected["corpora"] = f"the table {layout.relative(layout.refined(names[0]))}"
    return expected


def require_writable(root: str) -> None:
    """Refuses a root that cannot be made or written, with the reason that the operating system or the service gives.

    Args:
        root: path or URI of the root; only local ones and those on S3 are checked.

    Raises:
        ConfigError: it cannot be written.
    """
    storage_probe.probe(root)
    if not storage.is_local(root):
        return
    path = Path(storage.local_path(root))
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".writable."):
            pass
    except OSError as error:
        raise ConfigError(
            f"root {path}: expected a folder that can be made and written, found: {error.strerror or error}; choose "
            "another folder with root=FOLDER, or have its owner permit writing"
        ) from error


def _require_tables_of_queries(root: str, stages: Sequence[str]) -> None:
    """Refuses queries of these stages that have read or written a table which is gone or was made again."""
    queries = [query for query in checkpoints.find(root) if query.stage in stages] if stages else []
    lost = [(query, names) for query in queries if (names := set(_lost_tables_of(root, query)))]
    if lost:
        raise CorpusError(_message(root, lost))


def _lost_tables_of(root: str, query: Checkpoint) -> Iterator[str]:
    """Names of the tables that the query has read or written and that are gone, or are now other tables."""
    if query.batch_id is not None and query.stage not in _REBUILT:
        yield from (name for name in _written_by(query) if not has_commits(Root(root).table(name)))
    offset = query.offset or end_offset(query.uri, 0)
    if query.source is not None and offset is not None:
        uri = Root(root).table(query.source)
        source = delta_log.identity(uri)
        if source is None or source.id != offset.get("reservoirId", source.id):
            yield query.source


def _message(root: str, lost: list[tuple[Checkpoint, set[str]]]) -> str:
    names = sorted({name for _, lost_names in lost for name in lost_names})
    folders = [storage.redact(query.uri) for query, _ in lost]
    stages = [stage for stage in EFFECT_OF_REMOVAL if any(query.stage == stage for query, _ in lost)]
    return (
        f"root {storage.redact(root)}: expected the table{'s' if len(names) > 1 else ''} "
        f"{', '.join(map(shown_table, names))} that its queries have read or written, found none or another "
        f"one in its place. Put the table back from a copy; or remove {', '.join(folders)} and run again: "
        f"{'; '.join(EFFECT_OF_REMOVAL[stage] for stage in stages)}"
    )


def _require_chunking_record(spark: "SparkSession", root: str) -> None:
    """Refuses to add to instances whose chunking rules are not recorded: the same text could be added twice."""
    record, instances = Root(root).chunking_record, Root(root).table("instances")
    if not storage.exists(record) and tables.exists(spark, instances) and not tables.read(spark, instances).isEmpty():
        raise CorpusError(
            f"record {storage.redact(record)}: expected how the instances were cut and split, found no file; put "
            "it back from a copy, or ingest into a new root"
        )


def _require_same_input(spark: "SparkSession", config: ExperimentConfig) -> None:
    """Refuses to ingest a Delta table that is not the table whose versions the checkpoint counts."""
    queries = checkpoints.find(config.root)
    query = next((query for query in queries if query.stage == "ingest" and query.facts.input_format == "delta"), None)
    offset = None if query is None else query.offset or end_offset(query.uri, 0)
    if query is None or offset is None or config.ingest.format not in ("auto", "delta"):
        return
    for uri in map(storage.to_uri, config.ingest.inputs):
        is_table = tables.exists(spark, uri) and has_commits(uri)
        table = tables.detail(spark, uri) if is_table else None
        if table is not None and table["id"] != offset["reservoirId"]:
            raise ConfigError(
                f"ingest.input: expected the Delta table that was ingested before (id {offset['reservoirId']}), found "
                f"another table (id {table['id']}) at {storage.redact(uri)}: it was made again, or the config names "
                f"another table. Put the first table back; or remove {storage.redact(query.uri)} and run again: ingest "
                "then reads the whole table, and adds the documents that are not there yet"
            )
