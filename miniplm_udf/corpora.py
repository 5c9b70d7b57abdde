"""Refined corpora and their versions: committing one, listing them, showing one's provenance, reading one back.

Owns the table `corpora`, one row a version, which outlives the Delta log that holds the same provenance as
`userMetadata`. Owns no selection (`refine.py`, `follow.py`). Versions are Delta versions of `refined/<name>`; a pinned
one is read from its copy (`pins.py`). Of two drivers that commit on top of the same version, one does and the other is
told. A row of `corpora` is added once: a version that has one gets no second. Driver only.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from miniplm_udf import pins, schemas, storage, tables
from miniplm_udf.errors import CorpusError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row, SparkSession

# Of Delta's transaction ids, the one that numbers the commits of a table that `commit` writes.
_COMMITS = "commits"
# What of a provenance stands in a row's `inputs`, where there is any.
_RECORDED_APART = ("followed", "derived", "cuts", "diagnostics")
# Commits that change no row.
MAINTENANCE = ("OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES", "UPGRADE PROTOCOL")
# Maintenance comes once a while: the newest other commit is among these, mostly.
_LOOK_BACK = 16
# What Spark and Delta say of a version, or of files, that are gone.
_GONE = re.compile(
    r"DELTA_\w*(VERSION|TIME_TRAVEL|LOG_FILE|TRUNCATED)|VersionNotFound|time travel"
    r"|FileNotFound|FILE_NOT_EXIST|does not exist|READ_FILE"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a version of a corpus is and where it came from: the `userMetadata` of its commit.

    Attributes:
        config: the resolved corpus config.
        inputs: `matrix_version` (of what a proxy ranks `proxy_version`), and `last_batches`: the last batch of each
            query id in these tables that is in it.
        model_revisions: by alias.
        threshold: the lowest kept score.
        n_candidates: pool rows that passed `where`; `candidate_tokens` are theirs.
        n_unscorable: candidates whose score is null, NaN or infinite; they are never kept. None: not known any more.
        fingerprint: of the kept ids and scores, independent of order.
        kept_share_by_source: of a full refinement; empty where the corpus was followed.
        cuts: the last kept rows, by source (`keep.Kept.plain`); empty where the corpus was followed.
        diagnostics: of a full refinement (`diagnostics.diagnose`); empty where the corpus was followed.
        followed: None for a full refinement, which is exact. Else `since_version`, the full one that rows were
            appended to since; `n_appended` rows by this version; and the `cut` that chose them (`cuts.BucketCut`).
        derived: None for what was refined or followed. Else `from_version`, the version that the rows are of, and
            `by`: restore, rebuild or take-down (then its `takedown_id` too). The config and the inputs are that
            version's.
    """

    corpus: str
    config: dict[str, Any]
    inputs: dict[str, Any]
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
    followed: dict[str, Any] | None = None
    cuts: dict[str, Any] = dataclasses.field(default_factory=dict)
    diagnostics: dict[str, Any] = dataclasses.field(default_factory=dict)
    derived: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Newest:
    """The newest state of a table that `commit` writes.

    Attributes:
        base: the newest version, of whatever kind.
        version: the newest one that changed rows; `metadata` is its own, None where it has none.
    """

    base: int
    version: int
    metadata: dict[str, Any] | None

    @property
    def provenance(self) -> Provenance | None:
        """None where the commit is not of a refinement of this code."""
        try:
            return Provenance(**self.metadata) if self.metadata else None
        except TypeError:
            return None


def newest(spark: "SparkSession", uri: str) -> Newest | None:
    """The newest state, or None where there is no table. Costs the same however many versions there are."""
    from delta.tables import DeltaTable

    if not tables.exists(spark, uri):
        return None
    table = DeltaTable.forPath(spark, uri)
    for history in (table.history(_LOOK_BACK), table.history()):
        rows = history.select("version", "operation", "userMetadata").orderBy("version", ascending=False).collect()
        for row in rows:
            if row["operation"] not in MAINTENANCE:
                return Newest(
                    rows[0]["version"], row["version"], json.loads(row["userMetadata"]) if row["userMetadata"] else None
                )
    raise CorpusError(f"table {storage.redact(uri)}: its log holds no commit that made it")


def commit(
    frame: "DataFrame", uri: str, table: schemas.Table, metadata: dict[str, Any], on: Newest | None, replaces: bool
) -> int:
    """Replaces the rows, or appends, in one commit on top of the state `on`, and returns its version.

    Delta's own transaction id is the guard, numbered by the version that is built on: where another commit of this
    function has come since, Delta either drops the write unread or refuses it.

    Args:
        metadata: becomes `userMetadata`.
        on: what the rows were chosen by; None: there was no table.

    Raises:
        CorpusError: another driver has committed meanwhile.
    """
    number = on.base + 1 if on else 0
    write = tables.overwrite if replaces else tables.append
    try:
        write(frame, uri, table, metadata=metadata, query_id=_COMMITS, batch_id=number)
    except tables.conflicts() as error:
        raise _overtaken(uri) from error
    made = newest(frame.sparkSession, uri)
    if made is None or made.metadata != json.loads(json.dumps(metadata)):
        raise _overtaken(uri)
    return made.version


def _overtaken(uri: str) -> CorpusError:
    return CorpusError(
        f"table {storage.redact(uri)}: another driver has written a version meanwhile, so that this one would rest on "
        "an old one; nothing was written: run again"
    )


def corpus_uri(root: str, name: str) -> str:
    return storage.join(storage.to_uri(root), "tables", "refined", name)


def list_corpora(spark: "SparkSession", root: str) -> "DataFrame":
    """All versions of all corpora, by name and version: the table `corpora`."""
    return tables.read(spark, _uri(root)).orderBy("name", "version")


def show_corpus(spark: "SparkSession", root: str, name: str, version: int | None = None) -> dict[str, Any]:
    """The row of `corpora` of one version (the newest by default), its JSON parsed.

    Raises:
        CorpusError: there is no such corpus or version.
    """
    known = [row for row in list_corpora(spark, root).collect() if row["name"] == name]
    chosen = [row for row in known if version is None or row["version"] == version]
    if not chosen:
        names = sorted(row[0] for row in list_corpora(spark, root).select("name").distinct().collect())
        raise CorpusError(
            f"corpus {name!r}, version {'newest' if version is None else version}: expected one of the corpora {names}"
            f"{f', versions {[row.version for row in known]}' if known else ''}; run `miniplm refine` to make one"
        )
    return parsed(chosen[-1])


def parsed(row: "Row") -> dict[str, Any]:
    """A row of `corpora` as plain data, its JSON parsed."""
    return {**row.asDict(), "config": json.loads(row["config"]), "inputs": json.loads(row["inputs"])}


def read_corpus(spark: "SparkSession", root: str, name: str, version: int | None = None) -> "DataFrame":
    """A corpus as it was at a version (the newest by default): ids, scores, no text.

    Raises:
        CorpusError: there is no such corpus or version, or it was not pinned and its log or files are gone.
    """
    found = int(show_corpus(spark, root, name, version)["version"])
    with readable(name, found):
        if pins.of_version(spark, root, name, found) is not None:
            return pins.read(spark, root, name, found)
        return with_files(tables.read(spark, corpus_uri(root, name), found))


def with_files(rows: "DataFrame") -> "DataFrame":
    """The frame, if its files are there: looked for beforehand, since Spark shows a trace for each that it misses.

    Raises:
        FileNotFoundError: one is not.
    """
    for file in rows.inputFiles():
        if not storage.exists(unquote(file)):
            raise FileNotFoundError(f"FileNotFound: {storage.redact(file)}")
    return rows


def is_gone(error: Exception) -> bool:
    """Whether reading failed because a version or its files are not there."""
    return bool(_GONE.search(str(error)))


@contextlib.contextmanager
def readable(name: str, version: int) -> Iterator[None]:
    """Says of a version that it is gone, where a read in the block says so in Spark's words.

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
        raise CorpusError(
            f"corpus {name!r}, version {version}: expected its files, found that they are gone: a version that is not "
            "pinned is kept until maintenance or a take-down removes it; `miniplm corpus rebuild` makes its rows again"
        ) from error


def provenance_of(spark: "SparkSession", root: str, name: str, version: int) -> Provenance:
    """A version's provenance from its row of `corpora`, which outlives the log; what no row has is not known any more.

    Raises:
        CorpusError: there is no such corpus or version.
    """
    row = show_corpus(spark, root, name, version)
    inputs = dict(row["inputs"])
    revisions = inputs.pop("model_revisions", {})
    apart = {key: inputs.pop(key) for key in _RECORDED_APART if key in inputs}
    counts = ("threshold", "n_candidates", "candidate_tokens", "n_instances", "n_tokens", "fingerprint")
    return Provenance(
        corpus=name,
        config=row["config"],
        inputs=inputs,
        model_revisions=revisions,
        n_unscorable=None,
        code_revision=row["code_revision"],
        kept_share_by_source={},
        **{key: row[key] for key in counts},
        **apart,
    )


def record(spark: "SparkSession", root: str, version: int, provenance: Provenance) -> bool:
    """Adds the row of a version, unless there is one; returns whether it did."""
    from pyspark.sql import functions as F

    tables.create(spark, _uri(root), schemas.CORPORA)
    known = tables.read(spark, _uri(root)).where((F.col("name") == provenance.corpus) & (F.col("version") == version))
    if not known.isEmpty():
        return False
    inputs = {**provenance.inputs, "model_revisions": provenance.model_revisions}
    for key in _RECORDED_APART:
        if value := getattr(provenance, key):
            inputs[key] = value
    values: dict[str, Any] = {
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
    plain = schemas.CORPORA.spark_schema()
    schema = type(plain)([field for field in plain.fields if field.name in values])
    row = spark.createDataFrame([tuple(values[name] for name in schema.names)], schema)
    tables.append(row.withColumn("created_at", F.current_timestamp()), _uri(root), schemas.CORPORA)
    tables.compact(spark, _uri(root), version)
    return True


def _uri(root: str) -> str:
    return storage.join(storage.to_uri(root), "tables", "corpora")
