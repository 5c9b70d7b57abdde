"""Refined corpora and their versions: listing them, showing one's provenance, reading one back. Driver only.

Owns the table `corpora`, one row a version, which outlives the Delta log that holds the same provenance as
`userMetadata`. Owns no selection (`refine.py`). Versions are Delta versions of `refined/<name>`. A row is added once: a
version that has one gets no second.
"""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from miniplm_udf import schemas, storage, tables
from miniplm_udf.errors import CorpusError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a version of a corpus is and where it came from: the `userMetadata` of its commit.

    Attributes:
        config: the resolved corpus config.
        inputs: `matrix_version`, and `last_batches`: the last batch of each query id in the matrix.
        model_revisions: by alias.
        threshold: the lowest kept score.
        n_candidates: pool rows that passed `where`; `candidate_tokens` are theirs.
        n_unscorable: candidates whose score is null, NaN or infinite; they are never kept.
        fingerprint: of the kept ids and scores, independent of order.
    """

    corpus: str
    config: dict[str, Any]
    inputs: dict[str, Any]
    model_revisions: dict[str, str]
    threshold: float
    n_candidates: int
    candidate_tokens: int
    n_unscorable: int
    n_instances: int
    n_tokens: int
    fingerprint: str
    code_revision: str
    kept_share_by_source: dict[str, float]


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
    known = list_corpora(spark, root).where(f"name = '{name}'").collect()
    chosen = [row for row in known if version is None or row["version"] == version]
    if not chosen:
        names = sorted(row[0] for row in list_corpora(spark, root).select("name").distinct().collect())
        raise CorpusError(
            f"corpus {name!r}, version {'newest' if version is None else version}: expected one of the corpora {names}"
            f"{f', versions {[row.version for row in known]}' if known else ''}; run `miniplm refine` to make one"
        )
    found: dict[str, Any] = chosen[-1].asDict()
    return {**found, "config": json.loads(found["config"]), "inputs": json.loads(found["inputs"])}


def read_corpus(spark: "SparkSession", root: str, name: str, version: int | None = None) -> "DataFrame":
    """A corpus as it was at a version (the newest by default): ids, scores, no text.

    Raises:
        CorpusError: there is no such corpus or version.
    """
    return tables.read(spark, corpus_uri(root, name), int(show_corpus(spark, root, name, version)["version"]))


def record(spark: "SparkSession", root: str, version: int, provenance: Provenance) -> bool:
    """Adds the row of a version, unless there is one; returns whether it did."""
    from pyspark.sql import functions as F

    tables.create(spark, _uri(root), schemas.CORPORA)
    known = tables.read(spark, _uri(root)).where((F.col("name") == provenance.corpus) & (F.col("version") == version))
    if not known.isEmpty():
        return False
    inputs = {**provenance.inputs, "model_revisions": provenance.model_revisions}
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
    return True


def _uri(root: str) -> str:
    return storage.join(storage.to_uri(root), "tables", "corpora")
