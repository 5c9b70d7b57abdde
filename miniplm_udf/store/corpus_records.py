"""Versions of refined corpora: commits a version, records it, finds its number and provenance, and reads its rows.

Owns the table `corpora`, one row per version, which outlives the Delta log that holds the same provenance as
`userMetadata`. Owns no selection (`refine.py`, `follow.py`). Versions are Delta versions of `refined/<name>`; a pinned
version is read from its copy (`pins.py`). If two drivers commit on top of the same version, the second gets an error.
A retry adds no second row of `corpora` for a version. Driver only.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote

from miniplm_udf import schemas, storage
from miniplm_udf.errors import CorpusError
from miniplm_udf.layout import Root, shown_table
from miniplm_udf.schemas.types import TableRow
from miniplm_udf.storage import Json
from miniplm_udf.store import delta_log, pins, tables
from miniplm_udf.store.provenance import CorpusRow, Provenance

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

# Delta's transaction id for the commits of `commit`, which are numbered by the version that they build on.
_COMMITS = "commits"
# Attributes of a provenance that `inputs` of a row holds too, unless they are empty.
_RECORDED_APART = ("followed", "derived", "cuts", "diagnostics")
# Commits that change no row.
MAINTENANCE = (
    "OPTIMIZE", "REORG", "REMOVE COLUMN MAPPING", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES", "UPGRADE PROTOCOL",
)  # fmt: skip
# Words in Spark's and Delta's errors about a version or files that no longer exist.
_GONE = re.compile(
    r"DELTA_\w*(VERSION|TIME_TRAVEL|LOG_FILE|TRUNCATED)|VersionNotFound|time travel"
    r"|FileNotFound|FILE_NOT_EXIST|does not exist|READ_FILE"
)


@dataclasses.dataclass(frozen=True)
class Newest:
    """The newest state of a table that `commit` writes.

    Attributes:
        base: the newest version, maintenance included.
        version: the newest version that changed rows.
        metadata: the `userMetadata` of that version's commit; None if it has none.
    """

    base: int
    version: int
    metadata: Json | None

    @property
    def provenance(self) -> Provenance | None:
        """The parsed metadata; None if a refinement of this code did not write the commit."""
        try:
            return Provenance(**self.metadata) if self.metadata else None
        except TypeError:
            return None


def newest(uri: str) -> Newest | None:
    """The newest state of a table; None if there is no table. Reads the log from its end, so only a few commits.

    Args:
        uri: location of the table.

    Raises:
        CorpusError: the log holds only maintenance.
    """
    base = delta_log.newest_version(uri)
    if base is None:
        return None
    for commit in delta_log.commits(uri, base):
        if commit.operation not in MAINTENANCE:
            return Newest(base, commit.version, commit.metadata())
    raise CorpusError(
        f"table {storage.redact(uri)}: expected a commit that wrote rows in its log, found only maintenance; restore "
        "the log from a copy, or move the folder away and run again"
    )


def commit(
    frame: "DataFrame", uri: str, table: schemas.Table, metadata: Json, on: Newest | None, replaces: bool
) -> int:
    """Replaces the rows or appends rows, in one commit on top of the state `on`.

    Delta's transaction id guards the commit. It is numbered by the version that the commit builds on: if another call
    of this function has committed since, Delta either drops the write or refuses it.

    Args:
        frame: rows with the declared columns.
        uri: location of the table.
        table: its declaration.
        metadata: becomes `userMetadata`.
        on: the state that the rows were chosen with; None if there was no table.
        replaces: whether the rows replace all rows of the table, or are appended.

    Returns:
        The version of the commit.

    Raises:
        CorpusError: another driver has committed meanwhile.
    """
    number = on.base + 1 if on else 0
    write = tables.overwrite if replaces else tables.append
    try:
        write(frame, uri, table, metadata=metadata, query_id=_COMMITS, batch_id=number)
    except tables.conflicts() as error:
        raise _overtaken(uri) from error
    state = newest(uri)
    if state is None or state.metadata != json.loads(json.dumps(metadata)):
        raise _overtaken(uri)
    return state.version


def _overtaken(uri: str) -> CorpusError:
    return CorpusError(
        f"table {storage.redact(uri)}: another driver has written a version meanwhile, so this version would build on "
        "an old one; nothing was written: run again"
    )


def list_corpora(spark: "SparkSession", root: str) -> "DataFrame":
    """The table `corpora`: all versions of all corpora, sorted by name and version.

    Args:
        spark: any session.
        root: path or URI of the root.

    Raises:
        CorpusError: there is no such table.
    """
    return tables.read(spark, Root(root).table("corpora")).orderBy("name", "version")


def show_corpus(spark: "SparkSession", root: str, name: str, version: int | None = None) -> CorpusRow:
    """The row of `corpora` of a version, with its JSON parsed.

    Args:
        spark: any session.
        root: path or URI of the root.
        name: name of the corpus.
        version: None takes the newest.

    Raises:
        CorpusError: there is no such corpus or version.
    """
    rows = [row.asDict() for row in list_corpora(spark, root).collect()]
    return parsed(choose_version(rows, name, version))


def choose_version(rows: Sequence[TableRow], name: str, version: int | None = None) -> TableRow:
    """Chooses the row of one version among the rows of `corpora`.

    Args:
        rows: all rows of the table, sorted by name and version.
        name: the corpus.
        version: its version; None takes the newest.

    Returns:
        The row, its JSON not parsed.

    Raises:
        CorpusError: there is no such corpus or version.
    """
    of_corpus = [row for row in rows if row["name"] == name]
    chosen = [row for row in of_corpus if version is None or row["version"] == version]
    if not chosen:
        names = sorted({row["name"] for row in rows})
        versions = f", versions {[row['version'] for row in of_corpus]}" if of_corpus else ""
        raise CorpusError(
            f"corpus {name!r}, version {'newest' if version is None else version}: expected one of the corpora {names}"
            f"{versions}; run `miniplm refine` to make one"
        )
    return chosen[-1]


def parsed(row: TableRow) -> CorpusRow:
    """Returns a row of `corpora` with its JSON parsed.

    Args:
        row: the row, whose `config` and `inputs` are JSON texts.
    """
    return cast(CorpusRow, {**row, "config": json.loads(row["config"]), "inputs": json.loads(row["inputs"])})


def parse_address(address: str, find_pins: Callable[[], Sequence[pins.Pin]]) -> tuple[str, int | None]:
    """Splits the address of a version into the corpus and the number.

    Args:
        address: `NAME`, `NAME@NUMBER` or `NAME@TAG`.
        find_pins: reads the pins of the root; called for a tag only.

    Returns:
        The name, and the number of the version; None for the newest. Neither is looked up in `corpora`.

    Raises:
        CorpusError: no version of the corpus has the tag.
    """
    name, _, wanted = address.partition("@")
    if not wanted or wanted.isdigit():
        return name, int(wanted) if wanted else None
    versions = {pin.tag: pin.version for pin in find_pins() if pin.name == name and pin.tag}
    if wanted not in versions:
        raise CorpusError(
            f"version {address!r}: expected a number, or a tag of {name!r}, which has "
            f"{sorted(versions) or 'none'}; `miniplm corpus pin {name}@NUMBER --tag {wanted}` gives it one"
        )
    return name, versions[wanted]


def read_corpus(spark: "SparkSession", root: str, name: str, version: int | None = None) -> "DataFrame":
    """The rows of a version of a corpus: ids and scores, no text.

    Args:
        spark: any session.
        root: path or URI of the root.
        name: name of the corpus.
        version: None reads the newest.

    Raises:
        CorpusError: there is no such corpus or version; or it is not pinned, and its log or files are gone.
    """
    number = int(show_corpus(spark, root, name, version)["version"])
    with readable(name, number):
        if pins.of_version(spark, root, name, number) is not None:
            return pins.read(spark, root, name, number)
        if not tables.exists(spark, Root(root).refined(name)):
            raise CorpusError(no_table_message(root, name, [number]))
        return with_files(tables.read(spark, Root(root).refined(name), number))


def with_files(rows: "DataFrame") -> "DataFrame":
    """Returns the frame after checking that its files exist, because Spark logs a trace for each missing file.

    Args:
        rows: a frame that reads files.

    Raises:
        FileNotFoundError: a file is missing.
    """
    for file in rows.inputFiles():
        if not storage.exists(unquote(file)):
            raise FileNotFoundError(f"FileNotFound: {storage.redact(file)}")
    return rows


def is_gone(error: Exception) -> bool:
    """Whether a read failed because the version or its files no longer exist.

    Args:
        error: any error of Spark, Delta or `with_files`.
    """
    return bool(_GONE.search(str(error)))


@contextlib.contextmanager
def readable(name: str, version: int) -> Iterator[None]:
    """Turns errors of the block that say that the `version` of the corpus `name` is missing into a `CorpusError`.

    Raises:
        CorpusError: the version is gone.
    """
    try:
        yield
    except CorpusError:
        raise
    except Exception as error:
        if not is_gone(error):
            raise
        raise CorpusError(gone_message(name, version)) from error


def gone_message(name: str, version: int) -> str:
    """Says that the rows of a `version` of the corpus `name` are gone, and how to make them again."""
    return (
        f"corpus {name!r}, version {version}: expected its files, found that they are gone: a version that is not "
        "pinned is kept until maintenance or a take-down removes it; `miniplm corpus rebuild` makes its rows again"
    )


def provenance_of(spark: "SparkSession", root: str, name: str, version: int) -> Provenance:
    """Returns a version's provenance from its row of `corpora`, which outlives the log. `n_unscorable` and
    `kept_share_by_source` are not in the row, so they are None and empty.

    Args:
        spark: any session.
        root: path or URI of the root.
        name: name of the corpus.
        version: its number.

    Raises:
        CorpusError: there is no such corpus or version.
    """
    row = show_corpus(spark, root, name, version)
    inputs: Any = dict(row["inputs"])
    revisions = inputs.pop("model_revisions", {})
    apart = {key: inputs.pop(key) for key in _RECORDED_APART if key in inputs}
    return Provenance(
        corpus=name,
        config=row["config"],
        inputs=inputs,
        model_revisions=revisions,
        n_unscorable=None,
        code_revision=row["code_revision"],
        kept_share_by_source={},
        threshold=row["threshold"],
        n_candidates=row["n_candidates"],
        candidate_tokens=row["candidate_tokens"],
        n_instances=row["n_instances"],
        n_tokens=row["n_tokens"],
        fingerprint=row["fingerprint"],
        **apart,
    )


def record(spark: "SparkSession", root: str, version: int, provenance: Provenance) -> bool:
    """Adds the row of a version to `corpora`, unless the version has a row.

    Args:
        spark: any session.
        root: path or URI of the root.
        version: number of the version.
        provenance: becomes the row.

    Returns:
        Whether a row was added.
    """
    from pyspark.sql import functions as F

    tables.create(spark, Root(root).table("corpora"), schemas.CORPORA)
    rows = tables.read(spark, Root(root).table("corpora")).where(
        (F.col("name") == provenance.corpus) & (F.col("version") == version)
    )
    if not rows.isEmpty():
        return False
    inputs = {**provenance.inputs, "model_revisions": provenance.model_revisions}
    for key in _RECORDED_APART:
        if value := getattr(provenance, key):
            inputs[key] = value
    values: TableRow = {
        "name": provenance.corpus,
        "version": version,
        "config": json.dumps(provenance.config, sort_keys=True),
        "inputs": json.dumps(inputs, sort_keys=True),
        **{
            name: getattr(provenance, name)
            for name in ("threshold", "n_candidates", "candidate_tokens", "n_instances", "n_tokens", "fingerprint")
        },
        "code_revision": provenance.code_revision,
    }
    declared = schemas.CORPORA.spark_schema()
    schema = type(declared)([field for field in declared.fields if field.name in values])
    row = spark.createDataFrame([tuple(values[name] for name in schema.names)], schema)
    tables.append(row.withColumn("created_at", F.current_timestamp()), Root(root).table("corpora"), schemas.CORPORA)
    tables.compact(spark, Root(root).table("corpora"), version)
    return True


def require_unrecorded(spark: "SparkSession", root: str, name: str) -> None:
    """Refuses to create the table of a corpus whose versions are recorded: new versions would get the same numbers.

    Args:
        spark: any session.
        root: path or URI of the root.
        name: name of the corpus.

    Raises:
        CorpusError: `corpora` has rows of the corpus.
    """
    if not tables.exists(spark, Root(root).table("corpora")):
        return
    known = sorted(row["version"] for row in list_corpora(spark, root).collect() if row["name"] == name)
    if known:
        raise CorpusError(no_table_message(root, name, known))


def no_table_message(root: str, name: str, versions: list[int]) -> str:
    """Says that the table of the corpus `name` is gone from `root`, although `corpora` records its `versions`."""
    return (
        f"table {storage.redact(Root(root).refined(name))}: expected the versions {versions} that "
        f"{shown_table('corpora')} records, found no table; put it back from a copy, or refine under another name in "
        "refine.corpora: new versions would get the numbers of the lost ones"
    )
